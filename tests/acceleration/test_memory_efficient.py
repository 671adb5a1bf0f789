"""Memory-efficient layers give the stock results, from the same random numbers."""

import copy

import pytest
import torch
from mmengine.model import Sequential
from torch import nn

from msda_plugin.acceleration.memory_efficient import Dropout, LinearReLUDropout, MultiheadAttention


def run(module, x):
    torch.manual_seed(7)
    x = x.clone().requires_grad_()
    output = module(x)
    output.square().sum().backward()
    return [output.detach(), x.grad, *(p.grad for p in module.parameters()), torch.rand(3)]


def stored_bytes(module, x):
    """Bytes stored for the backward pass, without the module's weights and the input; and the output."""
    kept = {}
    own = {t.data_ptr() for t in [x, *module.parameters()]}

    def keep(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(x)
    return sum(kept.values()), output


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('p', [0.0, 0.3, 1.0])
def test_dropout_equals_pytorch(p, training):
    x = torch.randn(3, 5, 8)
    for got, expected in zip(run(Dropout(p).train(training), x), run(nn.Dropout(p).train(training), x), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('p', [0.0, 0.3, 1.0])
def test_linear_relu_dropout_equals_its_parts(p, training):
    torch.manual_seed(0)
    parts = Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Dropout(p)).train(training)
    ours = LinearReLUDropout(*copy.deepcopy(parts)).train(training)
    x = torch.randn(3, 5, 8)
    for got, expected in zip(run(ours, x), run(parts, x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_gradients():
    module = LinearReLUDropout(nn.Linear(3, 4), nn.ReLU(), nn.Dropout(0.4)).double()

    def same_noise(x):
        torch.manual_seed(1)
        return module(x)

    x = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    assert torch.autograd.gradcheck(same_noise, x)
    assert torch.autograd.gradgradcheck(same_noise, x)


def test_stored_bytes():
    x = torch.randn(100, 32, requires_grad=True)
    kept, output = stored_bytes(Dropout(0.1), x)
    assert kept == output.numel()
    kept, output = stored_bytes(LinearReLUDropout(nn.Linear(32, 64), nn.ReLU(), nn.Dropout(0.1)), x)
    assert kept == output.nbytes


def test_hooks_on_the_parts_are_called():
    module = LinearReLUDropout(nn.Linear(3, 4), nn.ReLU(), nn.Dropout(0.4))
    calls = []
    for part in module:
        part.register_forward_hook(lambda part, args, output: calls.append(type(part)))
    module(torch.rand(2, 3))
    assert calls == [nn.Linear, nn.ReLU, nn.Dropout]


@pytest.mark.parametrize('batch_first', [False, True])
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('masked', [False, True])
def test_attention_equals_pytorch(masked, training, batch_first):
    torch.manual_seed(0)
    stock = nn.MultiheadAttention(16, 4, dropout=0.2, batch_first=batch_first).train(training)
    ours = MultiheadAttention(16, 4, dropout=0.2, batch_first=batch_first).train(training)
    ours.load_state_dict(stock.state_dict())
    masks = dict(attn_mask=torch.rand(8, 5, 7) < 0.3) if masked else {}
    shape = (lambda n: (2, n, 16)) if batch_first else (lambda n: (n, 2, 16))
    query, key = torch.randn(shape(5)), torch.randn(shape(7))
    results = []
    for module in (ours, stock):
        torch.manual_seed(7)
        query.grad = None
        output, weights = module(query.requires_grad_(), key, value=key, **masks)
        output.square().sum().backward()
        results.append([output.detach(), query.grad, module.in_proj_weight.grad, torch.rand(3)])
        assert (weights is None) == (module is ours)
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_attention_with_a_hook_computes_its_weights():
    module = MultiheadAttention(16, 4)
    seen = []
    module.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    module(*torch.rand(3, 5, 2, 16))
    assert seen[0].shape == (2, 5, 5)
