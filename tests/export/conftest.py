"""Small detectors of each kind, and the operator's cases."""

import sys
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from msda_plugin.registry import MODELS

sys.path.insert(0, str(Path(__file__).parents[1] / 'ops'))

CONFIGS = Path(__file__).parents[2] / 'configs'
CLASSES = ('circle', 'square', 'triangle', 'star', 'ring', 'cross')
SHUNTED = """dict(_delete_=True, type='msda_plugin.ShuntedTransformer', out_indices=(1, 2, 3), arch=dict(
    embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_heads=(2, 2, 2, 4), mlp_ratios=(2, 2, 2, 2),
    sr_ratios=(8, 4, 2, 1), stem_convs=1))"""
LAYERS = """
    encoder=dict(num_layers=1, layer_cfg=dict(
        self_attn_cfg=dict(embed_dims=32, num_heads=4), ffn_cfg=dict(embed_dims=32, feedforward_channels=48))),
    decoder=dict(num_layers=2, layer_cfg=dict(
        self_attn_cfg=dict(embed_dims=32, num_heads=4), cross_attn_cfg=dict(embed_dims=32, num_heads=4),
        ffn_cfg=dict(embed_dims=32, feedforward_channels=48))),
    positional_encoding=dict(num_feats=16), num_queries=20, test_cfg=dict(max_per_img=10),
    bbox_head=dict(embed_dims=32, num_classes=6),"""
# mmdet 3.3.0 computes the positions of two-stage queries for 256 channels only.
LAYERS_256 = LAYERS.replace('=32', '=256').replace('=16', '=128')
DECODER = LAYERS[LAYERS.index('    decoder') :].replace('positional_encoding=dict(num_feats=16), ', '') + ')'
NANO = f"""
_base_ = '{CONFIGS}/_base_/models/deformable-detr-two-stage_shunted-nano.py'
model = dict(
    backbone={SHUNTED},
    neck=dict(in_channels=[16, 24, 32], out_channels=32, norm_cfg=dict(num_groups=4)), {LAYERS}"""
R18 = 'backbone=dict(depth=18, base_channels=8, init_cfg=None),'
MODELS_OF_TESTS = {
    'base': NANO + 'with_box_refine=False, as_two_stage=False)',
    'refine': NANO + 'as_two_stage=False)',
    'two-stage': NANO + ")\nmodel['test_cfg'] = dict(max_per_img=10, nms=dict(type='nms', iou_threshold=0.5))",
    'detr': f"""
_base_ = 'mmdet::detr/detr_r50_8xb2-150e_coco.py'
model = dict(type='msda_plugin.DETR', {R18} neck=dict(in_channels=[64], out_channels=32), {LAYERS})
model['bbox_head']['type'] = 'msda_plugin.DETRHead'
model['data_preprocessor'] = dict(pad_size_divisor=16)""",
    'dino': f"""
_base_ = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'
model = dict({R18} neck=dict(in_channels=[16, 32, 64]), {LAYERS_256})""",
    'stock-two-stage': f"""
_base_ = 'mmdet::deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco.py'
model = dict({R18} neck=dict(in_channels=[16, 32, 64]), {LAYERS_256})""",
    'rtdetr': f"""
_base_ = '{CONFIGS}/_base_/models/rtdetr_r18vd-nano.py'
model = dict(
    backbone=dict(base_channels=8),
    neck=dict(in_channels=[16, 32, 64], out_channels=32, num_heads=4, feedforward_channels=48), {DECODER}""",
    'dfine': f"""
_base_ = '{CONFIGS}/_base_/models/dfine_hgnetv2-n.py'
model = dict(
    backbone=dict(_delete_=True, type='msda_plugin.HGNetV2', use_lab=True, arch=dict(
        stem=(4, 4), inner=(4, 4, 8, 8), channels=(8, 16, 24, 32), blocks=(1, 1, 1, 1), layers=2)),
    neck=dict(in_channels=[16, 24, 32], out_channels=32, num_heads=4, feedforward_channels=32),
    decoder=dict(num_layers=3, eval_layer=1, embed_dims=32, num_heads=4, feedforward_channels=32),
    num_queries=20, test_cfg=dict(max_per_img=10), bbox_head=dict(embed_dims=32, num_classes=6))""",
    'retinanet': f"""
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
model = dict(
    backbone={SHUNTED.replace('(1, 2, 3)', '(0, 1, 2, 3)')},
    neck=dict(in_channels=[8, 16, 24, 32], out_channels=16),
    bbox_head=dict(num_classes=6, in_channels=16, feat_channels=16, stacked_convs=1),
    test_cfg=dict(nms_pre=60, max_per_img=15))""",
    'faster-rcnn': f"""
_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
model = dict({R18} neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(bbox_roi_extractor=dict(out_channels=16), bbox_head=dict(
        in_channels=16, fc_out_channels=32, num_classes=6)),
    test_cfg=dict(rpn=dict(nms_pre=60, max_per_img=40), rcnn=dict(max_per_img=15)))""",
    'mask-rcnn': f"""
_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
model = dict({R18} neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16), bbox_head=dict(in_channels=16, fc_out_channels=32, num_classes=6),
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(in_channels=16, conv_out_channels=16, num_convs=1, num_classes=6)),
    test_cfg=dict(rpn=dict(nms_pre=60, max_per_img=40), rcnn=dict(max_per_img=15)))""",
    'mask2former': f"""
_base_ = 'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py'
attention = dict(embed_dims=32, num_heads=4)
feed_forward = dict(embed_dims=32, feedforward_channels=48)
model = dict({R18}
    panoptic_head=dict(
        in_channels=[8, 16, 32, 64], feat_channels=32, out_channels=32, num_queries=20, num_things_classes=6,
        loss_cls=dict(class_weight=[1.0] * 6 + [0.1]), positional_encoding=dict(num_feats=16),
        pixel_decoder=dict(
            norm_cfg=dict(num_groups=4), positional_encoding=dict(num_feats=16),
            encoder=dict(num_layers=1, layer_cfg=dict(self_attn_cfg=attention, ffn_cfg=feed_forward))),
        transformer_decoder=dict(num_layers=2, layer_cfg=dict(
            self_attn_cfg=attention, cross_attn_cfg=attention, ffn_cfg=feed_forward))),
    panoptic_fusion_head=dict(num_things_classes=6), test_cfg=dict(max_per_image=12))""",
    'grounding-dino': """
_base_ = 'mmdet::grounding_dino/grounding_dino_swin-t_finetune_16xb2_1x_coco.py'
model = dict(
    backbone=dict(_delete_=True, type='ResNet', depth=18, base_channels=8, out_indices=(1, 2, 3)),
    neck=dict(in_channels=[16, 32, 64], out_channels=32, norm_cfg=dict(num_groups=4)),
    data_preprocessor=dict(pad_size_divisor=32),
    language_model=dict(_delete_=True, type='RandomLanguageModel'),
    encoder=dict(
        num_layers=1, num_cp=0, layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=32, num_heads=4), ffn_cfg=dict(embed_dims=32, feedforward_channels=48)),
        text_layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=32), ffn_cfg=dict(embed_dims=32, feedforward_channels=48)),
        fusion_layer_cfg=dict(v_dim=32, l_dim=32, embed_dim=32)),
    decoder=dict(num_layers=1, layer_cfg=dict(
        self_attn_cfg=dict(embed_dims=32, num_heads=4), cross_attn_text_cfg=dict(embed_dims=32, num_heads=4),
        cross_attn_cfg=dict(embed_dims=32, num_heads=4), ffn_cfg=dict(embed_dims=32, feedforward_channels=48))),
    positional_encoding=dict(num_feats=16), num_queries=20, bbox_head=dict(embed_dims=32))""",
}
PIPELINE = """
test_dataloader = dict(dataset=dict(pipeline=[
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale={scale}, keep_ratio={keep_ratio}),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]))
test_dataloader['dataset']['_delete_'] = True
test_dataloader['dataset']['type'] = 'CocoDataset'
"""


@MMDET_MODELS.register_module(force=True)
class RandomLanguageModel(torch.nn.Module):
    """In place of BERT, which is downloaded."""

    def __init__(self):
        super().__init__()
        self.language_backbone = torch.nn.Module()
        self.language_backbone.body = torch.nn.Linear(8, 8)
        self.language_backbone.body.language_dim = 8


@pytest.fixture
def build(tmp_path):
    """Build a small untrained detector of a kind, with random scores: ``build(kind, keep_ratio=True)``."""

    def build_model(kind: str, scale: tuple[int, int] = (96, 72), keep_ratio: bool = True) -> torch.nn.Module:
        from msda_plugin.engine.inference import _test_pipeline

        path = tmp_path / f'{kind}.py'
        path.write_text(MODELS_OF_TESTS[kind] + PIPELINE.format(scale=scale, keep_ratio=keep_ratio))
        cfg = Config.fromfile(path)
        init_default_scope('mmdet')
        torch.manual_seed(0)
        model = MODELS.build(cfg.model)
        model.init_weights()
        for name, parameter in model.named_parameters():
            # Otherwise all scores are nearly equal, and rounding decides which boxes are the best.
            if any(part in name for part in ('retina_', 'rpn_cls', 'rpn_reg')):
                torch.nn.init.normal_(parameter, std=0.02)
            elif any(part in name for part in ('cls', 'reg')):
                torch.nn.init.normal_(parameter, std=0.3)
        model.cfg, model.dataset_meta, model.test_pipeline = cfg, dict(classes=CLASSES), _test_pipeline(cfg)
        return model.eval()

    return build_model
