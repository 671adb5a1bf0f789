"""Folded batch norms and channels_last: same results, same parameters and checkpoints, undone by restore."""

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from mmcv.cnn import ConvModule
from mmdet.models.backbones import ResNet
from torch import nn

import msda_plugin
from msda_plugin.acceleration import convolutions, fold_batch_norms, use_channels_last
from msda_plugin.backbones.shunted_transformer import ConvNormReLU
from msda_plugin.layers.rep_vgg import RepVGGBlock
from msda_plugin.necks import HybridEncoder


class Residual(nn.Module):
    """Two pairs; the first convolution also has a bias."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Conv2d(8, 8, 1, bias=False)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False)])

    def forward(self, x, scale=2.0):
        y = x
        for conv, norm in zip(self.convs, self.norms, strict=True):
            y = norm(conv(y)).relu()
        return x + y if scale else x


def model(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, padding_mode='reflect'), nn.BatchNorm2d(8), nn.ReLU(), Residual())
    return randomize(net)


def randomize(net):
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.5, 2)
                nn.init.normal_(norm.bias)
    net.eval()
    return net


def images(size=16):
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def run(net, x=None):
    return net(images() if x is None else x)


def count_batch_norms(monkeypatch):
    """A list with one entry per computed batch norm."""
    calls, stock = [], torch.nn.functional.batch_norm
    monkeypatch.setattr(torch.nn.functional, 'batch_norm', lambda *args, **kw: calls.append(1) or stock(*args, **kw))
    return calls


@pytest.mark.parametrize('change', [fold_batch_norms, use_channels_last, lambda net: fold_batch_norms(net.double())])
def test_same_results_and_parameters_until_restored(change):
    net = model()
    stock, parameters = copy.deepcopy(net), list(net.parameters())
    assert change(net) == 3
    x = images().to(net[0].weight.dtype)
    expected = run(stock.to(x.dtype), x)
    torch.testing.assert_close(run(net, x), expected, rtol=1e-5, atol=1e-5)
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert repr(net) == repr(stock)
    for (name, value), (key, original) in zip(net.state_dict().items(), stock.state_dict().items(), strict=True):
        assert name == key and torch.equal(value, original) and value.stride() == original.stride()

    msda_plugin.restore(net)
    assert [(type(a), vars(a).keys()) for a in net.modules()] == [(type(b), vars(b).keys()) for b in stock.modules()]
    assert torch.equal(run(net, x), expected)


def test_folded_batch_norms_are_not_computed(monkeypatch):
    net = model()
    calls = count_batch_norms(monkeypatch)
    fold_batch_norms(net)
    run(net)
    assert not calls
    run(net.train())
    assert len(calls) == 3


def test_channels_last_output():
    net = model()
    assert run(net).is_contiguous()
    assert use_channels_last(net) == 3 and use_channels_last(net) == 0
    assert run(net).is_contiguous(memory_format=torch.channels_last)
    output = net.train()(images())
    assert output.is_contiguous(memory_format=torch.channels_last)
    output.sum().backward()
    assert all(conv.weight.is_contiguous() for conv in net.modules() if isinstance(conv, nn.Conv2d))


@pytest.mark.parametrize('mode', [True, False])
def test_gradients_and_statistics(mode):
    net = model()
    stock = copy.deepcopy(net)
    fold_batch_norms(net)
    gradients = []
    for m in (net, stock):
        x = images().requires_grad_()
        m.train(mode)(x).square().sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in m.parameters())])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0 if mode else 1e-5 * b.abs().max().item())
    torch.testing.assert_close(run(net.eval()), run(stock.eval()), rtol=1e-5, atol=1e-5)  # statistics of the batch


def test_frozen_parts():
    net = model().requires_grad_(False)
    x = images().requires_grad_()
    stock = copy.deepcopy(net)
    fold_batch_norms(net)
    torch.testing.assert_close(net(images()), stock(images()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*(torch.autograd.grad(m(x).sum(), x)[0] for m in (net, stock)), rtol=1e-4, atol=1e-4)


def test_training_stores_less():
    def stored(net):
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = images(64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = net(x)
        return sum(sizes.values()), output

    net = nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.ReLU(inplace=True)).eval()
    stock, _ = stored(net)
    fold_batch_norms(net)
    assert stored(net)[0] < 0.65 * stock  # the input and one map instead of two


@pytest.mark.parametrize('case', ['load', 'copy', 'optimizer', 'data', 'double', 'inference'])
def test_folded_weights_follow_the_parameters(case):
    net, other = model(), model(seed=1)
    fold_batch_norms(net)
    run(net)
    x = images()
    if case == 'load':
        net.load_state_dict(other.state_dict())
    elif case == 'copy':
        for mine, new in zip(net.state_dict().values(), other.state_dict().values(), strict=True):
            mine.copy_(new)
    elif case == 'optimizer':
        net(x).square().sum().backward()
        torch.optim.SGD(net.parameters(), 0.01).step()
        other = msda_plugin.restore(copied := copy.deepcopy(net)) or copied
    elif case == 'data':
        for mine, new in zip(net.state_dict().values(), other.state_dict().values(), strict=True):
            mine.data.copy_(new)
        net.eval()
    elif case == 'double':
        net, other, x = net.double(), model().double(), x.double()
    else:
        with torch.inference_mode():
            net, other = copy.deepcopy(net), copy.deepcopy(other)
            run(net)
            net[0].weight.mul_(2)
            other = msda_plugin.restore(copied := copy.deepcopy(net)) or copied
    torch.testing.assert_close(run(net, x), run(other, x), rtol=1e-5, atol=1e-5)


def test_copies_and_pickles_fold_their_own_parameters():
    net = model()
    fold_batch_norms(net)
    use_channels_last(net)
    expected = run(net)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(run(twin), expected)
        assert twin[0].folded_norm is twin[1]
        twin[1].bias.data.add_(1)
        twin.eval()
        assert not torch.equal(run(twin), expected) and torch.equal(run(net), expected)


class SharedConvolution(Residual):
    def forward(self, x):
        y = self.convs[1](x)
        return self.norms[0](y) + y


class Twice(Residual):
    def forward(self, x):
        return self.norms[0](self.convs[0](self.norms[1](self.convs[0](x))))


class Branches(Residual):
    def forward(self, x):
        return self.norms[0](self.convs[0](x)) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ('net', 'reason'),
    [
        (SharedConvolution(), 'its input is not the output of one convolution, used once'),
        (ConvNormReLU(8, 8, 1), 'the forward of ConvNormReLU does not call it in evaluation mode'),
        (Twice(), 'its input is not the output of one convolution, used once'),
        (Branches(), 'the forward of Branches cannot be traced'),
        (nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)), 'its input is not the output of one convolution'),
        (nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, track_running_stats=False)), 'no running statistics'),
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1)), nn.BatchNorm2d(8)), 'before it is a'),
        (nn.ModuleList([pair := nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)), pair]), 'more than once'),
    ],
)
def test_other_batch_norms_stay_and_are_logged(net, reason, monkeypatch):
    lines = []
    monkeypatch.setattr(convolutions, 'log', lines.append)
    classes = [type(module) for module in net.modules()]
    assert fold_batch_norms(net) == 0
    assert [type(module) for module in net.modules()] == classes
    [line] = lines
    assert reason in line and 'Not folded: ' in line


def test_hooks_keep_a_pair():
    net = model()
    seen = []
    net[0].register_forward_hook(lambda module, args, output: seen.append(output))
    expected = run(net)
    assert fold_batch_norms(net) == 2
    run(net)
    assert torch.equal(*seen)
    torch.testing.assert_close(run(net), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    'net',
    [
        lambda: ResNet(18, base_channels=8, deep_stem=True, norm_eval=True),
        lambda: ResNet(50, base_channels=8),
        lambda: nn.Sequential(*(ConvModule(a, b, 3, norm_cfg=dict(type='BN')) for a, b in pairwise([3, 8, 4]))),
    ],
)
def test_mmdetection(net):
    torch.manual_seed(0)
    net = randomize(net())
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    expected = run(net, images(64))
    assert fold_batch_norms(net) == norms
    torch.testing.assert_close(run(net, images(64)), expected, rtol=1e-5, atol=1e-5)


class ReLUs(nn.Module):
    """Five inputs of an activation: new ones, a value used twice, an argument, and a sum."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.conv = nn.Linear(4, 4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.relus = nn.ModuleList(nn.ReLU() for _ in range(5))

    def forward(self, x):
        first, second, third, fourth, fifth = self.relus
        y = first(self.linear(x)) + second(x)
        z = self.linear(y)
        y = third(z) + z
        y += x
        return fifth(fourth(y) + self.norm(self.conv(y)))


def test_inplace_relu():
    torch.manual_seed(0)
    net = ReLUs().eval()
    x = torch.randn(2, 4, 4, 4)
    before = x.clone()
    expected = run(net, x)
    assert convolutions.use_inplace_relu(net) == 2
    assert [isinstance(relu, convolutions.InplaceReLU) for relu in net.relus] == [True, False, False, False, True]
    fold_batch_norms(net)
    addresses = []
    net.linear.register_forward_hook(lambda module, args, output: addresses.append(output.data_ptr()))
    net.relus[0].register_forward_hook(lambda module, args, output: addresses.append(output.data_ptr()))
    torch.testing.assert_close(run(net, x), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(x, before) and addresses[0] == addresses[1]
    net(x).sum().backward()
    msda_plugin.restore(net)
    assert torch.equal(run(net, x), expected) and {type(relu) for relu in net.relus} == {nn.ReLU}


class Branch(nn.Module):
    def __init__(self, size, **fields):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, size, **dict(padding=size // 2, bias=False) | fields)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Identity()

    def forward(self, x):
        return self.last(self.norm(self.conv(x)))


class Block(nn.Module):
    """As transformers' RT-DETR, with the small kernel first."""

    def __init__(self, first=1, second=3, activation=None, **fields):
        super().__init__()
        self.first, self.second, self.activation = Branch(first), Branch(second, **fields), activation or nn.Identity()

    def forward(self, x):
        return self.activation(self.first(x) + self.second(x))


class BareBlock(Block):
    def forward(self, x):
        return self.second(x) + self.first(x)


class Scaled(Block):
    def forward(self, x):
        return self.activation(2 * self.first(x) + self.second(x))


class OtherInputs(Block):
    def forward(self, x):
        return self.activation(self.first(self.second(x)) + self.second.last(x))


def count_convolutions(monkeypatch):
    """A list with the weight of each convolution."""
    calls, stock = [], nn.functional.conv2d
    monkeypatch.setattr(
        nn.functional, 'conv2d', lambda x, weight, *args: calls.append(weight) or stock(x, weight, *args)
    )
    return calls


@pytest.mark.parametrize('block', [lambda: RepVGGBlock(8), Block, BareBlock, lambda: Block(3, 5, nn.SiLU(), bias=True)])
@pytest.mark.parametrize('channels_last', [False, True])
def test_two_branches_become_one_convolution(block, channels_last, monkeypatch):
    torch.manual_seed(0)
    net = randomize(nn.Sequential(nn.Conv2d(3, 8, 1), block(), block()))
    stock, parameters = copy.deepcopy(net), list(net.parameters())
    expected = run(net)
    msda_plugin.accelerate(net, fold=True, channels_last=channels_last)
    calls = count_convolutions(monkeypatch)
    torch.testing.assert_close(run(net), expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == 3
    assert all(weight.is_contiguous(memory_format=torch.channels_last) == channels_last for weight in calls[1:])
    twin = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    assert torch.equal(run(twin), run(net))
    assert twin[1].branches[0] in set(twin[1].modules())

    # The products follow the parameters.
    for model_ in (net, stock):
        with torch.no_grad():
            model_.get_parameter([name for name, _ in net.named_parameters() if '1.' in name][0]).mul_(2)
    torch.testing.assert_close(run(net), run(stock), rtol=1e-5, atol=1e-5)
    for model_ in (net, stock):
        [norm for norm in model_.modules() if isinstance(norm, nn.BatchNorm2d)][-1].bias.data.add_(1)
        model_.eval()
    torch.testing.assert_close(run(net), run(stock), rtol=1e-5, atol=1e-5)

    # Gradients and batch statistics are those of the branches.
    for mode in (False, True):
        gradients = []
        for model_ in (net, stock):
            model_.train(mode)(images()).square().sum().backward()
            gradients.append([parameter.grad for parameter in model_.parameters()])
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))

    msda_plugin.restore(net)
    assert [(type(a), vars(a).keys()) for a in net.modules()] == [(type(b), vars(b).keys()) for b in stock.modules()]
    torch.testing.assert_close(run(net.eval()), run(stock.eval()), rtol=1e-5, atol=1e-5)  # statistics of the batch


@pytest.mark.parametrize(
    'block', [Scaled(), OtherInputs(), Block(stride=2), Block(padding=0), Block(dilation=2), Block(3, 2, padding=1)]
)
def test_other_sums_stay(block):
    randomize(block)
    assert fold_batch_norms(block) == 2
    assert convolutions.fold_branches(block) == 0
    assert not isinstance(block, convolutions.RepVGG)


def test_hooks_keep_two_branches():
    block = randomize(Block())
    fold_batch_norms(block)
    block.first.register_forward_hook(lambda *_: None)
    assert convolutions.fold_branches(block) == 0


def test_blocks_of_hybrid_encoder():
    torch.manual_seed(0)
    neck = randomize(HybridEncoder([8, 8, 8], 8, num_heads=2, feedforward_channels=16))
    inputs = [torch.randn(1, 8, size, size) for size in (16, 8, 4)]
    with torch.no_grad():
        expected = neck(inputs)
        msda_plugin.accelerate(neck, fold=True)
        blocks = [module for module in neck.modules() if isinstance(module, RepVGGBlock)]
        assert len(blocks) == 12 and all(isinstance(block, convolutions.RepVGG) for block in blocks)
        for a, b in zip(neck(inputs), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
