"""The generated scenes: valid COCO, deterministic, varied, annotated where an object is visible."""

import json

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from msda_plugin.tools import scene_images, shapes


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp('scenes') / 'data'
    assert shapes.generate(out, train=6, val=4, size=(160, 128), seed=3, kind='scenes')
    return out


@pytest.fixture(scope='module')
def drawn():
    return [scene_images.draw_image((0, index), (320, 320)) for index in range(120)]


@pytest.mark.parametrize('split, count', [('train', 6), ('val', 4)])
def test_is_valid_coco(data, split, count):
    coco = COCO(data / 'annotations' / f'{split}.json')
    assert tuple(c['name'] for c in coco.loadCats(sorted(coco.getCatIds()))) == scene_images.CLASSES
    assert len(coco.imgs) == count and coco.anns
    for info in coco.imgs.values():
        image = cv2.imread(str(data / split / info['file_name']))
        assert image.shape == (128, 160, 3) == (info['height'], info['width'], 3)
    for annotation in coco.anns.values():
        x, y, w, h = annotation['bbox']
        mask = coco.annToMask(annotation)
        assert mask.sum() == annotation['area'] >= scene_images.MIN_PIXELS
        assert cv2.boundingRect(mask) == (x, y, w, h)


def test_same_seed_same_bytes(data, tmp_path):
    shapes.generate(tmp_path / 'less', train=2, val=4, size=(160, 128), seed=3, kind='scenes')
    for name in ('train/00001.jpg', 'val/00003.jpg', 'annotations/val.json'):
        assert (tmp_path / 'less' / name).read_bytes() == (data / name).read_bytes()
    other, _ = scene_images.draw_image((4, 0, 0), (160, 128))
    same, _ = scene_images.draw_image((3, 0, 0), (160, 128))
    assert not np.array_equal(other, same)


def test_variety(drawn):
    counts = np.array([len(annotations) for _, annotations in drawn])
    assert counts.min() == 0 and (counts == 0).mean() < 0.15 and 20 < counts.max() <= scene_images.MAX_OBJECTS
    everything = [annotation for _, annotations in drawn for annotation in annotations]
    assert len({a.label for a in everything}) == len(scene_images.CLASSES) == 42
    sides = np.array([max(a.box[2:]) for a in everything])
    assert np.quantile(sides, 0.1) < 20 and sides.max() > 200
    means = np.stack([image.mean(axis=(0, 1)) for image, _ in drawn])
    assert means.std(axis=0).min() > 30


def test_occlusion_is_limited(drawn):
    """Masks never overlap, boxes do; each object still shows enough of itself."""
    overlapping = 0
    for image, annotations in drawn:
        owned = np.sum([a.mask for a in annotations], axis=0) if annotations else np.zeros(image.shape[:2])
        assert owned.max() <= 1
        for annotation in annotations:
            x, y, w, h = annotation.box
            assert annotation.mask.sum() >= scene_images.MIN_PIXELS
            assert annotation.mask[y : y + h, x : x + w].sum() == annotation.mask.sum()
            others = owned[y : y + h, x : x + w].sum() - annotation.mask.sum()
            overlapping += others > 0
    assert overlapping > 200


def test_colors_are_independent_of_the_class(drawn):
    colors = [[] for _ in scene_images.SHAPES]
    for image, annotations in drawn:
        for a in annotations:
            colors[a.label // len(scene_images.TEXTURES)].append(image[a.mask].mean(axis=0))
    assert all(np.std(c, axis=0).min() > 30 for c in colors)


@pytest.mark.parametrize('size', [(32, 32), (64, 300), (601, 48)])
def test_any_size(size):
    for index in range(12):
        image, annotations = scene_images.draw_image(index, size)
        assert image.shape == (size[1], size[0], 3) and image.dtype == np.uint8
        assert all(a.mask.shape == (size[1], size[0]) for a in annotations)


def test_command(tmp_path, capsys):
    arguments = ['--out', str(tmp_path / 'data'), '--train', '2', '--val', '1', '--size', '64x48']
    assert shapes.main([*arguments, '--kind', 'scenes']) == 0
    assert capsys.readouterr().out.startswith('wrote')
    assert shapes.main([*arguments, '--kind', 'scenes']) == 0
    assert capsys.readouterr().out.startswith('already exists')
    info = json.loads((tmp_path / 'data' / 'annotations' / 'train.json').read_text())
    assert info['info']['description'] == 'msda_plugin scenes, train'
    # The other kind does not replace it unasked.
    assert shapes.main(arguments) == 2
    assert 'contains a scenes data set with other parameters; pass --force' in capsys.readouterr().err


def test_unknown_kind(tmp_path):
    with pytest.raises(ValueError, match="kind must be one of shapes, scenes, got 'photos'"):
        shapes.generate(tmp_path / 'data', kind='photos')
