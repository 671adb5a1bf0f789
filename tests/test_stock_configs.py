"""MMDetection's stock configs with one dict replaced by a backbone, neck, head or detector of msda_plugin."""

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

DEFORMABLE_DETR = 'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'
RETINANET = 'retinanet/retinanet_r50_fpn_1x_coco.py'
SMALL_LAYERS = """
    encoder=dict(num_layers=1), decoder=dict(num_layers=2), num_queries=20, test_cfg=dict(max_per_img=20)"""
NARROW = """dict(embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_heads=(2, 2, 2, 4), mlp_ratios=(2, 2, 2, 2),
            sr_ratios=(8, 4, 2, 1), stem_convs=1)"""
# name in msda_plugin: (MMDetection's config, changes to its model)
CHANGES = {
    'ShuntedTransformer': (
        RETINANET,
        f"""
        backbone=dict(_delete_=True, type='msda_plugin.ShuntedTransformer', arch={NARROW}),
        neck=dict(in_channels=[8, 16, 24, 32])""",
    ),
    'DAT': (
        RETINANET,
        """
        backbone=dict(_delete_=True, type='msda_plugin.DAT', arch='tiny'),
        neck=dict(in_channels=[96, 192, 384, 768])""",
    ),
    'VisionTransformer': (
        'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
        """
        backbone=dict(_delete_=True, type='msda_plugin.VisionTransformer', out_indices=(11,), arch=dict(
            embed_dims=48, depth=12, num_heads=3, mlp_ratio=4)),
        neck=dict(_delete_=True, type='msda_plugin.SimpleFeaturePyramid', in_channels=48, num_outs=5)""",
    ),
    'PVTNeck': (
        DEFORMABLE_DETR,
        "neck=dict(_delete_=True, type='msda_plugin.PVTNeck', "
        'in_channels=[512, 1024, 2048], out_channels=256, num_outs=4),' + SMALL_LAYERS,
    ),
    'SwinNeck': (
        DEFORMABLE_DETR,
        "neck=dict(_delete_=True, type='msda_plugin.SwinNeck', "
        'in_channels=[512, 1024, 2048], out_channels=256, num_outs=4),' + SMALL_LAYERS,
    ),
    'MFDSHSFPN': (
        DEFORMABLE_DETR,
        "neck=dict(_delete_=True, type='msda_plugin.MFDSHSFPN', "
        'in_channels=[512, 1024, 2048], out_channels=256),' + SMALL_LAYERS,
    ),
    'ResNetVD': (
        DEFORMABLE_DETR,
        "backbone=dict(_delete_=True, type='msda_plugin.ResNetVD', depth=18, out_indices=(1, 2, 3)), "
        'neck=dict(in_channels=[128, 256, 512]),' + SMALL_LAYERS,
    ),
    'HGNetV2': (
        DEFORMABLE_DETR,
        "backbone=dict(_delete_=True, type='msda_plugin.HGNetV2', arch='B0', use_lab=True), "
        'neck=dict(in_channels=[256, 512, 1024]),' + SMALL_LAYERS,
    ),
    'HybridEncoder': (
        'retinanet/retinanet_r50_fpn_1x_coco.py',
        "neck=dict(_delete_=True, type='msda_plugin.HybridEncoder', in_channels=[256, 512, 1024, 2048], "
        'out_channels=64, feedforward_channels=64, num_blocks=1), '
        'bbox_head=dict(in_channels=64, anchor_generator=dict(strides=[4, 8, 16, 32]))',
    ),
    'DeformableDETRHead': (DEFORMABLE_DETR, "bbox_head=dict(type='msda_plugin.DeformableDETRHead')," + SMALL_LAYERS),
    'DETRHead': ('detr/detr_r50_8xb2-150e_coco.py', "bbox_head=dict(type='msda_plugin.DETRHead')," + SMALL_LAYERS),
    'DeformableDETR': (DEFORMABLE_DETR, "type='msda_plugin.DeformableDETR'," + SMALL_LAYERS),
    'DETR': ('detr/detr_r50_8xb2-150e_coco.py', "type='msda_plugin.DETR'," + SMALL_LAYERS),
}


@pytest.mark.parametrize('name', CHANGES)
def test_a_stock_config_with_one_dict_changed(name, tmp_path):
    base, changes = CHANGES[name]
    path = tmp_path / 'config.py'
    path.write_text(f"_base_ = 'mmdet::{base}'\nmodel = dict({changes})\n")
    cfg = Config.fromfile(str(path))
    if cfg.model.backbone.type == 'ResNet':  # its weights would be downloaded
        cfg.model.backbone.init_cfg = None
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    modules = [type(module) for module in model.modules()]
    assert any(kind.__name__ == name and kind.__module__.startswith('msda_plugin.') for kind in modules)

    meta = dict(img_shape=(96, 128), ori_shape=(96, 128), scale_factor=(1.0, 1.0))
    objects = InstanceData(
        bboxes=torch.tensor([[8.0, 12.0, 40.0, 60.0], [30.0, 5.0, 90.0, 50.0]]), labels=torch.tensor([0, 79])
    )
    batch = {
        'inputs': [torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8)],
        'data_samples': [DetDataSample(metainfo=meta, gt_instances=objects)],
    }
    loss, _ = model.parse_losses(model(**model.data_preprocessor(batch, training=True), mode='loss'))
    loss.backward()
    assert loss.isfinite()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    model.eval()
    with torch.no_grad():
        [result] = model.test_step(batch)
    assert result.pred_instances.bboxes.isfinite().all()
