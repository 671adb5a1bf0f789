"""The contact sheet of training images, before a training."""

import random

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from msda_plugin.tools import shapes, train
from msda_plugin.tools.custom_data import training_images
from msda_plugin.tools.custom_data.training_images import draw_training_images


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('training_images') / 'data'
    assert shapes.main(['--out', str(folder), '--train', '14', '--val', '2', '--size', '96']) == 0
    return folder


def make_config(data, transforms=(), mixing=()):
    dataset = dict(
        type='CocoDataset',
        metainfo=dict(classes=shapes.CLASSES),
        ann_file=str(data / 'annotations' / 'train.json'),
        data_prefix=dict(img=f'{data / "train"}/'),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True),
            *transforms,
            *([] if mixing else [dict(type='PackDetInputs')]),
        ],
    )
    if mixing:
        pipeline = [*mixing, dict(type='PackDetInputs')]
        dataset = dict(type='MultiImageMixDataset', dataset=dataset, pipeline=pipeline)
    return Config(dict(train_dataloader=dict(dataset=dataset), default_scope='mmdet', randomness=dict(seed=3)))


@pytest.fixture
def drawn(monkeypatch):
    """Arguments of the drawing."""
    calls = []

    def draw_contact_sheet(*args):
        calls.append(args)
        return np.zeros((2, 2, 3), np.uint8)

    monkeypatch.setattr(training_images, 'draw_contact_sheet', draw_contact_sheet)
    return calls


def test_images_are_as_the_model_gets_them(data, tmp_path, drawn):
    flipped = dict(type='RandomFlip', prob=1.0)
    for transforms in ((), (flipped,)):
        said = draw_training_images(make_config(data, transforms), tmp_path / 'sheet.png')
        assert said == f'training images: 12 examples with boxes, after augmentation: {tmp_path}/sheet.png'
    (plain, boxes, classes, captions), (mirrored, mirrored_boxes, *_) = drawn
    assert len(plain) == 12 and tuple(classes) == tuple(shapes.CLASSES)
    names = [caption.split(':')[0] for caption in captions]
    assert names == sorted(set(names)) and captions[0].endswith(f': 96×96, {len(boxes[0][0])} boxes')
    original = np.asarray(Image.open(data / 'train' / names[0]).convert('RGB'))
    np.testing.assert_array_equal(plain[0], original)
    np.testing.assert_array_equal(mirrored[0], original[:, ::-1])
    (before, labels), (after, _) = boxes[0], mirrored_boxes[0]
    np.testing.assert_allclose(
        after, np.column_stack([96 - before[:, 2], before[:, 1], 96 - before[:, 0], before[:, 3]])
    )
    assert len(labels) == len(before) > 0


@pytest.mark.parametrize('kind', ['Mosaic', 'CachedMosaic'])
def test_wrappers_of_the_dataset(data, tmp_path, drawn, kind):
    mosaic = dict(type=kind, img_scale=(64, 64), prob=1.0)
    assert '12 examples' in draw_training_images(make_config(data, mixing=[mosaic]), tmp_path / 'sheet.png')
    ((images, *_),) = drawn
    assert {image.shape for image in images} == {(128, 128, 3)}


def test_pixels_beyond_bytes(data, tmp_path, drawn):
    normalize = dict(type='Normalize', mean=[120.0] * 3, std=[60.0] * 3, to_rgb=False)
    distort = dict(type='PhotoMetricDistortion', brightness_delta=90)
    for transform in (normalize, distort):
        assert '12 examples' in draw_training_images(make_config(data, [transform]), tmp_path / 'sheet.png')
    for images, *_ in drawn:
        assert all(image.dtype == np.uint8 and np.ptp(image) > 100 for image in images)


def test_the_training_keeps_its_random_numbers(data, tmp_path):
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    flip = dict(type='RandomFlip', prob=0.5)
    for name in 'ab':
        draw_training_images(make_config(data, [flip]), tmp_path / f'{name}.png')
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[2])
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])
    assert (tmp_path / 'a.png').read_bytes() == (tmp_path / 'b.png').read_bytes()


def test_a_failure_is_said(data, tmp_path):
    crop = dict(type='RandomCrop', crop_size=(-1, 4))
    said = draw_training_images(make_config(data, [crop]), tmp_path / 'sheet.png')
    assert said.startswith('training images: not drawn, because of AssertionError')
    assert not (tmp_path / 'sheet.png').exists()


def test_train_data_draws_them(data, tmp_path, capsys):
    argv = ['--data', str(data), '--work-dir', str(tmp_path), '--workers', '0', '--dry-run', '--device', 'cpu']
    assert train.main(argv) == 0
    printed = capsys.readouterr().out
    assert f'12 examples with boxes, after augmentation: {tmp_path}/training_images.png' in printed
    assert 'loading annotations' not in printed  # pycocotools
    assert np.asarray(Image.open(tmp_path / 'training_images.png')).shape[1] == 4 * 320 + 5 * 12
