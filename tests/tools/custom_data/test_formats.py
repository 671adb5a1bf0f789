"""YOLO and Pascal VOC data are recognized, read by their rules, and trained on as COCO."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from mmdet.visualization import DetLocalVisualizer
from PIL import Image

from msda_plugin.engine.data_check import check_coco
from msda_plugin.tools.custom_data import coco as coco_files
from msda_plugin.tools.custom_data import voc, yolo
from msda_plugin.tools.custom_data.formats import load_splits, recognize
from msda_plugin.tools.train import main

SIZE = (40, 20)  # (width, height)


def picture(path, size=SIZE):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size).save(path)


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_coco(ann_file, images, names=('0.png', '1.png')):
    records = [dict(id=index, file_name=name) for index, name in enumerate(names)]
    box = dict(id=1, image_id=0, category_id=1, bbox=[1, 1, 5, 5])
    put(ann_file, json.dumps(dict(images=records, annotations=[box], categories=[dict(id=1, name='cat')])))
    for name in names:
        picture(images / name)
    return ann_file


def sentence(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def cleaned(split, classes=None):
    """{file name: [(class name, box, iscrowd)]} after the check that precedes a training."""
    coco_files.clean(split, classes or coco_files.choose_classes(split))
    names = {category['id']: category['name'] for category in split.content['categories']}
    found = {image['file_name']: [] for image in split.content['images']}
    files = {image['id']: image['file_name'] for image in split.content['images']}
    for a in split.content['annotations']:
        found[files[a['image_id']]].append((names[a['category_id']], a['bbox'], a['iscrowd']))
    return found


# ---- YOLO -----------------------------------------------------------------------------------------------------------
def make_yolo(folder, yaml='train: images/train\nval: images/val\nnames: [cat, dog]\n', rows='1 0.5 0.5 0.25 0.5\n'):
    for name in ('train/0', 'train/1', 'val/2'):
        picture(folder / f'images/{name}.png')
        put(folder / f'labels/{name}.txt', rows)
    put(folder / 'data.yaml', yaml)
    return folder


def test_yolo_boxes_and_polygons(tmp_path):
    make_yolo(tmp_path)
    put(
        tmp_path / 'labels/train/0.txt',
        '0 0.25 0.5 0.5 1\n\n1 0.1 0.2 0.9 0.2 0.5 0.8\n1 0.5 0.5 0.1 0.1 \n1 0.5 0.5 0.1 0.1\n',
    )
    put(tmp_path / 'labels/train/1.txt', '')
    picture(tmp_path / 'images/train/deep/3.jpg')
    train, val = load_splits(tmp_path)
    found = cleaned(train)
    assert found == {
        '0.png': [('cat', [0, 0, 20, 20], 0), ('dog', [4, 4, 32, 12], 0), ('dog', [18, 9, 4, 2], 0)],
        '1.png': [],
        'deep/3.jpg': [],
    }
    assert [a['area'] for a in train.content['annotations']] == [400, 384, 8]
    assert train.notes == [
        '1 image without a label file, used as images without objects',
        '1 repeated row of labels left out',
    ]
    assert cleaned(val, ('cat', 'dog')) == {'2.png': [('dog', [15, 5, 10, 10], 0)]}
    report = check_coco(coco_files.write(train, tmp_path / 'work'), train.images, ('cat', 'dog'), evaluated=True)
    assert (report.num_images, report.num_boxes, report.warnings) == (3, 3, ())


@pytest.mark.parametrize(
    'yaml',
    [
        'path: .\ntrain: images/train\nval: images/val\nnames:\n  0: cat\n  1: dog\n',
        'path: {folder}\ntrain: [images/train]\nval: images/val\nnc: 2\nnames: [cat, dog]\n',
        'train: ../images/train\nval: ../images/val\nnames: [cat, dog]\n',  # as Roboflow writes it
        'train: lists/train.txt\nvalidation: lists/val.txt\nnames: [cat, dog]\n',
        'path: /content/elsewhere\ntrain: images/train\nval: images/val\nnames: [cat, dog]\n',
        'path: {parent}\ntrain: mine/images/train\nval: mine/images/val\nnames: [cat, dog]\n',
    ],
)
def test_paths_of_yolo_data(yaml, tmp_path):
    folder = make_yolo(tmp_path / 'mine', yaml.format(folder=tmp_path / 'mine', parent=tmp_path))
    put(folder / 'lists/train.txt', f'../images/train/0.png\n\n{folder}/images/train/1.png\n../images/train/0.png\n')
    put(folder / 'lists/val.txt', './../images/val/2.png\n')
    splits = load_splits(folder)
    assert [split.name for split in splits] == ['train', 'val']
    assert [len(split.content['images']) for split in splits] == [2, 1]
    assert {name for split in splits for name in cleaned(split, ('cat', 'dog'))} == {'0.png', '1.png', '2.png'}
    elsewhere = [note for note in splits[0].notes if note.startswith('/content/elsewhere, the path in data.yaml')]
    assert len(elsewhere) == ('/content' in yaml)
    assert load_splits(folder / 'data.yaml')[0].content == load_splits(folder)[0].content


def test_labels_are_found_like_those_of_ultralytics():
    for image, label in (
        ('/a/images/train/1.jpg', '/a/labels/train/1.txt'),
        ('/images/a/images/1.x.jpg', '/images/a/labels/1.x.txt'),
        ('/a/train/1.jpg', '/a/train/1.txt'),
        ('/a/images.jpg', '/a/images.txt'),
    ):
        assert yolo._label_file(Path(image)) == Path(label)


@pytest.mark.parametrize(
    'row, problem',
    [
        ('0 0.5 0.5 0.1', r'has 4 numbers, expected 5: class, x, y, width and height; or class and at least 3 points'),
        ('0 0.5 0.5 0.1 0.1 0.9', 'has 6 numbers, expected 5'),
        ('2 0.5 0.5 0.1 0.1', 'has the class 2, expected 0 to 1'),
        ('-1 0.5 0.5 0.1 0.1', 'has the class -1, expected 0 to 1'),
        ('0.5 0.5 0.5 0.1 0.1', 'has the class 0.5, expected 0 to 1'),
        ('nan 0.5 0.5 0.1 0.1', 'has the class nan, expected 0 to 1'),
        ('cat 0.5 0.5 0.1 0.1', 'is not made of numbers'),
        ('0 20 10 5 5', 'has the coordinate 20, expected 0 to 1, a fraction of the image'),
        ('0 0.5 inf 0.1 0.1', 'has the coordinate inf, expected 0 to 1'),
    ],
)
def test_wrong_rows(row, problem, tmp_path):
    make_yolo(tmp_path)
    put(tmp_path / 'labels/train/1.txt', f'0 0.5 0.5 0.1 0.1\n{row}\n')
    with pytest.raises(
        ValueError, match=f'^1 row of YOLO labels is wrong: {tmp_path}/labels/train/1.txt, line 2, {problem}'
    ):
        load_splits(tmp_path)


def test_nan_in_a_row(tmp_path):
    make_yolo(tmp_path)
    put(tmp_path / 'labels/train/1.txt', '0 0.5 nan 0.1 0.1\n0 0.5 0.5 0.2 0\n')
    train = load_splits(tmp_path)[0]
    assert cleaned(train)['1.png'] == [('cat', [16, 10, 8, 0], 0)]
    assert train.degenerate == [
        '1.png annotation 2 [18, nan, 4, 2] (not a number)',
        '1.png annotation 3 [16, 10, 8, 0] (no width or height)',
    ]


def test_many_wrong_rows(tmp_path):
    make_yolo(tmp_path, rows='5 0 0 0 0\n' * 4)
    with pytest.raises(ValueError, match=r'^8 rows of YOLO labels are wrong: (.*; ){5}and 3 more$'):
        load_splits(tmp_path)


def test_keypoints_are_ignored(tmp_path):
    yaml = 'train: images/train\nnames: [cat, dog]\nkpt_shape: [2, 3]\n'
    make_yolo(tmp_path, yaml, '1 0.5 0.5 0.25 0.5 0.1 0.1 2 0.2 0.2 2\n')
    assert cleaned(load_splits(tmp_path)[0])['0.png'] == [('dog', [15, 5, 10, 10], 0)]
    put(tmp_path / 'labels/train/0.txt', '1 0.5 0.5 0.25 0.5 0.1 0.1 2\n')
    with pytest.raises(ValueError, match='has 8 numbers, expected 11: .* and height, and the keypoints'):
        load_splits(tmp_path)


@pytest.mark.parametrize(
    'yaml, problem',
    [
        ('train: images/train\nval: nowhere\nnames: [cat, dog]\n', 'val of .*data.yaml is nowhere, but there is no '),
        ('train: labels\nnames: [cat, dog]\n', 'train of .*data.yaml, labels, has no images'),
        ('train: images/train\nnc: 3\nnames: [cat, dog]\n', 'has nc: 3, but 2 names'),
        ('train: images/train\nnames: {1: cat, 2: dog}\n', 'must be numbered from 0 to 1, got 1, 2'),
        ('train: images/train\nnames: cat\n', 'needs names, a list of class names'),
        ('train: data.yaml\nnames: [cat, dog]\n', 'must be a folder of images, or a .txt file'),
        ('train: [images\n', 'data.yaml is not valid YAML'),
    ],
)
def test_wrong_yaml(yaml, problem, tmp_path):
    make_yolo(tmp_path, yaml)
    with pytest.raises((ValueError, FileNotFoundError), match=problem):
        load_splits(tmp_path)


def test_no_labels_at_all(tmp_path):
    make_yolo(tmp_path)
    os.rename(tmp_path / 'labels', tmp_path / 'label')
    with pytest.raises(ValueError, match=r'no image of train .*0.png should have them in .*labels/train/0.txt'):
        load_splits(tmp_path)


def test_test_data_without_labels_are_left_out(tmp_path):
    make_yolo(tmp_path, 'train: images/train\nval: images/val\ntest: images/test\nnames: [cat, dog]\n')
    splits = load_splits(tmp_path)
    assert [split.name for split in splits] == ['train', 'val'] and 'test data left out: ' in splits[0].notes[0]
    picture(tmp_path / 'images/test/4.png')
    assert 'no image of test' in load_splits(tmp_path)[0].notes[0]
    put(tmp_path / 'labels/test/4.txt', '0 0.5 0.5 0.1 0.1')
    assert [split.name for split in load_splits(tmp_path)] == ['train', 'val', 'test']


def test_rotated_images_have_the_size_that_is_seen(tmp_path):
    make_yolo(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new('RGB', SIZE).save(tmp_path / 'images/train/0.jpg', exif=exif)
    (tmp_path / 'images/train/0.png').unlink()
    train = load_splits(tmp_path)[0]
    assert cleaned(train)['0.jpg'] == [('dog', [7.5, 10, 5, 20], 0)]
    assert (train.content['images'][0]['width'], train.content['images'][0]['height']) == SIZE[::-1]


# ---- Pascal VOC -----------------------------------------------------------------------------------------------------
def xml(path, *objects, filename=None, size=SIZE):
    items = ''.join(
        f'<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>'
        + ''.join(f'<{corner}>{value}</{corner}>' for corner, value in zip(voc.CORNERS, box, strict=True))
        + '</bndbox><part><name>head</name></part></object>'
        for name, box, difficult in objects
    )
    shape = f'<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>' if size else ''
    put(path, f'<annotation><filename>{filename or path.stem + ".png"}</filename>{shape}{items}</annotation>')


DOG, CAT = ('dog', (1, 1, 20, 10), 0), ('cat', (11, 6, 11, 6), 1)


def make_voc(folder, lists=('train', 'val')):
    for index in range(4):
        picture(folder / f'JPEGImages/{index}.png')
        xml(folder / f'Annotations/{index}.xml', DOG, *([CAT] if index == 0 else []))
    for name, ids in dict(train='0\n2\n', val='1 \n', trainval='0\n1\n2\n', test='3\n').items():
        if name in lists:
            put(folder / f'ImageSets/Main/{name}.txt', ids)
    put(folder / 'ImageSets/Main/dog_train.txt', '0 1\n2 -1\n')
    picture(folder / 'SegmentationClass/0.png')
    return folder


def test_pixels_of_voc_count_from_one(tmp_path):
    """The box from pixel 1 to 20 covers the first 20 pixels; that of a single pixel is one wide."""
    train, val = load_splits(make_voc(tmp_path))
    assert cleaned(train) == {
        '0.png': [('dog', [0, 0, 20, 10], 0), ('cat', [10, 5, 1, 1], 1)],
        '2.png': [('dog', [0, 0, 20, 10], 0)],
    }
    assert train.notes == ['1 difficult object ignored in training and evaluation']
    assert list(cleaned(val, ('cat', 'dog'))) == ['1.png']
    report = check_coco(coco_files.write(train, tmp_path / 'work'), train.images, ('cat', 'dog'), evaluated=True)
    assert (report.num_boxes, report.warnings) == (3, ())


@pytest.mark.parametrize(
    'lists, expected',
    [
        (('train', 'val', 'test'), dict(train=2, val=1, test=1)),
        (('trainval', 'test'), dict(train=3, test=1)),
        (('trainval', 'val'), dict(train=3)),  # val is a part of trainval
        ((), dict(train=4)),
    ],
)
def test_lists_of_voc(lists, expected, tmp_path):
    splits = load_splits(make_voc(tmp_path / 'VOC2012', lists).parent)
    assert {split.name: len(split.content['images']) for split in splits} == expected


def test_files_that_lists_name(tmp_path):
    make_voc(tmp_path, ('train', 'val', 'test'))
    (tmp_path / 'Annotations/3.xml').unlink()
    splits = load_splits(tmp_path)
    assert len(splits) == 2 and 'test data left out' in splits[0].notes[1]
    (tmp_path / 'Annotations/2.xml').unlink()
    with pytest.raises(FileNotFoundError, match=r'1 file of 2 images in .*train.txt is not in .*Annotations: 2.xml'):
        load_splits(tmp_path)


@pytest.mark.parametrize('images, annotations', [('{split}', '{split}'), ('images/{split}', 'annotations/{split}')])
def test_pairs_of_images_and_xml_files(images, annotations, tmp_path):
    for split in ('train', 'valid'):
        for index in range(2):
            picture(tmp_path / images.format(split=split) / f'{index}.jpg')
            xml(
                tmp_path / annotations.format(split=split) / f'{index}.xml', DOG, filename=f'old_{index}.png', size=None
            )
    picture(tmp_path / images.format(split='train') / '9.jpg')
    splits = load_splits(tmp_path)
    assert [split.name for split in splits] == ['train', 'val']
    assert splits[0].notes == [f'1 image without an XML file left out: {images.format(split="train")}/9.jpg']
    for split, folder in zip(splits, ('train', 'valid'), strict=True):
        assert list(cleaned(split)) == [f'{images.format(split=folder)}/{index}.jpg' for index in range(2)]
        assert split.content['images'][0]['width'] == SIZE[0] and not split.bad_images


def test_one_flat_folder(tmp_path):
    for index in range(3):
        picture(tmp_path / f'{index}.JPG')
        xml(tmp_path / f'{index}.xml', DOG)
    put(tmp_path / 'other.xml', '<settings><object/></settings>')
    (train,) = load_splits(tmp_path)
    assert list(cleaned(train)) == ['0.JPG', '1.JPG', '2.JPG']


def test_several_images_of_an_xml_file(tmp_path):
    for suffix in ('jpg', 'png'):
        picture(tmp_path / f'0.{suffix}')
    xml(tmp_path / '0.xml', DOG)
    (train,) = load_splits(tmp_path)
    assert list(cleaned(train)) == ['0.png']  # the one that the XML file names
    xml(tmp_path / '0.xml', DOG, filename='0.bmp')
    with pytest.raises(ValueError, match='several images fit 1 XML file: 0.xml: there are 0.jpg, 0.png'):
        load_splits(tmp_path)


def test_missing_image_of_an_xml_file(tmp_path):
    make_voc(tmp_path)
    (tmp_path / 'JPEGImages/2.png').unlink()
    train, _ = load_splits(tmp_path)
    cleaned(train)
    assert train.bad_images == {'2.png': 'missing'}


@pytest.mark.parametrize(
    'text, problem',
    [
        ('<annotation><object>', r'1.xml is not valid XML: no element found'),
        ('<annotation><object><name>dog</name></object></annotation>', r'object 1 of .*1.xml has no bndbox with'),
        (
            '<annotation><object><name/><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox>'
            '</object></annotation>',
            '1 object of Pascal VOC is incomplete: object 1 of .*1.xml has no name',
        ),
    ],
)
def test_damaged_xml_files(text, problem, tmp_path):
    make_voc(tmp_path)
    put(tmp_path / 'Annotations/1.xml', text)
    with pytest.raises(ValueError, match=problem):
        load_splits(tmp_path)


def test_boxes_without_a_size_or_a_number(tmp_path):
    make_voc(tmp_path)
    xml(tmp_path / 'Annotations/2.xml', ('dog', (9, 9, 4, 12), 0), ('dog', ('nan', 1, 2, 2), 0), DOG)
    train, _ = load_splits(tmp_path)
    cleaned(train)
    assert train.degenerate == [
        '2.png annotation 4 [nan, 0, nan, 2] (not a number)',
        '2.png annotation 3 [8, 8, -4, 4] (no width or height)',
    ]


# ---- recognizing a format -------------------------------------------------------------------------------------------
def test_formats_are_recognized(tmp_path):
    make_yolo(tmp_path / 'yolo')
    make_voc(tmp_path / 'voc')
    write_coco(tmp_path / 'coco/train.json', tmp_path / 'coco/images')
    put(tmp_path / 'yolo/package.json', '{}')
    put(tmp_path / 'voc/settings.yaml', 'a: 1')
    for name in ('yolo', 'voc', 'coco'):
        assert recognize(tmp_path / name) == name
    assert recognize(tmp_path / 'yolo/data.yaml') == 'yolo' and recognize(tmp_path / 'coco/train.json') == 'coco'
    assert len(load_splits(tmp_path / 'voc/Annotations')) == 2


def test_several_formats_need_a_choice(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_yolo(tmp_path / 'data')
    make_voc(tmp_path / 'data')
    write_coco(tmp_path / 'data/train.json', tmp_path / 'data/images/train')
    said = sentence(['--data', 'data', '--dry-run'], capsys)
    assert 'data has annotations in several formats: YOLO (data/data.yaml), Pascal VOC (data), COCO ' in said
    assert '(data/train.json); choose one with --format NAME' in said
    assert len(load_splits(Path('data'), name='coco')) == 1
    assert [split.normalized for split in load_splits(Path('data'), name='yolo')] == [True, True]
    assert load_splits(Path('data'), name='voc')[0].notes


def test_hints(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_yolo(tmp_path / 'data')
    assert '--images does not apply to YOLO data' in sentence(['--data', 'data', '--images', 'data'], capsys)
    os.rename('data/data.yaml', 'data/info.txt')
    said = sentence(['--data', 'data'], capsys)
    assert 'has YOLO labels, such as data/labels/' in said and 'but no data.yaml; write one with path' in said
    make_voc(tmp_path / 'devkit/VOC2007')
    make_voc(tmp_path / 'devkit/VOC2012')
    said = sentence(['--data', 'devkit'], capsys)
    assert 'devkit has several data sets: devkit/VOC2007, devkit/VOC2012; choose one with --data DIR' in said
    assert 'devkit has no data.yaml annotations' in sentence(['--data', 'devkit', '--format', 'yolo'], capsys)
    assert '--format requires --data' in sentence(['config.py', '--format', 'voc'], capsys)


def test_validation_data_in_coco_format(tmp_path):
    make_yolo(tmp_path / 'mine')
    val = write_coco(tmp_path / 'other/val.json', tmp_path / 'other/images')
    splits = load_splits(tmp_path / 'mine', val)
    assert [(split.name, len(split.content['images'])) for split in splits] == [('train', 2), ('val', 2)]


@pytest.mark.parametrize('make', [make_yolo, make_voc])
def test_dry_run(make, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / 'mine')
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / 'mine').rglob('*')}
    assert main(['--data', 'mine', '--dry-run', '--workers', '0']) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / 'mine').rglob('*')}
    for split, images in (('train', 2), ('val', 1)):
        written = json.loads((tmp_path / f'work_dirs/mine/annotations/{split}.json').read_text())
        assert len(written['images']) == images and all(image['width'] == SIZE[0] for image in written['images'])
    assert 'training' in capsys.readouterr().out


def test_like_supervision(tmp_path):
    """Boxes as an independent reader gives them."""
    supervision = pytest.importorskip('supervision')
    rng = np.random.default_rng(0)
    for index in range(5):
        picture(tmp_path / f'images/{index}.png', (50 + index, 40))
        rows, objects = [], []
        for label in rng.integers(0, 2, 3):
            x, y, w, h = rng.uniform(0.2, 0.4, 4)
            rows.append(f'{label} {x:.6f} {y:.6f} {w:.6f} {h:.6f}')
            left, top, right, bottom = (int(v) for v in (*rng.integers(1, 10, 2), *rng.integers(20, 40, 2)))
            objects.append((('cat', 'dog')[label], (left, top, right, bottom), 0))
        put(tmp_path / f'labels/{index}.txt', '\n'.join(rows))
        xml(tmp_path / f'xml/{index}.xml', *objects, size=(50 + index, 40))
    put(tmp_path / 'data.yaml', 'train: images\nnames: [cat, dog]\n')
    folders = [str(tmp_path / name) for name in ('images', 'labels', 'xml')]
    readers = dict(
        yolo=supervision.DetectionDataset.from_yolo(folders[0], folders[1], str(tmp_path / 'data.yaml')),
        voc=supervision.DetectionDataset.from_pascal_voc(folders[0], folders[2]),
    )
    for name, theirs in readers.items():
        ours = {os.path.basename(k): v for k, v in cleaned(load_splits(tmp_path, name=name)[0]).items()}
        assert len(ours) == 5
        for path, _, detections in theirs:
            boxes = sorted((theirs.classes[k], *b) for k, b in zip(detections.class_id, detections.xyxy, strict=True))
            mine = sorted((label, x, y, x + w, y + h) for label, (x, y, w, h), _ in ours[os.path.basename(path)])
            assert [box[0] for box in mine] == [box[0] for box in boxes]
            np.testing.assert_allclose([box[1:] for box in mine], [box[1:] for box in boxes], atol=0.01)


@pytest.mark.slow
def test_trains_until_it_diverges(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_yolo(tmp_path / 'mine')
    options = ['--data', 'mine', '--image-size', '128', '--workers', '0', '--device', 'cpu', '--batch-size', '1']
    DetLocalVisualizer._instance_dict.clear()  # one per process, with the folder of the last training
    assert main([*options, '--epochs', '1', '--work-dir', 'good']) == 0
    assert json.loads(Path('good/metrics.json').read_text())['finished']
    DetLocalVisualizer._instance_dict.clear()
    capsys.readouterr()
    assert main([*options, '--epochs', '40', '--work-dir', 'bad', '--lr', '1e30']) == 1
    said = capsys.readouterr().err
    assert 'Traceback' not in said and said.count('msda_plugin train: stopped after 10 steps in a row') == 1
    assert re.search(r'images .*/mine/images/train/[01].png\); .*/stopped_iter_\d+.pth; --resume continues from', said)
    assert 'lower the learning rate' in said and len(list(Path('bad').glob('stopped_iter_*.pth'))) == 1
