"""Corrupted annotation files and images are either read as by MMDetection, or rejected with a one-line message."""

import contextlib
import copy
import io
import json

import cv2
import numpy as np
import pytest
from fuzzing import fuzz, one_sentence
from hypothesis import strategies as st
from mmdet.datasets import CocoDataset
from pycocotools.coco import COCO

from msda_plugin.engine.data_check import check_coco
from msda_plugin.engine.inference import read_image
from msda_plugin.tools.custom_data import coco
from msda_plugin.tools.custom_data.formats import load_splits

VALID = dict(
    images=[dict(id=index, file_name=f'{index}.png', width=16, height=12) for index in (1, 2, 3)],
    annotations=[
        dict(id=index, image_id=1 + index % 3, category_id=1 + index % 2, bbox=[1, 2, 5, 6], area=30, iscrowd=0)
        for index in range(5)
    ],
    categories=[dict(id=1, name='ring'), dict(id=2, name='star')],
)
ODD = (
    None,
    True,
    0,
    -1,
    1,
    2,
    3,
    99,
    1.5,
    float('nan'),
    float('inf'),
    10**30,
    10**400,
    1e308,
    '',
    'text',
    '1',
    '../../1.png',
    '/etc/passwd',
    'x' * 5000,
    'a\0b',
    [],
    [1],
    [1, 2, 5, 6],
    [0, 0, 0, 0],
    [-5, -5, 1e9, 1e9],
    [1, 2, float('nan'), 4],
    ['1', 2, 3, 4],
    [True, 1, 1, 1],
    [10**400, 1, 1, 1],
    {},
    {'id': 1},
    [[1, 1, 2, 2]],
)
KEYS = ('images', 'annotations', 'categories')
FIELDS = (
    'id',
    'image_id',
    'category_id',
    'bbox',
    'area',
    'iscrowd',
    'file_name',
    'width',
    'height',
    'name',
    'segmentation',
)

records = st.tuples(
    st.sampled_from(KEYS),
    st.integers(0, 4),
    st.sampled_from(FIELDS),
    st.sampled_from(ODD),
    st.sampled_from(('set', 'set', 'set', 'remove', 'repeat', 'replace')),
)
lists = st.tuples(st.sampled_from(KEYS), st.sampled_from(ODD), st.sampled_from(('set', 'remove', 'append')))
texts = st.tuples(
    st.integers(0, 2000),
    st.sampled_from(
        (
            b'',
            b'[',
            b'\0',
            b'\xff',
            b'[' * 200_000,
            b'{"a":' * 100_000,
            b'9' * 5000,
            b'\xef\xbb\xbf',
            b'null',
            b'-',
            b'"',
        )
    ),
    st.sampled_from(('cut', 'insert', 'only')),
)
cases = st.fixed_dictionaries(
    dict(
        records=st.lists(records, max_size=3),
        lists=st.lists(lists, max_size=1),
        text=st.one_of(st.none(), st.none(), st.none(), texts),
        evaluated=st.booleans(),
        annotated=st.booleans(),
        classes=st.sampled_from((None, None, ('ring', 'star'), ('star',), ('moon',), ('star', 'ring'))),
    )
)


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp('images')
    for index in (1, 2, 3):
        cv2.imwrite(str(folder / f'{index}.png'), np.full((12, 16, 3), 40 * index, np.uint8))
    return folder


def damage(case):
    content = copy.deepcopy(VALID)
    for key, index, field, value, how in case['records']:
        index %= len(content[key])
        if how == 'repeat':
            content[key].append(content[key][index])
        elif how == 'replace':
            content[key][index] = value
        elif isinstance(content[key][index], dict):
            if how == 'set':
                content[key][index][field] = value
            else:
                content[key][index].pop(field, None)
    for key, value, how in case['lists']:
        if how == 'set':
            content[key] = value
        elif how == 'append':
            content[key].append(value)
        else:
            del content[key]
    text = json.dumps(content).encode()
    if case['text']:
        position, piece, how = case['text']
        text = {'cut': text[:position] + piece, 'insert': text[:position] + piece + text[position:], 'only': piece}[how]
    return text


def quietly(function, *args, **kwargs):
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*args, **kwargs)


def test_annotations_of_a_config(images, tmp_path, long_run):
    """MMDetection's data set and pycocotools can read every file that `check_coco` accepts."""
    path = tmp_path / 'train.json'

    def check(case):
        path.write_bytes(damage(case))
        try:
            report = check_coco(path, images, case['classes'], evaluated=case['evaluated'], annotated=case['annotated'])
        except (ValueError, FileNotFoundError) as error:
            return one_sentence(error)
        assert report.num_images >= report.num_empty_images >= 0 <= report.num_degenerate_boxes <= report.num_boxes
        if not case['annotated'] and 'annotations' not in json.loads(path.read_bytes()):
            return 'valid, without annotations'
        dataset = quietly(
            CocoDataset,
            ann_file=str(path),
            data_prefix=dict(img=f'{images}/'),
            pipeline=[],
            metainfo=dict(classes=report.classes),
            filter_cfg=dict(filter_empty_gt=True),
            serialize_data=False,
        )  # serialization would run the garbage collector in each case
        for index in range(len(dataset)):
            for instance in dataset.get_data_info(index)['instances']:
                assert np.isfinite(instance['bbox']).all() and 0 <= instance['bbox_label'] < len(report.classes)
        if case['evaluated']:
            coco = quietly(COCO, str(path))
            assert len(coco.getImgIds()) == report.num_images
        return 'valid'

    fuzz('annotations of a config', cases, 2000 if long_run else 70, check)


def test_annotations_of_custom_data(images, tmp_path, long_run):
    """The annotation files that `train --data` writes pass the check of a config."""
    path = tmp_path / 'train.json'

    def check(case):
        path.write_bytes(damage(case))
        try:
            split = coco.load_split('train', path, tmp_path, images)
            classes = coco.choose_classes(split, case['classes'])
            coco.clean(split, classes, skip_bad_images=case['annotated'])
            if split.bad_images and not case['annotated'] or not split.content['images']:
                return 'bad images'
            coco.describe([split], classes)
            written = coco.write(split, tmp_path / 'written')
        except (ValueError, FileNotFoundError) as error:
            return one_sentence(error)
        report = check_coco(written, images, classes, evaluated=True)
        assert report.num_boxes > 0 or report.warnings
        return 'valid'

    fuzz('annotations of custom data', cases, 1500 if long_run else 50, check)


FORMATS = {
    'yolo': {
        'data.yaml': 'path: .\ntrain: images\nval: list.txt\nnames: {0: ring, 1: star}\nnc: 2\n',
        'list.txt': './images/2.png\n',
        'labels/1.txt': '1 0.5 0.5 0.25 0.5\n0 0.1 0.2 0.9 0.2 0.5 0.8\n',
        'labels/2.txt': '0 0.5 0.5 0.25 0.5\n',
        'labels/3.txt': '',
    },
    'voc': {
        'ImageSets/Main/train.txt': '1\n2\n',
        'ImageSets/Main/val.txt': '3\n',
        **{
            f'Annotations/{index}.xml': f'<annotation><filename>{index}.png</filename><size><width>16</width><height>12'
            '</height></size><object><name>ring</name><difficult>0</difficult><bndbox><xmin>1</xmin><ymin>1</ymin>'
            '<xmax>8</xmax><ymax>6</ymax></bndbox></object></annotation>'
            for index in (1, 2, 3)
        },
    },
}
PIECES = ('\0', 'nan', '-1', '1e400', '[', '{', '&a', '*a', '<', '</', '&x;', '..', '/', 'null', '0: ', '- ', '\n', 'é')
PIECES += ('9' * 400, 'a' * 5000, '"', '[1,2]', '{1: 2}', '!!python/object:os.system', '<!DOCTYPE a [<!ENTITY x "y">]>')


@pytest.mark.parametrize('name', FORMATS)
def test_other_formats(name, images, tmp_path, long_run):
    """What `train --data` reads from YOLO and Pascal VOC files passes the check of a config."""
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / ('images' if name == 'yolo' else 'JPEGImages')).symlink_to(images)
    files = FORMATS[name]
    edits = st.lists(st.tuples(st.floats(0, 1), st.sampled_from(PIECES), st.integers(0, 20)), min_size=1, max_size=3)

    def check(case):
        damaged, edits, encoding = case
        for file, text in files.items():
            for place, piece, cut in edits if file == damaged else ():
                at = int(place * len(text))
                text = text[:at] + piece + text[at + cut :]
            path = tmp_path / 'data' / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode(encoding))
        try:
            splits = load_splits(tmp_path / 'data', name=name)
            classes = coco.choose_classes(splits[0])
            for split in splits:
                coco.clean(split, classes, skip_bad_images=True)
            if not all(split.content['images'] for split in splits):
                return 'bad images'
            coco.describe(splits, classes)
            coco.write_report(splits, tmp_path / 'report.txt')
        except (ValueError, FileNotFoundError) as error:
            return one_sentence(error)
        for split in splits:
            check_coco(coco.write(split, tmp_path / 'written'), split.images, classes, evaluated=True)
        return 'valid'

    cases = st.tuples(st.sampled_from(list(files)), edits, st.sampled_from(('utf-8', 'latin-1')))
    fuzz(f'{name} files', cases, 2000 if long_run else 100, check)


def test_images(tmp_path, long_run):
    """A corrupted image is either read or rejected."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    encoded = [cv2.imencode(ending, pixels)[1].tobytes() for ending in ('.png', '.jpg', '.bmp', '.tif', '.webp')]
    changes = st.lists(
        st.tuples(st.floats(0, 1), st.sampled_from(('cut', 'flip', 'insert')), st.integers(0, 255)),
        min_size=1,
        max_size=4,
    )

    def check(case):
        number, edits = case
        data = bytearray(encoded[number])
        for place, how, byte in edits:
            at = int(place * max(len(data) - 1, 0))
            if how == 'cut':
                del data[at:]
            elif how == 'insert':
                data[at:at] = bytes([byte]) * 4
            elif data:
                data[at] ^= byte
        path = tmp_path / 'image.png'
        path.write_bytes(data)
        size, _ = coco.inspect_image(path)
        try:
            image = read_image(path)
        except ValueError as error:
            return one_sentence(error)
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        assert size in ((image.shape[1], image.shape[0]), None)
        return 'pixels'

    fuzz('images', st.tuples(st.integers(0, len(encoded) - 1), changes), 800 if long_run else 30, check)
