"""DAT's deformable attention against published values and against its formula with the scores stored."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from msda_plugin.convert import convert_state_dict
from msda_plugin.layers import deformable_multi_head_attention as module
from msda_plugin.layers.deformable_multi_head_attention import DeformableMultiHeadAttention
from msda_plugin.registry import MODELS

GOLDEN = Path(__file__).parents[1] / 'golden'
sys.path.insert(0, str(GOLDEN))
import recipe  # noqa: E402

V2 = dict(version='v2')
CASES = {
    'v1_rpe': ((2, 96, 14, 14), dict(num_heads=6, num_groups=3, map_size=14)),
    'v2_rpe': ((2, 96, 14, 14), dict(num_heads=6, num_groups=3, map_size=14, offset_range_factor=-1, **V2)),
    'v2_rpe_tanh_stride2': ((1, 64, 16, 16), dict(num_heads=4, num_groups=2, map_size=16, stride=2, **V2)),
    'v2_dwc': ((1, 64, 12, 18), dict(num_heads=4, num_groups=2, kernel_size=3, positional='dwc_pe', **V2)),
    'v2_cpb': (
        (1, 64, 14, 14),
        dict(num_heads=4, num_groups=2, kernel_size=3, positional='log_cpb', offset_range_factor=-1, **V2),
    ),
}
# Every positional mode and rule for the offsets, on a map of another size than the tables'.
FORMS = {
    'v1 rpe': dict(map_size=(4, 6)),
    'v1 rpe, free offsets': dict(map_size=(5, 7), offset_range_factor=-1),
    'v1 rpe, raw offsets, stride': dict(map_size=6, offset_range_factor=0, stride=2, kernel_size=3),
    'v1 fixed': dict(map_size=(4, 6), positional='fixed_pe', kernel_size=3, stride=2),
    'v1 fixed, its own size': dict(map_size=(5, 7), positional='fixed_pe'),
    'v2 rpe': dict(map_size=(4, 6), **V2),
    'v2 rpe, no offsets': dict(map_size=6, offset_range_factor=0, **V2),
    'v2 cpb, clamped': dict(positional='log_cpb', offset_range_factor=-1, **V2),
    'v2 dwc': dict(positional='dwc_pe', kernel_size=2, stride=2, **V2),
    'v2 none': dict(positional='none', kernel_size=3, **V2),
}


def make_layer(form, dims=16, heads=4, groups=2, **options):
    torch.manual_seed(0)
    layer = DeformableMultiHeadAttention(dims, heads, groups, **FORMS[form], **options)
    if hasattr(layer.position_bias, 'table'):
        torch.nn.init.normal_(layer.position_bias.table)
    torch.nn.init.normal_(layer.offset_proj.weight)
    return layer.double()


def plain_attention(layer, x, form):
    """The layer's formula on full matrices: softmax(q k^T / sqrt(d) + bias) v."""
    options = dict(positional='rpe_table', version='v1', offset_range_factor=2, kernel_size=5, stride=1) | FORMS[form]
    v1, factor, positional = options['version'] == 'v1', options['offset_range_factor'], options['positional']
    (batch, dims, height, width), heads, groups = x.shape, layer.num_heads, layer.num_groups

    def conv1x1(linear, fmap):
        return F.conv2d(fmap, linear.weight[:, :, None, None], linear.bias)

    def axis(side, first):
        i = torch.arange(side, dtype=x.dtype)
        return (i + 0.5) / side * 2 - 1 if v1 else (i + first) / (side - 1) * 2 - 1

    def grid(h, w, first):
        return torch.stack(torch.meshgrid(axis(h, first), axis(w, first), indexing='ij'), -1)

    query = conv1x1(layer.query, x)
    padding = 0 if not v1 and options['kernel_size'] == options['stride'] else options['kernel_size'] // 2
    offset = F.conv2d(
        query.reshape(batch * groups, -1, height, width),
        layer.offset_conv.weight,
        layer.offset_conv.bias,
        options['stride'],
        padding,
        groups=dims // groups,
    )
    offset = F.gelu(layer.offset_norm(offset.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
    offset = conv1x1(layer.offset_proj, offset)
    hk, wk = offset.shape[2:]
    if factor > 0 or (factor == 0 and not v1):
        cells = torch.tensor([hk, wk] if v1 else [hk - 1, wk - 1]).view(1, 2, 1, 1)
        offset = offset.tanh() * factor / cells
    position = offset.permute(0, 2, 3, 1) + grid(hk, wk, 0.5)
    if factor < 0:
        position = position.tanh() if v1 else position.clamp(-1, 1)
    sampled = F.grid_sample(x.reshape(batch * groups, -1, height, width), position[..., (1, 0)], align_corners=True)
    sampled = sampled.reshape(batch, dims, hk, wk)
    q, k, v = (
        t.reshape(batch, heads, dims // heads, -1)
        for t in (query, conv1x1(layer.key, sampled), conv1x1(layer.value, sampled))
    )
    scores = q.transpose(2, 3) @ k / (dims // heads) ** 0.5
    delta = grid(height, width, 0).view(1, -1, 1, 2) - position.view(batch * groups, 1, -1, 2)
    if positional == 'rpe_table':
        table = layer.position_bias.table
        if v1:
            table = F.interpolate(table[None], (2 * height - 1, 2 * width - 1), mode='bicubic')[0]
        table = table.reshape(1, groups, heads // groups, *table.shape[1:]).expand(batch, -1, -1, -1, -1).flatten(0, 1)
        bias = F.grid_sample(table, delta[..., (1, 0)] / 2, align_corners=True)
        scores = scores + bias.reshape(batch, heads, height * width, -1)
    elif positional == 'fixed_pe':
        table = layer.position_bias.table.unflatten(1, layer.position_bias.map_size)
        table = F.interpolate(table.permute(0, 3, 1, 2), (height, width), mode='bicubic')  # the queries' axes
        table = table.flatten(2).transpose(1, 2).unflatten(2, layer.position_bias.num_points)
        scores = scores + F.interpolate(table, (hk, wk), mode='bicubic').flatten(2)  # the points'
    elif positional == 'log_cpb':
        bias = layer.position_bias.mlp((4 * delta).sign() * (4 * delta).abs().add(1).log2() / np.log2(8))
        scores = scores + bias.unflatten(0, (batch, groups)).permute(0, 1, 4, 2, 3).flatten(1, 2)
    out = (v @ scores.softmax(-1).transpose(2, 3)).reshape(batch, dims, height, width)
    if positional == 'dwc_pe':
        out = out + layer.position_conv(query)
    return conv1x1(layer.proj, out)


@pytest.mark.parametrize('case', CASES)
def test_matches_the_published_values(case):
    shape, options = CASES[case]
    shapes = json.loads((GOLDEN / 'dat_state_dict.json').read_text())[f'attn_{case}']
    upstream = recipe.fill({key: torch.zeros(size) for key, size in shapes.items()})
    layer = DeformableMultiHeadAttention(shape[1], **options).eval()
    layer.load_state_dict(convert_state_dict(upstream, 'dat'))
    with torch.inference_mode():
        out, points = layer(recipe.tensor('x' + 'x'.join(map(str, shape)), shape), return_points=True)
    golden = np.load(GOLDEN / f'dat_attn_{case}.npz')
    for value, key in ((out, 'y'), (points.positions, 'pos'), (points.references, 'ref')):
        expected = torch.from_numpy(golden[key])
        assert value.shape == expected.shape
        assert (value - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max())


@pytest.mark.parametrize('chunk_bytes', [2**25, 10000])
@pytest.mark.parametrize('form', FORMS)
def test_matches_plain_attention_in_float64(form, chunk_bytes, monkeypatch):
    monkeypatch.setattr(module, 'CHUNK_BYTES', chunk_bytes)
    layer = make_layer(form)
    x = torch.randn(2, 16, 5, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    out, expected = layer(x), plain_attention(layer, x, form)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    inputs = [x, *layer.parameters()]
    for grad, reference in zip(
        torch.autograd.grad((out * weight).sum(), inputs, materialize_grads=True),
        torch.autograd.grad((expected * weight).sum(), inputs, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(grad, reference, rtol=0, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_queries_are_split_if_their_biases_are_large(monkeypatch):
    layer = make_layer('v1 rpe')
    x = torch.randn(1, 16, 5, 7, dtype=torch.float64)
    parts = []
    attend = F.scaled_dot_product_attention

    def watch(query, key, value, bias, dropout):
        parts.append(tuple(bias.shape))
        return attend(query, key, value, bias, dropout)

    monkeypatch.setattr(F, 'scaled_dot_product_attention', watch)
    # A query takes 35 points x (4 heads + 2 coordinates x 2 groups) x 8 bytes.
    monkeypatch.setattr(module, 'CHUNK_BYTES', 16 * 35 * 8 * 8)
    with torch.no_grad():
        layer(x)
    assert parts == [(1, 4, 16, 35), (1, 4, 16, 35), (1, 4, 3, 35)]


@pytest.mark.parametrize('chunk_bytes', [2**25, 1000])
@pytest.mark.parametrize('form', ['v1 rpe', 'v1 fixed', 'v2 cpb, clamped', 'v2 dwc'])
def test_gradcheck(form, chunk_bytes, monkeypatch):
    monkeypatch.setattr(module, 'CHUNK_BYTES', chunk_bytes)
    layer = make_layer(form, dims=4, heads=2)
    x = torch.randn(1, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    names = [name for name in ('offset_proj.weight', 'position_bias.table') if name in dict(layer.named_parameters())]

    def run(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    parameters = (layer.get_parameter(name).detach().requires_grad_() for name in names)
    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize('form', [form for form in FORMS if form != 'v2 dwc'])
def test_one_pixel(form):
    """The reference is the center of the map, also in 'v2', whose grid formula would divide by zero."""
    layer = make_layer(form)
    out, points = layer(torch.randn(1, 16, 1, 1, dtype=torch.float64), return_points=True)
    assert out.shape == (1, 16, 1, 1) and out.isfinite().all()
    assert not points.references.any()


def test_returned_points():
    layer = make_layer('v1 rpe')
    x = torch.randn(3, 16, 5, 7, dtype=torch.float64)
    out, points = layer(x, return_points=True)
    assert torch.equal(out, layer(x))
    assert all(t.shape == (3, 2, 5, 7, 2) for t in points)
    assert torch.equal(points.positions, points.references + points.offsets)
    reach = points.offsets.abs().amax((0, 1, 2, 3))
    assert (reach <= 2 / torch.tensor([5, 7])).all() and (reach > 0.5 / torch.tensor([5, 7])).all()
    # (y, x), y changes along the rows.
    assert points.references[0, 0, :, 0, 0].tolist() == pytest.approx([-0.8, -0.4, 0, 0.4, 0.8])


def test_layouts_give_the_same_results():
    layer = make_layer('v1 rpe')
    x = torch.randn(2, 16, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x.contiguous(memory_format=torch.channels_last)), layer(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('form', ['v1 rpe', 'v1 fixed', 'v2 cpb, clamped', 'v2 dwc'])
def test_low_precision_keeps_positions_in_float32(form, dtype):
    layer = make_layer(form).float()
    x = torch.randn(2, 16, 5, 7)
    expected, reference = layer(x, return_points=True)
    with torch.autocast('cpu', dtype):
        out, points = layer(x, return_points=True)
    out.float().square().mean().backward()
    assert out.dtype == dtype and points.positions.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    torch.testing.assert_close(points.references, reference.references)
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)
    halved = layer.to(dtype)(x.to(dtype))
    assert halved.dtype == dtype
    torch.testing.assert_close(halved.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize('chunk_bytes', [2**25, 20000])
def test_dropout_acts_in_training_only(chunk_bytes, monkeypatch):
    monkeypatch.setattr(module, 'CHUNK_BYTES', chunk_bytes)
    layer = make_layer('v1 rpe', attn_drop_rate=0.5)
    x = torch.randn(1, 16, 5, 7, dtype=torch.float64)
    assert torch.equal(layer.eval()(x), layer(x))
    assert not torch.equal(layer.train()(x), layer(x))
    # The backward pass uses the forward's dropout, also for recomputed parts: the step is linear in `value`.
    torch.manual_seed(3)
    out = layer(x)
    (grad,) = torch.autograd.grad(out.sum(), layer.value.weight)
    with torch.no_grad():
        layer.value.weight[3, 5] += 1.0
    torch.manual_seed(3)
    assert (layer(x) - out).sum().item() == pytest.approx(grad[3, 5].item(), abs=1e-9)


def test_builds_from_the_registry():
    layer = MODELS.build(
        dict(
            type='msda_plugin.DeformableMultiHeadAttention', embed_dims=16, num_heads=4, num_groups=2, positional='none'
        )
    )
    assert layer(torch.rand(1, 16, 3, 5)).shape == (1, 16, 3, 5)


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(embed_dims=30, num_heads=4), 'embed_dims=30 is not a multiple of num_heads=4'),
        (dict(num_groups=3), 'num_heads=4 is not a multiple of num_groups=3'),
        (dict(num_groups=0), 'not a multiple of num_groups=0'),
        (dict(version='v3'), "unknown version 'v3'; known: \\['v1', 'v2'\\]"),
        (dict(positional='rpe'), "unknown positional 'rpe'; known: \\['rpe_table', "),
        (dict(map_size=None), 'map_size=None; expected \\(H, W\\), both at least 1: the table'),
        (dict(map_size=(0, 3)), 'map_size=\\(0, 3\\); expected'),
        (dict(stride=0), 'stride=0; expected at least 1 for both'),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        DeformableMultiHeadAttention(**dict(embed_dims=32, num_heads=4, num_groups=2, map_size=7) | options)


def test_bad_input():
    layer = make_layer('v2 dwc')
    with pytest.raises(ValueError, match='expected \\(B, 16, H, W\\)'):
        layer(torch.rand(1, 8, 5, 5))
    with pytest.raises(ValueError, match='got a 1x5 map, which is too small for one point; give at least 2 rows'):
        layer(torch.rand(1, 16, 1, 5))
