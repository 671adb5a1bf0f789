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

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / 'configs').glob('[!_]*/*.py'))
# Trainable parameters, as built.
PARAMETERS = {
    'deformable-detr-two-stage_shunted-nano_1xb1-36e_bccd': 3_765_148,
    'deformable-detr-two-stage_shunted-nano_1xb1-44e_bccd': 3_765_148,
    'mmdet-deformable-detr-two-stage_r18_1xb2-14e_bccd': 16_873_557,
    'deformable-detr-two-stage_shunted-nano_1xb4-100k_scenes': 3_785_272,
    'deformable-detr-refine-twostage_dat-b_16xb2-50e_coco': 101_745_924,
    'deformable-detr-refine-twostage_dat-s_16xb2-50e_coco': 63_115_798,
    'deformable-detr-refine-twostage_dat-t_16xb2-50e_coco': 41_734_534,
    'mask-rcnn_dat-b_fpn_1x_coco': 107_255_208,
    'mask-rcnn_dat-s_fpn_1x_coco': 69_206_650,
    'mask-rcnn_dat-t_fpn_1x_coco': 47_825_386,
    'retinanet_dat-b_fpn_1x_coco': 98_500_780,
    'retinanet_dat-s_fpn_1x_coco': 59_870_654,
    'retinanet_dat-t_fpn_1x_coco': 38_489_390,
    'deformable-detr-enhancer_r50_16xb2-50e_coco': 42_995_286,
    'deformable-detr-refine-twostage_r50_16xb2-50e_coco': 40_938_316,
    'deformable-detr-refine_r50_16xb2-50e_coco': 40_609_274,
    'deformable-detr-single-scale-dc5_r50_16xb2-50e_coco': 33_841_110,
    'deformable-detr-single-scale_r50_16xb2-50e_coco': 33_841_110,
    'deformable-detr_r50-mdconv-c4-c5_16xb2-50e_coco': 40_590_153,
    'deformable-detr_r50_16xb2-50e_coco': 39_843_414,
    'detr_pvtv2-b2_8xb2-150e_coco': 42_523_669,
    'detr_r50_8xb2-150e_coco': 41_299_541,
    'dino-4scale_r50_8xb2-12e_coco': 47_557_964,
    'dino-4scale_shunted-s_8xb2-12e_coco': 41_986_636,
    'mfds-detr_r50_8xb2-100e_leukocytes': 67_165_707,
    'deformable-detr_pvt-s-pvt-neck_16xb2-50e_coco': 40_088_278,
    'deformable-detr_pvtv2-b2-pvt-neck_16xb2-50e_coco': 40_965_398,
    'deformable-detr-refine_shunted-nano_1xb4-8e_shapes': 3_410_198,
    'deformable-detr-single-scale_shunted-nano_1xb4-8e_shapes': 1_791_500,
    'deformable-detr-two-stage_shunted-nano-hs-fpn_1xb4-8e_shapes': 4_767_518,
    'deformable-detr-two-stage_shunted-nano-pvt-neck_1xb4-8e_shapes': 4_457_246,
    'deformable-detr-two-stage_shunted-nano-swin-neck_1xb4-8e_shapes': 4_717_134,
    'deformable-detr-two-stage_shunted-nano_1xb4-8e_shapes': 3_517_086,
    'deformable-detr_shunted-nano_1xb4-8e_shapes': 3_375_884,
    'mmdet-deformable-detr-two-stage_r18_1xb4-4e_shapes': 16_875_870,
    'deformable-detr-refine-twostage_shunted-b_16xb2-50e_coco': 52_580_108,
    'deformable-detr-refine-twostage_shunted-s_16xb2-50e_coco': 35_366_988,
    'deformable-detr-refine-twostage_shunted-t_16xb2-50e_coco': 24_519_308,
    'mask-rcnn_shunted-b_fpn_1x_coco': 59_252_400,
    'mask-rcnn_shunted-s_fpn_1x_coco': 42_039_280,
    'mask-rcnn_shunted-t_fpn_1x_coco': 31_191_600,
    'retinanet_shunted-b_fpn_1x_coco': 49_334_964,
    'retinanet_shunted-s_fpn_1x_coco': 32_121_844,
    'retinanet_shunted-t_fpn_1x_coco': 21_274_164,
    'deformable-detr_swin-t-swin-neck_16xb2-50e_coco': 45_360_128,
    'deformable-detr_vit-b_16xb2-50e_coco': 103_300_310,
    'mask-rcnn_vit-b_8xb8-lsj-100e_coco': 112_577_456,
}


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
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == PARAMETERS[path.stem] - fewer
    if any(hook['type'] == 'msda_plugin.AccelerateHook' for hook in cfg.get('custom_hooks') or ()):
        assert accelerate(model) > 0

    # One image with objects and one without.
    size = SIZE_TWO_STAGE if cfg.model.get('as_two_stage') and cfg.model.num_queries > 100 else SIZE
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
