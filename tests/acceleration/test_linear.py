"""Linear layers in oneDNN: same numbers, only in float32 inference on CPUs, undone by restore."""

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from mmcv.cnn.bricks.wrappers import Linear as MMCVLinear
from torch import nn

import msda_plugin
from msda_plugin.acceleration import linear, low_precision

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason='PyTorch without oneDNN')


@pytest.fixture(autouse=True)
def faster(monkeypatch):
    monkeypatch.setattr(linear, 'onednn_is_faster', lambda: True)


@pytest.fixture
def calls(monkeypatch):
    """A list with the shape of each input that oneDNN gets."""
    shapes, onednn = [], linear.onednn_linear
    monkeypatch.setattr(linear, 'onednn_linear', lambda x, *args: shapes.append(tuple(x.shape)) or onednn(x, *args))
    return shapes


def make():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 32), nn.GELU(), MMCVLinear(32, 16, bias=False), nn.LayerNorm(16), nn.Linear(16, 3)
    )


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_same_numbers_until_restored(calls):
    model = make()
    stock, parameters = copy.deepcopy(model), list(model.parameters())
    assert linear.use_onednn_linear(model) == 3 and linear.use_onednn_linear(model) == 0
    with torch.no_grad():
        for x in (draw(5, 8), draw(2, 7, 8), draw(2, 8, 7).mT, draw(2, 3, 4, 8)[:, 1:], draw(0, 8)):
            calls.clear()
            torch.testing.assert_close(model(x), stock(x), rtol=1e-5, atol=1e-6)
            assert len(calls) == 3
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(draw(5, 8)), model(draw(5, 8)))
        model[0].weight.data.mul_(2)
        stock[0].weight.data.mul_(2)
        torch.testing.assert_close(model(draw(5, 8)), stock(draw(5, 8)), rtol=1e-5, atol=1e-6)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert repr(model) == repr(stock) and list(model.state_dict()) == list(stock.state_dict())
    msda_plugin.restore(model)
    assert [type(module) for module in model] == [type(module) for module in stock]
    calls.clear()
    assert torch.equal(model(draw(5, 8)), stock(draw(5, 8))) and not calls


def test_part_of_inference_and_only_there():
    model = make()
    msda_plugin.accelerate(model, channels_last=True, fold=True)
    assert not any(isinstance(module, linear.Linear) for module in model)
    msda_plugin.accelerate(model, inference=True)
    assert sum(isinstance(module, linear.Linear) for module in model) == 3


def test_not_where_mkl_is_as_fast(monkeypatch):
    monkeypatch.setattr(linear, 'onednn_is_faster', lambda: False)
    model = make()
    assert linear.use_onednn_linear(model) == 0
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    ('capability', 'vendor', 'faster'),
    [('AVX512', 'AuthenticAMD', True), ('AVX512', 'GenuineIntel', False), ('AVX2', 'AuthenticAMD', False)],
)
def test_where_onednn_is_faster(capability, vendor, faster, monkeypatch, tmp_path):
    monkeypatch.undo()  # of the fixture
    (tmp_path / 'cpuinfo').write_text(f'processor\t: 0\nvendor_id\t: {vendor}\n')
    monkeypatch.setattr(linear, 'CPUINFO', tmp_path / 'cpuinfo')
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    assert linear.onednn_is_faster() is faster


@pytest.mark.parametrize('trained', ['weight', 'bias', 'input'])
def test_gradients_take_the_stock_code(trained, calls):
    layer = nn.Linear(8, 4).requires_grad_(False)
    stock = copy.deepcopy(layer)
    linear.use_onednn_linear(nn.Sequential(layer))
    results = []
    for module in (layer, stock):
        x = draw(5, 8)
        tensor = (x if trained == 'input' else getattr(module, trained)).requires_grad_()
        results.append(torch.autograd.grad(module(x).square().sum(), tensor)[0])
    assert torch.equal(*results) and not calls


def test_frozen_layer_in_training(calls):
    layer = nn.Linear(8, 4).requires_grad_(False)
    linear.use_onednn_linear(nn.Sequential(layer))
    layer(draw(5, 8))
    assert calls == [(5, 8)]


def test_other_modes_take_the_stock_code(calls):
    layer = nn.Linear(8, 4)
    linear.use_onednn_linear(nn.Sequential(layer))
    with torch.no_grad():
        with torch.autocast('cpu', torch.bfloat16):
            assert layer(draw(5, 8)).dtype == torch.bfloat16
        with torch.backends.mkldnn.flags(enabled=False):
            layer(draw(5, 8))
        assert torch.jit.trace(layer, draw(5, 8), check_trace=False).graph.findNode('aten::linear') is not None
        assert layer.double()(draw(5, 8).double()).dtype == torch.float64
    assert not calls


def test_predictors_in_float32_of_a_bfloat16_model(calls, monkeypatch):
    monkeypatch.setattr(low_precision, 'cpu_has_bfloat16', lambda: True)
    net = nn.Sequential(OrderedDict(layer=nn.Linear(8, 8), cls_branches=nn.Linear(8, 3)))
    msda_plugin.accelerate(net.eval(), inference=True, dtype=torch.bfloat16)
    with torch.no_grad():
        net(draw(5, 8))
    assert calls == [(5, 8)]  # the predictor
