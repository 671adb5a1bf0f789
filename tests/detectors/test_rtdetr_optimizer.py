"""Learning rates and weight decay of RT-DETR's configs are those of the authors."""

from collections import Counter
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from rtdetr_cases import build
from torch import nn

CONFIGS = Path(__file__).resolve().parents[2] / 'configs' / 'rtdetr'


@pytest.mark.parametrize(
    ('config', 'depth', 'rates'),
    [
        # Learning rate of the backbone; weight decay of its norms, of other norms, of other biases.
        ('rtdetr_r18vd_4xb4-72e_coco', 18, (1e-5, 0, 0, 0)),
        ('rtdetr_r34vd_4xb4-72e_coco', 34, (1e-5, 0, 0, 0)),
        ('rtdetr_r50vd_4xb4-72e_coco', 50, (1e-5, None, 0, 0)),
        ('rtdetr_r101vd_4xb4-72e_coco', 101, (1e-6, None, 1e-4, 1e-4)),
        ('rtdetrv2-s_r18vd_4xb4-120e_coco', 18, (1e-4, 0, 0, 1e-4)),
        ('rtdetrv2-m_r50vd_4xb4-84e_coco', 50, (1e-5, None, 0, 1e-4)),
        ('rtdetrv2-l_r50vd_4xb4-72e_coco', 50, (1e-5, None, 0, 1e-4)),
        ('rtdetrv2-x_r101vd_4xb4-72e_coco', 101, (1e-6, None, 0, 1e-4)),
    ],
)
def test_parameter_groups(config, depth, rates):
    cfg = Config.fromfile(str(CONFIGS / f'{config}.py'))
    frozen = cfg.model.backbone.norm_eval
    assert cfg.model.backbone.depth == depth and frozen == (rates[1] is None)
    assert frozen != cfg.model.backbone.norm_cfg.requires_grad
    model = build(depth, frozen=frozen)
    cfg.optim_wrapper.update(type='OptimWrapper', loss_scale=None)
    cfg.optim_wrapper.pop('loss_scale')
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    found = {id(group['params'][0]): (group['lr'], group['weight_decay']) for group in groups}
    norms = {
        id(p)
        for module in model.modules()
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm))
        for p in module.parameters()
    }
    backbone_lr, backbone_norms, other_norms, biases = rates
    counts = Counter()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_backbone, is_norm = name.startswith('backbone'), id(parameter) in norms
        decay = 1e-4
        if is_norm:
            decay = backbone_norms if is_backbone else other_norms
        elif name.endswith('bias'):
            decay = biases
        expected = (backbone_lr if is_backbone else 1e-4, decay)
        assert found[id(parameter)] == pytest.approx(expected), name
        counts[is_backbone, is_norm] += 1
    assert len(counts) == (3 if frozen else 4)
