"""PP-HGNetV2 as a backbone. The numbers of its outputs are tested with D-FINE's (tests/detectors/test_dfine.py)."""

import pytest
import torch
from torch import nn

from msda_plugin.backbones.hgnetv2 import HGNetV2
from msda_plugin.registry import MODELS

TINY = dict(stem=(4, 8), inner=(4, 4, 8, 8), channels=(8, 16, 24, 32), blocks=(1, 1, 2, 1), layers=2)


def test_builds_from_the_registry_and_takes_any_size():
    model = MODELS.build(dict(type='msda_plugin.HGNetV2', arch=TINY, out_indices=(0, 2, 3), use_lab=True)).eval()
    outs = model(torch.rand(2, 3, 65, 97))
    assert [tuple(out.shape) for out in outs] == [(2, 8, 17, 25), (2, 24, 5, 7), (2, 32, 3, 4)]
    assert model.out_channels == (8, 24, 32)


@pytest.mark.parametrize(
    'arch, use_lab, parameters',
    [('B0', True, 1_850_396), ('B2', True, 6_026_626), ('B4', False, 13_553_376), ('B5', False, 33_325_760)],
)
def test_parameter_count(arch, use_lab, parameters):
    with torch.device('meta'):
        model = HGNetV2(arch, use_lab=use_lab)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_learnable_affine_blocks_follow_activations_only():
    model = HGNetV2(TINY, use_lab=True)
    scales = [name for name, _ in model.named_parameters() if name.endswith('lab.scale')]
    assert 'stem.stem1.lab.scale' in scales and 'stages.2.blocks.0.layers.0.conv2.lab.scale' in scales
    assert not [name for name in scales if '.conv1.' in name or 'downsample' in name]
    assert not [name for name, _ in HGNetV2(TINY).named_parameters() if 'lab' in name]


@pytest.mark.parametrize('frozen_stages, frozen', [(-1, set()), (0, {'stem'}), (1, {'stem', 'stages.0'})])
def test_frozen_stages(frozen_stages, frozen):
    model = HGNetV2(TINY, frozen_stages=frozen_stages).train()
    parts = {
        '.'.join(name.split('.')[: 1 if name.startswith('stem') else 2])
        for name, p in model.named_parameters()
        if not p.requires_grad
    }
    assert parts == frozen
    assert model.stem.training == (frozen_stages < 0)


def test_frozen_norms_do_not_learn():
    torch.manual_seed(0)
    model = HGNetV2(TINY, frozen_norms=True).train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    sum(out.sum() for out in model(torch.rand(2, 3, 64, 64))).backward()
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))
    assert all(p.grad is None for norm in norms for p in norm.parameters())
    assert model.stages[0].blocks[0].layers[0].conv.weight.grad is not None


def test_checkpointing_changes_nothing_but_memory():
    image, grads = torch.rand(2, 3, 64, 64), []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = HGNetV2(TINY, with_cp=with_cp, use_lab=True).train()
        sum(out.square().mean() for out in model(image)).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.allclose(grad, grads[1][name], atol=1e-6) for name, grad in grads[0].items())


def test_initialization():
    torch.manual_seed(0)
    model = HGNetV2('B0', use_lab=True)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 7)
    model.init_weights()
    weight = model.stages[3].blocks[0].aggregation[1].conv.weight
    assert weight.std().item() == pytest.approx((3 * weight.shape[1]) ** -0.5, rel=0.05)
    assert model.stem.stem1.lab.scale == 1 and model.stem.stem1.lab.bias == 0
    assert (model.stem.stem1.bn.weight == 1).all()


def test_fuse_folds_norms_and_affine_blocks():
    torch.manual_seed(0)
    model = HGNetV2(TINY, use_lab=True).eval()
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith('lab.scale'):
                value.uniform_(-1.5, 1.5)  # of either sign
            elif name.endswith(('bias', 'running_mean')):
                value.uniform_(-0.5, 0.5)
            elif name.endswith('running_var'):
                value.uniform_(0.5, 1.5)
        scales = torch.stack([value for name, value in model.named_parameters() if name.endswith('lab.scale')])
        assert scales.min() < 0 < scales.max()
        image = torch.rand(2, 3, 65, 97)
        expected = model(image)
        outs = model.fuse()(image)
        assert all(torch.equal(out, again) for out, again in zip(outs, model.fuse()(image), strict=True))
    for out, wanted in zip(outs, expected, strict=True):
        assert (out - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert {type(module).__name__ for module in model.modules()}.isdisjoint({'BatchNorm2d', 'LearnableAffine', 'ReLU'})


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(arch='B9'), "unknown arch 'B9'; known: "),
        (dict(arch=TINY | dict(inner=(4, 4))), r'arch dict has inner=\(4, 4\); expected 4 integers of at least 1'),
        (dict(arch=TINY | dict(stem=(1, 8))), r'arch dict has stem=\(1, 8\); expected 2 integers of at least 2'),
        (dict(arch=TINY | dict(layers=0)), 'layers=0; expected 1 or more'),
        (dict(out_indices=(1, 4)), r'out_indices=\(1, 4\) is invalid'),
        (dict(frozen_stages=5), 'frozen_stages=5 is out of range'),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        HGNetV2(**options)


def test_images_with_other_channels():
    with pytest.raises(ValueError, match=r'HGNetV2 got images of shape \(1, 4, 32, 32\)'):
        HGNetV2(TINY)(torch.rand(1, 4, 32, 32))
