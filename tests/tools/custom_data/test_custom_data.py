"""``train --data``: layouts, check of the data, config, training and error messages."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import PARAM_SCHEDULERS
from PIL import Image

from msda_plugin.engine.data_check import check_coco
from msda_plugin.engine.hooks import AccelerateHook
from msda_plugin.engine.model_zoo import Model, find_model
from msda_plugin.tools.common import mixed_precision
from msda_plugin.tools.custom_data import budget, training
from msda_plugin.tools.custom_data import coco as coco_files
from msda_plugin.tools.custom_data.config import DEFAULT_MODEL, Choices, Data, build_config
from msda_plugin.tools.shapes import CLASSES as SHAPES
from msda_plugin.tools.shapes import generate
from msda_plugin.tools.train import _parser, main

CLASSES = ('cat', 'dog')
NAN = float('nan')


def coco(names=('0.jpg', '1.jpg', '2.jpg'), classes=CLASSES):
    """COCO content with one box of each class in each image but the last."""
    boxes = [(image, label) for image in range(len(names) - 1) for label in range(len(classes))]
    return dict(
        images=[dict(id=i, file_name=name, width=64, height=48) for i, name in enumerate(names)],
        annotations=[
            dict(id=k, image_id=image, category_id=10 + label, bbox=[4, 4, 20, 10], area=200, iscrowd=0)
            for k, (image, label) in enumerate(boxes)
        ],
        categories=[dict(id=10 + label, name=name) for label, name in enumerate(classes)],
    )


def write(ann_file, images, content=None):
    content = content or coco()
    ann_file.parent.mkdir(parents=True, exist_ok=True)
    ann_file.write_text(json.dumps(content))
    for image in content['images']:
        path = images / image['file_name']
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (64, 48)).save(path)
    return ann_file


def load(folder, content=None):
    return coco_files.load_split('train', write(folder / 'train.json', folder / 'images', content), folder)


def sentence(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(part) for part in argv])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert 'Traceback' not in message
    return message


# ---- finding the files ----------------------------------------------------------------------------------------------
LAYOUTS = {
    'one folder of images': {
        'train': ('train.json', 'images'),
        'val': ('val.json', 'images'),
        'test': ('test.json', 'images'),
    },
    'COCO': {
        'train': ('annotations/instances_train2017.json', 'train2017'),
        'val': ('annotations/instances_val2017.json', 'val2017'),
    },
    'COCO, folders of images together': {
        'train': ('annotations/train.json', 'images/train'),
        'val': ('annotations/val.json', 'images/val'),
    },
    'Roboflow': {
        split: (f'{folder}/_annotations.coco.json', folder)
        for split, folder in (('train', 'train'), ('val', 'valid'), ('test', 'test'))
    },
    'one file': {'train': ('annotations/instances_default.json', 'images')},
    'images next to the one file': {'train': ('labels.json', '.')},
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_layouts(layout, tmp_path):
    for ann_file, images in LAYOUTS[layout].values():
        write(tmp_path / ann_file, tmp_path / images)
    found = coco_files.find_annotations(tmp_path)
    assert found == {split: tmp_path / ann_file for split, (ann_file, _) in LAYOUTS[layout].items()}
    for split, (_, images) in LAYOUTS[layout].items():
        loaded = coco_files.load_split(split, found[split], tmp_path)
        assert loaded.images.resolve() == (tmp_path / images).resolve()


def test_ignores_captions_and_other_json_files(tmp_path):
    for name in ('instances', 'person_keypoints', 'captions'):
        write(tmp_path / f'annotations/{name}_train2017.json', tmp_path / 'train2017')
    (tmp_path / 'settings.json').write_text('{}')
    assert coco_files.find_annotations(tmp_path) == {'train': tmp_path / 'annotations/instances_train2017.json'}


def test_annotation_file_with_siblings(tmp_path):
    for name in ('train.json', 'val.json', 'other_val.json', 'all.json'):
        write(tmp_path / name, tmp_path)
    assert coco_files.find_annotations(tmp_path / 'train.json') == {
        'train': tmp_path / 'train.json',
        'val': tmp_path / 'val.json',
    }
    assert coco_files.find_annotations(tmp_path / 'all.json') == {'train': tmp_path / 'all.json'}
    assert coco_files.find_annotations(tmp_path / 'train.json', tmp_path / 'other_val.json')['val'].name.startswith(
        'oth'
    )


def test_several_or_no_annotation_files(tmp_path):
    (tmp_path / 'readme.json').write_text('{}')
    with pytest.raises(FileNotFoundError, match=r'no annotation file .*JSON files: readme.json.*--data FILE'):
        coco_files.find_annotations(tmp_path)
    for name in ('a', 'b'):
        write(tmp_path / f'{name}.json', tmp_path)
    with pytest.raises(ValueError, match=r'several annotation files for training: a.json, b.json; .* --data FILE'):
        coco_files.find_annotations(tmp_path)
    with pytest.raises(FileNotFoundError, match='--data .*nowhere does not exist'):
        coco_files.find_annotations(tmp_path / 'nowhere')


def test_missing_images(tmp_path):
    write(tmp_path / 'data/train.json', tmp_path / 'elsewhere')
    with pytest.raises(FileNotFoundError, match=r'none of the images .* \(such as 0.jpg\) .* --images DIR'):
        coco_files.load_split('train', tmp_path / 'data/train.json', tmp_path / 'data')
    assert coco_files.load_split(
        'train', tmp_path / 'data/train.json', tmp_path / 'data', tmp_path / 'elsewhere'
    ).images


# ---- records and images ---------------------------------------------------------------------------------------------
def test_good_data_is_unchanged(tmp_path):
    split = load(tmp_path)
    coco_files.clean(split, coco_files.choose_classes(split))
    assert not split.changed and coco_files.write(split, tmp_path / 'work') == tmp_path / 'train.json'


def test_missing_fields_are_added(tmp_path):
    content = coco()
    for image in content['images']:
        del image['width'], image['height']
    for annotation in content['annotations']:
        del annotation['area'], annotation['iscrowd'], annotation['id']
    content['annotations'] += [
        dict(image_id=99, category_id=10, bbox=[0, 0, 5, 5]),
        dict(image_id=0, category_id=99, bbox=[0, 0, 5, 5]),
    ]
    split = load(tmp_path, content)
    coco_files.clean(split, coco_files.choose_classes(split))
    path = coco_files.write(split, tmp_path / 'work')
    report = check_coco(path, split.images, CLASSES, evaluated=True)
    assert (report.num_images, report.num_boxes, report.warnings) == (3, 4, ())
    written = json.loads(path.read_text())
    assert [(i['width'], i['height']) for i in written['images']] == [(64, 48)] * 3
    assert [a['area'] for a in written['annotations']] == [200] * 4
    assert split.notes == ['1 annotation of unlisted images left out', '1 annotation of unlisted categories left out']


def test_categories_are_reordered_and_unused_ones_dropped(tmp_path):
    train = load(tmp_path, coco(classes=('none', *CLASSES)))
    train.content['annotations'] = [a for a in train.content['annotations'] if a['category_id'] != 10]
    classes = coco_files.choose_classes(train)
    assert classes == CLASSES and train.notes == ['categories left out, no training boxes: none']
    val = coco_files.load_split(
        'val', write(tmp_path / 'val.json', tmp_path / 'images', coco(classes=('dog', 'cat'))), tmp_path
    )
    before = coco_files.count_boxes(val)
    for split in (train, val):
        coco_files.clean(split, classes)
        assert [category['name'] for category in split.content['categories']] == list(CLASSES)
    assert coco_files.count_boxes(val) == before
    assert check_coco(coco_files.write(val, tmp_path / 'work'), val.images, CLASSES).warnings == ()


def test_classes_by_name(tmp_path):
    split = load(tmp_path)
    assert coco_files.choose_classes(split, ['dog']) == ('dog',)
    coco_files.clean(split, ['dog'])
    assert coco_files.count_boxes(split) == {'dog': 2}
    with pytest.raises(ValueError, match='--classes contains bird, but the categories of .* are dog'):
        coco_files.choose_classes(split, ['bird'])
    split.content['categories'] *= 2
    with pytest.raises(ValueError, match="several categories named 'dog'"):
        coco_files.choose_classes(split)
    split = load(tmp_path, {**coco(), 'annotations': []})
    with pytest.raises(ValueError, match='has no box of the classes cat, dog'):
        coco_files.choose_classes(split)


def test_bad_images_and_wrong_sizes(tmp_path):
    split = load(tmp_path, coco([f'{i}.jpg' for i in range(5)]))
    (split.images / '0.jpg').write_text('no image')
    (split.images / '1.jpg').unlink()
    Image.new('RGB', (48, 64)).save(split.images / '2.jpg')
    coco_files.clean(split, CLASSES)
    assert split.bad_images == {'0.jpg': 'unreadable', '1.jpg': 'missing'} and len(split.content['images']) == 5
    assert split.notes == ['1 image differs in size from the annotation file, so its boxes may be wrong: 2.jpg']
    coco_files.clean(split, CLASSES, skip_bad_images=True)
    assert [image['id'] for image in split.content['images']] == [2, 3, 4]
    assert {a['image_id'] for a in split.content['annotations']} == {2, 3} and split.changed


def test_every_finding_is_listed(tmp_path):
    content = coco([f'{i}.jpg' for i in range(12)])
    boxes = [[4, 4, 0, 9], [4, 4, 9, -2], [64, 4, 9, 9], [NAN, 4, 9, 9], [4, 4, 9, float('inf')], [4, 4, 0.5, 9]]
    for annotation, box in zip(content['annotations'][-6:], boxes, strict=True):
        annotation.update(bbox=box, area=box[2] * box[3])
    content['images'][10]['width'] = content['images'][10]['height'] = 10
    split = load(tmp_path, content)
    for index in range(2):
        (split.images / f'{index}.jpg').unlink()
    (split.images / '2.jpg').write_bytes(b'')
    (split.images / '3.jpg').write_text('no image')
    complete = (split.images / '4.jpg').read_bytes()
    (split.images / '4.jpg').write_bytes(complete[: len(complete) // 2])
    coco_files.clean(split, CLASSES)
    assert split.bad_images == {
        '0.jpg': 'missing',
        '1.jpg': 'missing',
        '2.jpg': 'empty',
        '3.jpg': 'unreadable',
        '4.jpg': 'unreadable',
    }
    coco_files.write_report([split], tmp_path / 'new/data_report.txt')
    assert (
        (tmp_path / 'new/data_report.txt').read_text()
        == f"""\
training: {tmp_path}/train.json, images in {split.images}
  2 missing images
    0.jpg
    1.jpg
  1 empty image
    2.jpg
  2 unreadable images
    3.jpg
    4.jpg
  1 image without a box
    11.jpg
  6 degenerate boxes
    9.jpg annotation 19 [nan, 4, 9, 9] (not a number)
    10.jpg annotation 20 [4, 4, 9, inf] (not a number)
    8.jpg annotation 16 [4, 4, 0, 9] (no width or height)
    8.jpg annotation 17 [4, 4, 9, -2] (no width or height)
    9.jpg annotation 18 [64, 4, 9, 9] (outside the image)
    10.jpg annotation 21 [4, 4, 0.5, 9] (under one pixel)
"""
    )
    said = coco_files.describe([split], CLASSES, Path('work/data_report.txt')).splitlines()
    assert '  2 missing images: 0.jpg, 1.jpg' in said and said[-1] == 'complete lists: work/data_report.txt'
    assert [line for line in said if line.startswith('  6 degenerate boxes: 9.jpg ') and line.endswith(' and 3 more')]
    assert '  note: 2 NaN or infinite boxes left out' in said
    written = json.loads(coco_files.write(split, tmp_path / 'work').read_text())
    assert [a['id'] for a in written['annotations']] == [id for id in range(22) if id not in (19, 20)]
    # A part that becomes the validation data takes its findings along.
    val = coco_files.split_off(split, 0.5, 0)
    for one in (split, val):
        names = {image['file_name'] for image in one.content['images']}
        assert set(one.bad_images) <= names and {line.split()[0] for line in one.degenerate} <= names
    assert len(split.bad_images) + len(val.bad_images) == 5 and len(split.degenerate) + len(val.degenerate) == 6


def test_images_with_another_extension_or_case(tmp_path):
    split = load(tmp_path, coco(['a.jpg', 'b.jpg', 'c.jpg', 'd.jpg', 'sub/e.jpg', 'f.jpg', 'g.jpg']))
    for old, new in (('a.jpg', 'A.JPG'), ('b.jpg', 'b.png'), ('c.jpg', 'c.JPG'), ('d.jpg', 'd.png'), ('sub', 'Sub')):
        (split.images / old).rename(split.images / new)
    Image.new('RGB', (64, 48)).save(split.images / 'c.png')  # a mask, beside the image in other case
    Image.new('RGB', (64, 48)).save(split.images / 'd.bmp')
    (split.images / 'f.jpg').rename(split.images / 'f.txt')
    (split.images / 'g.jpg').rename(split.images / 'g.png')
    split.content['images'].append(dict(id=9, file_name='g.png', width=64, height=48))  # has a record of its own
    coco_files.clean(split, CLASSES)
    assert split.renamed == {'a.jpg': 'A.JPG', 'b.jpg': 'b.png', 'c.jpg': 'c.JPG', 'sub/e.jpg': 'Sub/e.jpg'}
    assert split.bad_images == {'d.jpg': 'missing, but there are d.bmp, d.png', 'f.jpg': 'missing', 'g.jpg': 'missing'}
    assert split.changed and split.notes[0] == (
        '4 images found under another extension or case: A.JPG for a.jpg, b.png for b.jpg, c.JPG for c.jpg and 1 more'
    )
    assert '3 missing images: d.jpg (missing, but there are d.bmp, d.png), f.jpg' in coco_files.describe(
        [split], CLASSES
    )


def test_a_folder_with_other_extensions_only(tmp_path):
    write(tmp_path / 'train.json', tmp_path / 'pictures')
    for path in (tmp_path / 'pictures').iterdir():
        path.rename(path.with_suffix('.JPEG'))
    split = coco_files.load_split('train', tmp_path / 'train.json', tmp_path)
    assert split.images == tmp_path / 'pictures'
    coco_files.clean(split, CLASSES)
    assert [image['file_name'] for image in split.content['images']] == ['0.JPEG', '1.JPEG', '2.JPEG']
    assert not split.bad_images


def test_description(tmp_path):
    content = coco()
    content['annotations'][0]['bbox'] = [4, 4, 0, 9]
    split = load(tmp_path, content)
    coco_files.clean(split, CLASSES)
    rows = [line.split() for line in coco_files.describe([split], CLASSES).splitlines()]
    for row in (
        ['training'],
        ['images', '3'],
        ['without', 'a', 'box', '1'],
        ['missing', 'or', 'unreadable', '0'],
        ['boxes', '4'],
        ['degenerate,', 'not', 'used', '1'],
        ['cat', '2'],
        ['dog', '2'],
    ):
        assert row in rows


def test_split_off_validation_images(tmp_path):
    names = [f'{i}.jpg' for i in range(20)]

    def split_images(names, part=0.2, seed=0):
        train = load(tmp_path, coco(names))
        val = coco_files.split_off(train, part, seed)
        sets = [{image['file_name'] for image in split.content['images']} for split in (train, val)]
        assert not sets[0] & sets[1] and sets[0] | sets[1] == set(names)
        for split in (train, val):
            ids = {image['id'] for image in split.content['images']}
            assert {a['image_id'] for a in split.content['annotations']} <= ids and split.changed
        assert len(train.content['annotations']) + len(val.content['annotations']) == 2 * (len(names) - 1)
        return sets[1]

    chosen = split_images(names)
    assert len(chosen) == 4 and chosen == split_images(names[::-1]) != split_images(names, seed=1)
    assert len(split_images(names[:2], 0.01)) == 1 == len(split_images(names[:2], 0.99))
    with pytest.raises(ValueError, match='has 1 image, but'):
        coco_files.split_off(load(tmp_path, coco(names[:1])), 0.2, 0)
    with pytest.raises(ValueError, match='--val-part must be between 0 and 1, such as 0.2, got 20'):
        coco_files.split_off(load(tmp_path), 20, 0)


# ---- the config -----------------------------------------------------------------------------------------------------
def config(model=DEFAULT_MODEL, classes=CLASSES, most_boxes=5, num_images=100, **choices):
    files = {split: (Path(f'/data/{split}.json'), Path('/data/images')) for split in ('train', 'val')}
    return build_config(
        find_model(model).config, Data(files, classes, num_images, most_boxes), Choices(work_dir='work', **choices)
    )


def test_learning_rate_scales_with_batch():
    for batch, accumulate, factor in ((4, 1, 1), (1, 1, 0.5), (4, 4, 2), (16, 4, 4)):
        cfg, notes = config(batch_size=batch, accumulate=accumulate)
        assert cfg.optim_wrapper.optimizer.lr == pytest.approx(4e-4 * factor)
        assert cfg.optim_wrapper.get('accumulative_counts', 1) == accumulate
        assert cfg.train_dataloader.batch_size == batch == cfg.auto_scale_lr.base_batch_size
        assert any(f'√({batch * accumulate} / 4)' in note for note in notes)
    assert config(batch_size=64, lr=1e-3)[0].optim_wrapper.optimizer.lr == 1e-3


def test_learning_rate_of_sgd_is_proportional_to_the_batch(tmp_path):
    path = tmp_path / 'sgd.py'
    path.write_text(
        "model = dict(type='X', bbox_head=dict(type='Y', num_classes=80))\ntrain_dataloader = dict(batch_size=16)\n"
        "optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.02))\n"
    )
    cfg, notes = config(str(path), batch_size=4)
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(0.005)
    assert 'learning rate: 0.005 = 0.02 × 4 / 16, scaled to the batch size' in notes


def test_learning_rate_does_not_grow_without_a_limit():
    cfg, notes = config(batch_size=100)
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(16e-4)
    said = 'learning rate: 0.0016 = 0.0004 × 4, the maximum; the batch size alone gives √(100 / 4); set another'
    assert any(said in note for note in notes)


def test_batch_is_not_larger_than_the_data_set():
    cfg, notes = config(batch_size=100_000, num_images=9)
    assert cfg.train_dataloader.batch_size == cfg.val_dataloader.batch_size == 9
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(6e-4)
    assert notes[0] == 'batch size: 9 instead of 100000, because there are 9 training images'
    cfg, notes = config(batch_size=4, accumulate=100, num_images=10)  # an epoch has 3 iterations
    assert cfg.optim_wrapper.accumulative_counts == 3 and 'batch size: 12 instead of 400' in notes[0]
    assert not [note for note in config(batch_size=10, num_images=10)[1] if 'instead of' in note]


def rates(cfg, iterations):
    """The learning rate of each iteration, with the schedulers of a config."""
    wrapper = OptimWrapper(torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0))
    epoch_length = iterations // cfg.train_cfg.max_epochs
    schedulers = [
        PARAM_SCHEDULERS.build(scheduler, default_args=dict(optimizer=wrapper, epoch_length=epoch_length))
        for scheduler in cfg.param_scheduler
    ]
    found = []
    for _ in range(iterations):
        found.append(wrapper.param_groups[0]['lr'])
        for scheduler in schedulers:
            scheduler.step()
    return found


@pytest.mark.parametrize('epochs, images', [(1, 3), (1, 4), (2, 8), (4, 16), (19, 4), (5, 16), (10, 40)])
def test_warm_up_ends_within_the_training(epochs, images):
    cfg, _ = config(epochs=epochs, num_images=images, batch_size=4)
    found = rates(cfg, epochs * -(-images // 4))
    assert max(found) > 0.9 and (found[0] == 1.0) == (len(found) < 20)


def test_model_settings_from_data():
    cfg, _ = config()
    assert cfg.model.bbox_head.num_classes == 2 and cfg.model.num_queries == 300
    assert cfg.val_evaluator.ann_file == cfg.test_evaluator.ann_file == '/data/val.json'
    cfg, notes = config(classes=('cat',), most_boxes=310)
    assert cfg.model.num_queries == 620 and any('up to 310 boxes' in note for note in notes)


def test_queries_fit_into_small_images():
    cfg, notes = config(classes=('cat',), image_size=(96, 96))
    assert cfg.model.num_queries == 57 and any('57 instead of 300' in note for note in notes)
    # At most queries × classes predictions.
    assert cfg.model.test_cfg.max_per_img == 57


def test_duplicates_are_suppressed_and_classes_are_evaluated():
    cfg, notes = config()
    assert cfg.model.test_cfg.nms == dict(type='nms', iou_threshold=0.7)
    assert any('non-maximum suppression: on' in note and '--no-nms' in note for note in notes)
    assert cfg.val_evaluator.classwise and cfg.test_evaluator.classwise
    cfg, notes = config('mmdet-deformable-detr-two-stage_r18')  # its head has none
    assert 'nms' not in cfg.model.test_cfg and not any('suppression' in note for note in notes)


def test_complete_config_provides_optimizer_and_image_size():
    cfg, _ = config('deformable-detr-two-stage_shunted-nano_1xb4-8e_shapes', batch_size=8)
    lr = pytest.approx(5e-4 * 2**0.5, rel=1e-3)  # of 4 images
    assert cfg.optim_wrapper.optimizer == dict(type='AdamW', lr=lr, weight_decay=1e-4, fused=True)
    (resize,) = [step for step in cfg.test_dataloader.dataset.pipeline if step['type'] == 'Resize']
    assert tuple(resize['scale']) == (128, 128) and cfg.model.num_queries == 40
    assert 'data_root' not in cfg and cfg.train_cfg.max_epochs == 100 and 'mmdet' == cfg.default_scope


def test_image_size_and_schedule():
    cfg, _ = config(image_size=(320, 240), epochs=30, num_images=8, workers=0)
    for dataset, kind in ((cfg.train_dataloader.dataset, 'RandomResize'), (cfg.val_dataloader.dataset, 'Resize')):
        (resize,) = [step for step in dataset.pipeline if step['type'] == kind]
        assert tuple(resize['scale']) == (320, 240)
    warm_up, cosine = cfg.param_scheduler
    assert (warm_up.end, cosine.T_max, cosine.end, cfg.train_cfg.val_interval) == (6, 30, 30, 3)
    assert not cfg.train_dataloader.persistent_workers


@pytest.mark.parametrize('device, model, amp, expected', [
    (None, DEFAULT_MODEL, None, 'bfloat16'),
    ('cpu', DEFAULT_MODEL, None, 'bfloat16'),
    ('cuda', DEFAULT_MODEL, None, None),
    ('cpu', 'mmdet-deformable-detr-two-stage_r18', None, None),
    ('cpu', 'mmdet-deformable-detr-two-stage_r18', True, 'bfloat16'),
    ('cpu', DEFAULT_MODEL, False, None),
    ('cuda', DEFAULT_MODEL, True, 'float16'),
])  # fmt: skip
def test_mixed_precision(device, model, amp, expected, monkeypatch):
    monkeypatch.setattr(mixed_precision, 'get_device', lambda: 'cpu')
    monkeypatch.setattr(mixed_precision, 'cpu_has_bfloat16', lambda: True)

    def precision():
        cfg, notes = config(model, device=device, amp=amp)
        found = ['float16'] if cfg.optim_wrapper.type == 'AmpOptimWrapper' else []
        found += [hook.training_dtype for hook in cfg.custom_hooks if hook.type == 'msda_plugin.AccelerateHook']
        assert len(found) == sum('--no-amp' in note for note in notes)
        return found[0] if found else None

    assert precision() == expected
    if amp is None:
        monkeypatch.setattr(mixed_precision, 'cpu_has_bfloat16', lambda: False)
        assert precision() is None


def test_mask_model_is_rejected(tmp_path):
    path = tmp_path / 'masks.py'
    path.write_text("model = dict(type='MaskRCNN', roi_head=dict(bbox_head=dict(num_classes=80), mask_head=dict()))\n")
    with pytest.raises(ValueError, match="'masks' predicts masks"):
        config(str(path))
    path.write_text("model = dict(type='X')\n")
    with pytest.raises(ValueError, match="'masks' has no bbox_head"):
        config(str(path))


def test_published_weights_are_the_start(tiny_stock_config, tmp_path, monkeypatch):
    """A training loads the published detector, and no weights of the backbone alone."""
    write(tmp_path / 'train.json', tmp_path / 'images')
    model = Model('tiny', tiny_stock_config, weights='http://127.0.0.1:9/tiny-01234567.pth')
    monkeypatch.setattr(training, 'find_model', lambda name: model)
    monkeypatch.setattr(training, 'download_weights', lambda found: tmp_path / 'tiny-01234567.pth')
    monkeypatch.chdir(tmp_path)

    def prepared(*argv):
        args = _parser().parse_args(['--data', '.', '--model', 'tiny', '--val-part', '0.5', *argv])
        return training.prepare(args)

    assert prepared('--dry-run').load_from == model.weights
    cfg = prepared('--work-dir', 'a')
    assert cfg.load_from == str(tmp_path / 'tiny-01234567.pth') and cfg.model.backbone.init_cfg is None
    (tmp_path / 'own.pth').touch()
    assert prepared('--work-dir', 'b', '--load-from', 'own.pth').load_from == 'own.pth'


# ---- the command ----------------------------------------------------------------------------------------------------
def test_invalid_arguments(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / 'train.json', tmp_path / 'images')
    assert 'give the path of a Python config file, or --data' in sentence([], capsys)
    assert '--epochs, --seed require --data' in sentence(['config.py', '--epochs', 3, '--seed', 0], capsys)
    assert 'both the config config.py and --data' in sentence(['config.py', '--data', '.'], capsys)
    assert '--data nowhere does not exist' in sentence(['--data', 'nowhere'], capsys)
    assert '--val nowhere does not exist' in sentence(['--data', '.', '--val', 'nowhere'], capsys)
    assert '--images nowhere does not exist' in sentence(['--data', '.', '--images', 'nowhere'], capsys)
    assert "unknown model 'yolo'" in sentence(['--data', '.', '--model', 'yolo'], capsys)
    assert 'use 8 or 12' in sentence(['--data', '.', '--batch-size', 4, '--effective-batch', 10], capsys)
    assert '--lr must be positive, got inf' in sentence(['--data', '.', '--lr', 'inf'], capsys)
    assert '--minutes must be positive, got 0.0' in sentence(['--data', '.', '--minutes', 0], capsys)
    assert 'not allowed with argument --epochs' in sentence(['--data', '.', '--epochs', 3, '--minutes', 1], capsys)
    assert '--seed must be from 0 to 4294967295, got -1' in sentence(['--data', '.', '--seed', -1], capsys)
    (tmp_path / 'file').touch()
    assert '--work-dir: file cannot be a folder' in sentence(['--data', '.', '--work-dir', 'file'], capsys)
    assert '--batch-size must be positive, got 0' in sentence(['--data', '.', '--batch-size', 0], capsys)
    assert 'a side such as 320' in sentence(['--data', '.', '--image-size', 'big'], capsys)
    options = ['--cfg-options', 'optim_wrapper.optimizer.lr=abc', '--dry-run', '--work-dir', 'never']
    assert 'optim_wrapper.optimizer.lr must be a number' in sentence(['--data', '.', *options], capsys)
    assert not list(tmp_path.glob('never/*.py'))
    assert 'none.pth does not exist' in sentence(['--data', '.', '--load-from', 'none.pth'], capsys)
    assert 'cpu, cuda or cuda:N' in sentence(['--data', '.', '--device', 'gpu'], capsys)
    assert 'with --dry-run' in sentence(['--data', '.', '--launcher', 'pytorch'], capsys)
    assert not (tmp_path / 'work_dirs').exists()
    (tmp_path / 'images/1.jpg').write_text('no image')
    assert '1 image is missing or unreadable, such as 1.jpg' in sentence(['--data', '.', '--work-dir', 'w'], capsys)
    assert '1 unreadable image\n    1.jpg\n' in (tmp_path / 'w/data_report.txt').read_text()
    (tmp_path / 'w/last_checkpoint').touch()
    assert 'continue it with --resume' in sentence(['--data', '.', '--work-dir', 'w'], capsys)


def test_dry_run_writes_complete_config(tmp_path, monkeypatch, capsys):
    from mmdet.registry import DATASETS, METRICS, MODELS
    from mmengine.registry import init_default_scope

    monkeypatch.chdir(tmp_path)
    write(tmp_path / 'mine/labels.json', tmp_path / 'mine/pictures', coco([f'{i}.jpg' for i in range(10)]))
    options = ['--effective-batch', '8', '--from-scratch', '--cfg-options', 'model.dn_cfg.box_noise_scale=0.4']
    assert main(['--data', 'mine', '--dry-run', *options]) == 0
    said = capsys.readouterr().out
    assert 'taken from the training data: 2 of 10 images, seed 0' in said and '2 classes: cat, dog' in said
    cfg = Config.fromfile(f'work_dirs/mine/{DEFAULT_MODEL}_mine.py')
    monkeypatch.chdir('/')  # independent of the working directory
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    assert model.bbox_head.num_classes == 2 and cfg.model.dn_cfg.box_noise_scale == 0.4
    train, val = (DATASETS.build(cfg[f'{split}_dataloader'].dataset) for split in ('train', 'val'))
    assert (len(train), len(val)) == (8, 2) and train.metainfo['classes'] == val.metainfo['classes'] == CLASSES
    assert train[0]['inputs'].shape[0] == 3 and val[0]['inputs'].shape == (3, 240, 320)
    METRICS.build(cfg.val_evaluator)
    assert cfg.optim_wrapper.accumulative_counts == 2 and cfg.load_from is None  # 2 × 4 images


def test_a_dry_run_leaves_a_training_as_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / 'mine/labels.json', tmp_path / 'mine', coco([f'{i}.jpg' for i in range(10)]))
    assert main(['--data', 'mine', '--dry-run', '--work-dir', 'w']) == 0
    (tmp_path / 'w/last_checkpoint').write_text('w/epoch_1.pth')
    before = {path: path.read_bytes() for path in (tmp_path / 'w').rglob('*') if path.is_file()}
    assert main(['--data', 'mine', '--dry-run', '--work-dir', 'w', '--seed', '1', '--epochs', '3']) == 0
    assert f'config: w/dry_run/{DEFAULT_MODEL}_mine.py' in capsys.readouterr().out
    assert all(path.read_bytes() == content for path, content in before.items())
    cfg = Config.fromfile(f'w/dry_run/{DEFAULT_MODEL}_mine.py')
    assert cfg.work_dir == 'w/dry_run' and '/dry_run/' in cfg.val_dataloader.dataset.ann_file


def test_a_work_dir_has_one_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('mine', 'theirs'):
        write(tmp_path / f'{name}/train.json', tmp_path / name)
        write(tmp_path / f'{name}/val.json', tmp_path / name)
    (tmp_path / 'w').mkdir()
    (tmp_path / 'w/notes.py').write_text("work_dir = 'w'\n")  # not written by the command
    assert main(['--data', 'mine', '--dry-run', '--work-dir', 'w']) == 0
    assert main(['--data', 'theirs', '--dry-run', '--work-dir', str(tmp_path / 'w')]) == 0
    assert {path.name for path in (tmp_path / 'w').glob('*.py')} == {f'{DEFAULT_MODEL}_theirs.py', 'notes.py'}


def test_other_classes_are_not_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, classes in (('mine', CLASSES), ('theirs', ('cat', 'dog', 'bird'))):
        for split in ('train', 'val'):
            write(tmp_path / f'{name}/{split}.json', tmp_path / name, coco(classes=classes))
    assert main(['--data', 'mine', '--dry-run', '--work-dir', 'w']) == 0
    meta = dict(epoch=1, iter=1, dataset_meta=dict(classes=CLASSES))
    torch.save(dict(meta=meta, state_dict={}), tmp_path / 'w/epoch_1.pth')
    (tmp_path / 'w/last_checkpoint').write_text('w/epoch_1.pth')
    message = sentence(['--data', 'theirs', '--work-dir', 'w', '--resume'], capsys)
    assert 'cannot resume w/epoch_1.pth: it has other classes than the training data: 2 (cat, dog), ' in message
    assert 'the data have 3 (cat, dog, bird); resume with its data, or start a new training' in message
    assert [path.name for path in (tmp_path / 'w').glob('*.py')] == [f'{DEFAULT_MODEL}_mine.py']


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'mine'
    generate(folder, train=8, val=2, size=(64, 64), seed=1)
    return folder


def train(*args):
    DetLocalVisualizer._instance_dict.clear()  # one per process, with the folder of the last training
    assert main([*map(str, args)]) == 0


def test_the_speed_is_that_of_the_mixed_precision(shapes, monkeypatch):
    files = {split: (shapes / f'annotations/{split}.json', shapes / split) for split in ('train', 'val')}
    data, measured = Data(files, tuple(SHAPES), num_images=8, most_boxes=7), []
    monkeypatch.setattr(budget, '_seconds', lambda batches, step, device: step(next(iter(batches))) and 0.0)
    monkeypatch.setattr(AccelerateHook, 'accelerate', lambda hook, model: measured.append(hook.switches))
    for amp in (False, True):
        choices = Choices('work', image_size=(64, 64), workers=0, device='cpu', amp=amp)
        budget.measure_speed(build_config(find_model(DEFAULT_MODEL).config, data, choices)[0])
    assert [switches['training_dtype'] for switches in measured] == [torch.bfloat16]


@pytest.mark.slow
def test_trains_and_resumes(shapes, tmp_path):
    options = ['--data', shapes, '--work-dir', tmp_path, '--accumulate', 2, '--batch-size', 2]
    options += ['--image-size', '64', '--workers', '0']
    train(*options, '--epochs', 1)
    saved = tmp_path / f'{DEFAULT_MODEL}_mine.py'
    for name in ('epoch_1.pth', 'best_coco_bbox_mAP_epoch_1.pth', 'curves.png', 'metrics.json', saved.name):
        assert (tmp_path / name).is_file()
    train(*options, '--epochs', 2, '--resume')
    assert any('resumed epoch: 1' in log.read_text() for log in tmp_path.glob('*/*.log'))
    assert (tmp_path / 'epoch_2.pth').is_file()
    # The saved config also resumes without --data.
    train(saved, '--resume', '--cfg-options', 'train_cfg.max_epochs=3')
    assert (tmp_path / 'epoch_3.pth').is_file()
    assert [entry['epoch'] for entry in json.loads((tmp_path / 'metrics.json').read_text())['history']] == [1, 2, 3]
    assert torch.load(tmp_path / 'epoch_3.pth', weights_only=False)['meta']['epoch'] == 3


@pytest.mark.slow
def test_ctrl_c_keeps_last_checkpoint(shapes, tmp_path):
    command = [sys.executable, '-m', 'msda_plugin', 'train', '--data', shapes, '--work-dir', tmp_path]
    command += ['--epochs', 1000, '--image-size', 64, '--workers', 0]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}  # as in conftest.py, for a subprocess
    with subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        for _ in range(3000):
            if (tmp_path / 'last_checkpoint').is_file() or process.poll() is not None:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors[-3000:]
    last = errors.splitlines()[-1]
    assert 'msda_plugin train: stopped' in last and '--resume' in last and 'Traceback' not in errors
    (checkpoint,) = [word.rstrip(',;.') for word in last.split() if word.rstrip(',;.').endswith('.pth')]
    assert torch.load(checkpoint, weights_only=False)['meta']['epoch'] >= 1
