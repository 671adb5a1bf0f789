"""The generated data set: valid COCO, deterministic, complete or absent."""

import json

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from msda_plugin.tools import shape_images, shapes


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp('shapes') / 'data'
    assert shapes.generate(out, train=30, val=12, size=(96, 64), seed=3)
    return out


@pytest.mark.parametrize('split, count', [('train', 30), ('val', 12)])
def test_is_valid_coco(data, split, count):
    coco = COCO(data / 'annotations' / f'{split}.json')
    assert [c['name'] for c in coco.loadCats(sorted(coco.getCatIds()))] == list(shapes.CLASSES)
    assert len(coco.imgs) == count
    for info in coco.imgs.values():
        image = cv2.imread(str(data / split / info['file_name']))
        assert image.shape == (64, 96, 3) == (info['height'], info['width'], 3)
    assert coco.anns
    for annotation in coco.anns.values():
        x, y, w, h = annotation['bbox']
        assert x >= 0 and y >= 0 and x + w <= 96 and y + h <= 64
        assert annotation['iscrowd'] == 0
        mask = coco.annToMask(annotation)
        assert mask.sum() == annotation['area'] > 0
        # The mask fills the box, apart from tips thinner than half a pixel.
        mx, my, mw, mh = coco_mask.toBbox(coco_mask.encode(np.asfortranarray(mask)))
        margin = np.array([mx - x, my - y, x + w - mx - mw, y + h - my - mh])
        assert margin.min() >= -0.5 and margin.max() <= 3


def test_same_seed_same_bytes(data, tmp_path):
    shapes.generate(tmp_path / 'again', train=30, val=12, size=(96, 64), seed=3)
    assert files_of(tmp_path / 'again') == files_of(data)
    shapes.generate(tmp_path / 'other', train=30, val=12, size=(96, 64), seed=4)
    assert (tmp_path / 'other' / 'train' / '00000.jpg').read_bytes() != (data / 'train' / '00000.jpg').read_bytes()


def test_val_is_independent_of_train(data, tmp_path):
    shapes.generate(tmp_path / 'less', train=2, val=12, size=(96, 64), seed=3)
    less, more = files_of(tmp_path / 'less'), files_of(data)
    assert all(less[name] == more[name] for name in more if 'val' in name)
    assert more['train/00000.jpg'] != more['val/00000.jpg']


def test_variety():
    drawn = [shapes.draw_image((0, index))[1] for index in range(300)]
    counts = np.array([len(annotations) for annotations in drawn])
    assert counts.min() == 0 and 0.02 < (counts == 0).mean() < 0.1 and counts.max() == shape_images.MAX_OBJECTS
    everything = [annotation for annotations in drawn for annotation in annotations]
    share = np.bincount([a.label for a in everything], minlength=len(shapes.CLASSES)) / len(everything)
    assert share.min() > 0.12 and share.max() < 0.22
    extent = np.array([max(a.box[2:]) for a in everything])
    assert extent.min() < 13 and 60 < extent.max() <= 80
    overlapping = sum(
        _overlap(a.box, b.box) for annotations in drawn for a in annotations for b in annotations if a is not b
    )
    assert overlapping > 100


def _overlap(a, b):
    return all(min(a[i] + a[i + 2], b[i] + b[i + 2]) > max(a[i], b[i]) for i in (0, 1))


def test_colors_are_independent_of_the_class():
    colors = [[] for _ in shapes.CLASSES]
    for index in range(250):
        image, annotations = shapes.draw_image((1, index))
        for annotation in annotations:
            colors[annotation.label].append(image[annotation.mask].mean(axis=0))
    means = np.stack([np.mean(c, axis=0) for c in colors])
    assert np.ptp(means, axis=0).max() < 30
    assert all(np.std(c, axis=0).min() > 40 for c in colors)


def test_objects_contrast_with_their_surroundings():
    contrast = []
    for index in range(60):
        image, annotations = shapes.draw_image((2, index))
        covered = np.any([a.mask for a in annotations], axis=0) if annotations else np.zeros(image.shape[:2], bool)
        for annotation in annotations:
            near = cv2.dilate(annotation.mask.astype(np.uint8), np.ones((9, 9))).astype(bool) & ~covered
            if near.sum() > 20:
                contrast.append(np.linalg.norm(image[annotation.mask].mean(axis=0) - image[near].mean(axis=0)))
    assert np.quantile(contrast, 0.05) > 40


def test_existing_data_is_not_rewritten(data):
    before = {path: path.stat().st_mtime_ns for path in data.rglob('*')}
    assert shapes.generate(data, train=30, val=12, size=(96, 64), seed=3) is False
    assert {path: path.stat().st_mtime_ns for path in data.rglob('*')} == before


def test_other_parameters_need_force(tmp_path):
    out = tmp_path / 'data'
    shapes.generate(out, train=3, val=2, size=(32, 32))
    with pytest.raises(FileExistsError, match='other parameters; pass --force'):
        shapes.generate(out, train=4, val=2, size=(32, 32))
    assert len(list((out / 'train').iterdir())) == 3
    assert shapes.generate(out, train=4, val=2, size=(32, 32), force=True)
    assert len(list((out / 'train').iterdir())) == 4
    assert list(tmp_path.iterdir()) == [out]


def test_missing_files(tmp_path):
    shapes.generate(tmp_path / 'data', train=3, val=2, size=(32, 32))
    (tmp_path / 'data' / 'train' / '00001.jpg').unlink()
    with pytest.raises(FileExistsError, match='missing files'):
        shapes.generate(tmp_path / 'data', train=3, val=2, size=(32, 32))


@pytest.mark.parametrize('force', [False, True])
def test_other_folders_are_not_overwritten(tmp_path, force):
    (tmp_path / 'thesis.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='not a shapes data set'):
        shapes.generate(tmp_path, train=1, val=1, force=force)
    assert (tmp_path / 'thesis.txt').read_text() == 'mine'


def test_interrupted_run_leaves_no_files(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shapes.generate(tmp_path / 'data', train=3, val=2, tick=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_command(tmp_path, capsys):
    arguments = ['--out', str(tmp_path / 'data'), '--train', '2', '--val', '1', '--size', '64x48', '--seed', '5']
    assert shapes.main(arguments) == 0
    assert capsys.readouterr().out.startswith('wrote')
    assert shapes.main(arguments) == 0
    assert capsys.readouterr().out.startswith('already exists')
    info = json.loads((tmp_path / 'data' / 'annotations' / 'train.json').read_text())['images'][0]
    assert (info['width'], info['height']) == (64, 48)


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--size', '8'], 'size must have sides of 32 to 2048 pixels, got 8x8'),
        (['--train', '0'], 'train must be at least 1 image, got 0'),
        (['--seed', '-1'], 'seed must not be negative, got -1'),
    ],
)
def test_invalid_values(tmp_path, capsys, arguments, message):
    assert shapes.main(['--out', str(tmp_path / 'data'), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err == f'error: {message}\n' and captured.out == ''
    assert not (tmp_path / 'data').exists()


def test_invalid_size(capsys):
    with pytest.raises(SystemExit):
        shapes.main(['--out', 'x', '--size', 'big'])
    assert "expected a side such as 128 or WIDTHxHEIGHT such as 160x128, got 'big'" in capsys.readouterr().err


def test_unwritable_folder(tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    assert shapes.main(['--out', str(tmp_path / 'file' / 'data'), '--train', '1', '--val', '1']) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: cannot write to') and error.count('\n') == 1
