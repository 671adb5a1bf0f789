"""Attention between image and text with its products in another order: same numbers, gradients and random state."""

import copy

import pytest
import torch
from mmdet.models.utils.vlfuse_helper import BiMultiHeadAttention
from torch import nn

import msda_plugin
from msda_plugin.acceleration import mmcv_models, text_fusion, transformers_models

transformers = pytest.importorskip('transformers')
grounding_dino = pytest.importorskip('transformers.models.grounding_dino.modeling_grounding_dino')


def transformers_layer():
    config = transformers.GroundingDinoConfig(
        d_model=16, encoder_ffn_dim=64, encoder_attention_heads=4, fusion_dropout=0.4, backbone_config=None
    )
    return grounding_dino.GroundingDinoBiMultiHeadAttention(config)


def mmdetection_layer(**fields):
    layer = BiMultiHeadAttention(16, 24, 32, 2, dropout=0.4)
    vars(layer).update(fields)
    return layer


CASES = {
    'transformers': (transformers_layer, transformers_models, text_fusion.TransformersTextFusion),
    'mmdetection': (mmdetection_layer, mmcv_models, text_fusion.MMDetectionTextFusion),
    'stable': (lambda: mmdetection_layer(stable_softmax_2d=True), mmcv_models, text_fusion.MMDetectionTextFusion),
    'not clamped': (
        lambda: mmdetection_layer(clamp_min_for_underflow=False, clamp_max_for_overflow=False),
        mmcv_models,
        text_fusion.MMDetectionTextFusion,
    ),
}


def make(case):
    build, framework, ours = CASES[case]
    torch.manual_seed(0)
    stock = build().double()
    for parameter in stock.parameters():
        nn.init.normal_(parameter, std=0.3)
    fast = copy.deepcopy(stock)
    framework.change_other_layers(fast)
    assert isinstance(fast, ours) and isinstance(fast, type(stock))
    return stock, fast


def inputs(stock, masked):
    generator = torch.Generator().manual_seed(1)
    draw = dict(generator=generator, dtype=torch.float64)
    text_channels = getattr(stock, 'text_proj', None) or stock.l_proj
    pixels, words = torch.randn(2, 7, 16, **draw), torch.randn(2, 3, text_channels.in_features, **draw)
    padding = torch.zeros(2, 7, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.bool)
    padding[0][1, 4:] = padding[1][0, 2:] = True
    text = padding[1] if hasattr(stock, 'text_proj') else (~padding[1]).double()
    return pixels.requires_grad_(), words.requires_grad_(), *((padding[0], text) if masked else (None, None))


def flat(outputs):
    return [tensor for item in outputs for tensor in (item if isinstance(item, tuple) else (item,))]


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('case', CASES)
def test_same_numbers_and_gradients(case, masked, training):
    results = []
    for layer in make(case):
        arguments = inputs(layer, masked)
        torch.manual_seed(2)
        outputs = flat(layer.train(training)(*arguments))
        loss = sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in outputs)
        gradients = torch.autograd.grad(loss, [*arguments[:2], *layer.parameters()])
        results.append([*outputs, *gradients, torch.rand(3)])
    for wanted, result in zip(*results, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-9, atol=1e-9)


def test_large_scores_are_clamped():
    stock, fast = make('transformers')
    pixels, words, *masks = inputs(stock, masked=True)
    arguments = (pixels * 1e5, words, *masks)
    for wanted, result in zip(flat(stock.eval()(*arguments)), flat(fast.eval()(*arguments)), strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('case', ['transformers', 'mmdetection'])
def test_pixels_are_not_projected(case, monkeypatch):
    stock, fast = make(case)
    rows = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, 'linear', lambda x, *args: rows.append(x.shape[1]) or linear(x, *args))
    stock(*inputs(stock, masked=False))
    assert rows.count(7) == 3
    rows.clear()
    fast(*inputs(fast, masked=False))
    assert set(rows) == {3}


@pytest.mark.parametrize('case', ['transformers', 'mmdetection'])
def test_projections_with_code_of_their_own_run(case):
    class Adapter(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    stock, fast = make(case)
    name = next(name for name, _ in stock.named_children())
    for layer in (stock, fast):
        getattr(layer.eval(), name).__class__ = Adapter
    arguments = inputs(stock, masked=True)
    for wanted, result in zip(flat(stock(*arguments)), flat(fast(*arguments)), strict=True):
        assert torch.equal(result, wanted)
    getattr(fast, name).__class__ = nn.Linear
    seen = []
    getattr(fast, name).register_forward_hook(lambda *_: seen.append(1))
    fast(*arguments)
    assert seen


def test_other_version_stays(monkeypatch):
    cls = grounding_dino.GroundingDinoBiMultiHeadAttention
    original = cls.forward

    def doubled(self, *args, **kwargs):
        (pixels, weights), words = original(self, *args, **kwargs)
        return (pixels * 2, weights), words

    monkeypatch.setattr(cls, 'forward', doubled)
    layer = transformers_layer()
    transformers_models.change_other_layers(layer)
    assert type(layer) is cls


def test_restore():
    stock, fast = make('transformers')
    msda_plugin.restore(fast)
    assert type(fast) is type(stock)
