"""The configs of D-FINE and DEIM against the authors' optimizers and schedules."""

import gzip
import json
import math
import re
from pathlib import Path

import pytest
import torch
from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS, TRANSFORMS, init_default_scope

from msda_plugin.convert import convert

ROOT = Path(__file__).resolve().parents[2]
STATE_DICTS = json.loads(gzip.decompress((ROOT / 'tests' / 'golden' / 'dfine_state_dicts.json.gz').read_bytes()))
DFINE = {path.stem.split('-')[1].split('_')[0]: path for path in (ROOT / 'configs' / 'dfine').glob('*.py')}
DEIM = {path.stem.split('-')[2].split('_')[0]: path for path in (ROOT / 'configs' / 'deim').glob('*.py')}

# The authors' groups: expression, learning rate (None: the base's), weight decay (None: the base's). The first one that
# matches counts. Where they write `(?!.*norm|bn)`, `bn` stands for names that begin with it, of which there are none.
BACKBONE = r'^(?=.*backbone)(?!.*norm|bn).*$'
BACKBONE_NORM = r'^(?=.*backbone)(?=.*norm|bn).*$'
NORM = r'^(?=.*(?:encoder|decoder))(?=.*(?:norm|bn)).*$'
NORM_BIAS = r'^(?=.*(?:encoder|decoder))(?=.*(?:norm|bn|bias)).*$'


def small(rate):
    return [(BACKBONE, rate, None), (BACKBONE_NORM, rate, 0.0), (NORM_BIAS, None, 0.0)]


def deim(rate):
    return [(r'^(?=.*backbone)(?!.*bn).*$', rate, None), (r'^(?=.*(?:norm|bn)).*$', None, 0.0)]


GROUPS = [
    (DFINE, 'n', 0.0008, 1e-4, small(0.0004)),
    (DFINE, 's', 0.0002, 1e-4, small(0.0001)),
    (DFINE, 'm', 0.0002, 1e-4, small(0.00002)),
    (DFINE, 'l', 0.00025, 1.25e-4, [(BACKBONE, 0.0000125, None), (NORM, None, 0.0)]),
    (DFINE, 'x', 0.00025, 1.25e-4, [(BACKBONE, 0.0000025, None), (NORM, None, 0.0)]),
    (DEIM, 'n', 0.0008, 1e-4, small(0.0004)),
    (DEIM, 's', 0.0004, 1e-4, deim(0.0002)),
    (DEIM, 'm', 0.0004, 1e-4, deim(0.00004)),
    (DEIM, 'l', 0.0005, 1.25e-4, [(BACKBONE, 0.000025, None), (NORM, None, 0.0)]),
]


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmdet')


@pytest.mark.parametrize('paths, size, base_rate, base_decay, groups', GROUPS)
def test_learning_rates_and_weight_decay_are_the_published_ones(paths, size, base_rate, base_decay, groups):
    cfg = Config.fromfile(str(paths[size]))
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    wrapper = {key: value for key, value in cfg.optim_wrapper.items() if key != 'loss_scale'}
    optimizer = build_optim_wrapper(model, wrapper | dict(type='OptimWrapper')).optimizer
    names = {id(p): name for name, p in model.named_parameters()}
    ours = {
        names[id(p)]: (group['lr'], group['weight_decay']) for group in optimizer.param_groups for p in group['params']
    }
    upstream = {key: torch.empty(shape, device='meta') for key, shape in STATE_DICTS[size].items()}
    upstream |= {key: torch.ones(1) for key in upstream if key.endswith(('.up', 'reg_scale'))}
    compared = 0
    for key, new_key in convert(upstream, 'dfine').taken.items():
        if new_key not in ours or not model.get_parameter(new_key).requires_grad:
            continue
        rate, decay = next(((r, d) for pattern, r, d in groups if re.findall(pattern, key)), (None, None))
        expected = base_rate if rate is None else rate, base_decay if decay is None else decay
        assert ours[new_key] == pytest.approx(expected), key
        compared += 1
    assert compared > 200


@pytest.mark.parametrize(
    'size, epochs, flat, no_augmentation, lowest',
    [('l', 58, 29, 8, 0.5), ('m', 102, 49, 12, 0.5), ('s', 132, 64, 12, 0.5), ('n', 160, 7800, 12, 1.0)],
)
def test_learning_rate_of_deim_is_flat_and_then_falls_by_a_cosine(size, epochs, flat, no_augmentation, lowest):
    cfg = Config.fromfile(str(DEIM[size]))
    assert cfg.train_cfg.max_epochs == epochs
    per_epoch, rate = 200, cfg.optim_wrapper.optimizer.lr
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    schedulers = [
        PARAM_SCHEDULERS.build(dict(scheduler, optimizer=optimizer), default_args=dict(epoch_length=per_epoch))
        for scheduler in cfg.param_scheduler
    ]
    total, warmup, end = epochs * per_epoch, 2000, (epochs - no_augmentation) * per_epoch
    for step in range(1, total):
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
        if step % 377 and step not in (10, 1000, 1999):
            continue
        if step <= warmup:
            expected = min((step + 1) / warmup, 1) ** 2  # the first step is not 0, as it is in the authors' code
        elif step <= flat * per_epoch:
            expected = 1.0
        elif step >= end:
            expected = lowest
        else:
            cosine = 0.5 * (1 + math.cos(math.pi * (step - flat * per_epoch) / (end - flat * per_epoch)))
            expected = lowest + (1 - lowest) * cosine
        assert optimizer.param_groups[0]['lr'] == pytest.approx(rate * expected, rel=3e-3), step


@pytest.mark.parametrize('path', [DFINE['n'], DEIM['n']], ids=['dfine', 'deim'])
def test_pipelines_give_boxes_within_images(path, tmp_path):
    import cv2
    import numpy as np

    np.random.seed(0)
    cv2.imwrite(str(tmp_path / 'image.jpg'), np.random.randint(0, 255, (120, 160, 3), np.uint8))
    cfg = Config.fromfile(str(path))
    pipelines = [cfg.train_dataloader.dataset.pipeline]
    pipelines += [hook.switch_pipeline for hook in cfg.custom_hooks if hook.type == 'PipelineSwitchHook']
    assert len(pipelines) == (2 if path == DFINE['n'] else 4)
    objects = [dict(bbox=[10 * i, 10 * i, 60 + 10 * i, 50 + 10 * i], bbox_label=i, ignore_flag=0) for i in range(5)]
    info = dict(img_path=str(tmp_path / 'image.jpg'), img_id=1, height=120, width=160, instances=objects)
    most = 0
    for pipeline in pipelines:
        compose = TRANSFORMS.build(dict(type='Compose', transforms=pipeline))
        for _ in range(12):
            out = compose(dict(info, instances=[dict(item) for item in objects]))
            if out is None:
                continue
            objects_out = out['data_samples'].gt_instances
            boxes = objects_out.bboxes.tensor
            assert out['inputs'].shape == (3, 640, 640)
            assert boxes.min() >= 0 and boxes.max() <= 640
            most = max(most, len(boxes))
    assert (most > 5) == (path == DEIM['n'])  # mosaics have the objects of four images


def test_strong_augmentation_ends_where_the_authors_end_it():
    for paths, size, mosaic, plain in (
        (DFINE, 'n', None, 148),
        (DFINE, 's', None, 120),
        (DFINE, 'm', None, 120),
        (DFINE, 'l', None, 72),
        (DFINE, 'x', None, 72),
        (DEIM, 'n', 78, 148),
        (DEIM, 's', 64, 120),
        (DEIM, 'm', 49, 90),
        (DEIM, 'l', 29, 50),
    ):
        cfg = Config.fromfile(str(paths[size]))
        switches = [hook.switch_epoch for hook in cfg.custom_hooks if hook.type == 'PipelineSwitchHook']
        assert switches == ([plain] if mosaic is None else [4, mosaic, plain])
        augments = {augment.type: augment for augment in cfg.model.data_preprocessor.batch_augments or ()}
        if size != 'n':
            assert augments['msda_plugin.BatchRandomResize'].stop_epoch == plain
        if mosaic:
            mixup = augments['msda_plugin.BatchMixUp']
            assert (mixup.start_epoch, mixup.stop_epoch) == (4, mosaic)
        assert DATASETS.get(cfg.dataset_type) is not None
