"""Every config builds, agrees with its classes, takes a training step that reaches every parameter, and predicts."""

import re
from pathlib import Path

import mmdet
import pytest
import torch
from mmdet.registry import DATASETS, MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from msda_plugin import accelerate
from msda_plugin.engine.model_zoo import models

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / 'configs').glob('[!_]*/*.py'))
MODELS_BY_NAME = models()


# MMDetection's DINO: the forks' has a layer more than the original one's.
FEWER_ON_THE_ORIGINALS = dict(dino=131_072)
SIZE = (96, 128)
SIZE_TWO_STAGE = (192, 256)  # has as many pixels as queries are chosen from


def without_pretrained(node):
    """The config with no weights to load: the files are on nobody's machine."""
    if isinstance(node, dict):
        return type(node)(
            {
                key: without_pretrained(value)
                for key, value in node.items()
                if not (key == 'init_cfg' and 'checkpoint' in (value or {}))
            }
        )
    return [without_pretrained(value) for value in node] if isinstance(node, list) else node


def sample(size, num_boxes, num_classes):
    meta = dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0))
    boxes = torch.tensor([[8.0, 12.0, 40.0, 60.0], [30.0, 5.0, 90.0, 50.0]])[:num_boxes]
    masks = torch.zeros(num_boxes, *size, dtype=torch.uint8).numpy()
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    return DetDataSample(
        metainfo=meta,
        gt_instances=InstanceData(
            bboxes=boxes, labels=torch.tensor([0, num_classes - 1])[:num_boxes], masks=BitmapMasks(masks, *size)
        ),
    )


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_builds_trains_and_predicts(path):
    cfg = Config.fromfile(str(path))
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model_cfg = without_pretrained(cfg.model)
    model_cfg.data_preprocessor.pop('batch_augments', None)  # pads to the size of the whole data set
    model = MODELS.build(model_cfg)
    model.init_weights()
    head = model.bbox_head if hasattr(model, 'bbox_head') else model.roi_head.bbox_head
    classes = DATASETS.get(cfg.dataset_type).METAINFO['classes']
    dataset = cfg.train_dataloader.dataset
    classes = dataset.get('dataset', dataset).get('metainfo', dict(classes=classes))['classes']
    assert head.num_classes == len(classes)
    fewer = FEWER_ON_THE_ORIGINALS.get(path.parent.name, 0) if mmdet.__version__ < '3.4' else 0
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == MODELS_BY_NAME[path.stem].parameters - fewer
    if any(hook['type'] == 'msda_plugin.AccelerateHook' for hook in cfg.get('custom_hooks') or ()):
        assert accelerate(model) > 0

    # One image with objects and one without.
    two_stage = cfg.model.get('as_two_stage') or cfg.model.type in ('msda_plugin.RTDETR', 'msda_plugin.DFINE')
    size = SIZE_TWO_STAGE if two_stage and cfg.model.num_queries > 100 else SIZE
    if cfg.model.type == 'msda_plugin.DFINE' and len(cfg.model.neck.in_channels) == 2:
        size = (256, 320)  # two coarse maps have fewer pixels
    batch = {
        'inputs': [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for _ in range(2)],
        'data_samples': [sample(size, 2, len(classes)), sample(size, 0, len(classes))],
    }
    loss, _ = model.parse_losses(model(**model.data_preprocessor(batch, training=True), mode='loss'))
    loss.backward()
    assert loss.isfinite()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []

    model.eval()
    with torch.no_grad():
        results = model.test_step(batch)
    assert all(result.pred_instances.bboxes.isfinite().all() for result in results)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_learning_rate_scales_with_the_batch(path):
    """The batch that the learning rate is meant for, which the file's name gives, stands in every config."""
    auto_scale_lr = Config.fromfile(str(path)).auto_scale_lr
    named = re.search(r'_(\d+)xb(\d+)-', path.stem)
    assert auto_scale_lr.base_batch_size == (int(named[1]) * int(named[2]) if named else 16)
    assert auto_scale_lr.enable == path.stem.endswith(('_coco', '_leukocytes'))


def test_every_config_is_listed_in_its_metafile():
    for path in CONFIGS:
        assert f'Config: {path.relative_to(ROOT)}\n' in (path.parent / 'metafile.yml').read_text()
        assert path.name in (path.parent / 'README.md').read_text()


def test_the_model_zoo_states_the_parameters_of_the_metafiles():
    rows = re.findall(
        r'^\| \[(\S+?)\]\(.*?\) \| ([\d.]+) \|', (ROOT / 'docs' / 'model_zoo.md').read_text(), re.MULTILINE
    )
    assert len(rows) > 30
    assert [(name, f'{MODELS_BY_NAME[name].parameters / 1e6:.1f}') for name, _ in rows] == rows
