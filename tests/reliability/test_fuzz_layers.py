"""The attention layers with drawn arguments and inputs: finite numbers of the right shape, or what does not fit."""

import warnings

import torch
from fuzzing import fuzz, one_sentence
from hypothesis import strategies as st

from msda_plugin.layers import (
    DeformableAttention,
    DeformableMultiHeadAttention,
    MultiScaleDeformableAttention,
    ShiftedWindowAttention,
    ShuntedSelfAttention,
    SpatialReductionAttention,
)

sizes = st.sampled_from((5, 8, 9, 4) * 4 + (1, 2, 0, -1))
counts = st.sampled_from((1, 2) * 6 + (3, 4, 0, -1))
dims = st.sampled_from((8, 12) * 5 + (4, 6, 1, 0, -4, 7))
ratios = st.sampled_from((1, 2, 4) * 3 + (3, 0, -2))
common = dict(embed_dims=dims, num_heads=counts)

ARGUMENTS = {
    MultiScaleDeformableAttention: dict(common, num_levels=counts, num_points=counts, batch_first=st.booleans()),
    DeformableAttention: dict(common, num_points=counts, batch_first=st.sampled_from((True,) * 7 + (False,))),
    DeformableMultiHeadAttention: dict(
        common,
        num_groups=counts,
        map_size=st.one_of(sizes, st.tuples(sizes, sizes), st.none()),
        kernel_size=counts,
        stride=counts,
        offset_range_factor=st.sampled_from((2.0, 0.0, -1.0)),
        version=st.sampled_from(('v1', 'v2') * 5 + ('v3',)),
        positional=st.sampled_from(('rpe_table', 'dwc_pe', 'fixed_pe', 'log_cpb', 'none') * 3 + ('other',)),
    ),
    ShuntedSelfAttention: dict(common, sr_ratio=ratios, qkv_bias=st.booleans()),
    SpatialReductionAttention: dict(common, sr_ratio=ratios, linear=st.booleans(), add_identity=st.booleans()),
    ShiftedWindowAttention: dict(common, window_size=counts, shift_size=st.integers(-1, 3), qkv_bias=st.booleans()),
}
inputs = st.fixed_dictionaries(
    dict(
        batch=st.integers(0, 2),
        height=sizes,
        width=sizes,
        levels=counts,
        boxes=st.sampled_from((2, 4) * 5 + (3,)),
        more_tokens=st.sampled_from((0,) * 11 + (1,)),
        more_channels=st.sampled_from((0,) * 11 + (1,)),
        less_dimensions=st.sampled_from((False,) * 11 + (True,)),
        value=st.booleans(),
        training=st.booleans(),
        seed=st.integers(0, 99),
    )
)
cases = st.one_of(
    [st.tuples(st.just(layer), st.fixed_dictionaries(drawn), inputs) for layer, drawn in ARGUMENTS.items()]
)


def tokens(drawn, number, channels):
    sizes = (drawn['batch'], max(number + drawn['more_tokens'], 0), max(channels + drawn['more_channels'], 0))
    return torch.randn(sizes[1:] if drawn['less_dimensions'] else sizes)


def call(layer, drawn):
    """(what the layer gives, the shape that it must have)"""
    height, width, channels = drawn['height'], drawn['width'], layer.embed_dims
    if isinstance(layer, DeformableMultiHeadAttention):
        x = torch.randn(drawn['batch'], max(channels + drawn['more_channels'], 0), max(height, 0), max(width, 0))
        x = x[0] if drawn['less_dimensions'] and drawn['batch'] else x
        return layer(x), x.shape
    if isinstance(layer, MultiScaleDeformableAttention):
        levels = 1 if isinstance(layer, DeformableAttention) and drawn['levels'] == 2 else drawn['levels']
        shapes = [(height, width)] * levels
        value = tokens(drawn, sum(h * w for h, w in shapes), channels)
        query = torch.randn(drawn['batch'], 3, channels) if drawn['value'] else value
        points = torch.rand(*query.shape[:2], max(levels, 0), drawn['boxes'])
        if not layer.batch_first:
            query, value = (x.transpose(0, 1) for x in (query, value))
        return layer(query, value=value, reference_points=points, spatial_shapes=shapes), query.shape
    x = tokens(drawn, height * width, channels)
    return layer(x, (height, width)), x.shape


def check(case):
    kind, arguments, drawn = case
    torch.manual_seed(drawn['seed'])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # mmcv's, on heads whose size is no power of 2
        try:
            layer = kind(**arguments)
        except (TypeError, ValueError) as error:
            return f'{one_sentence(error)} when built'
        layer.train(drawn['training'])
        try:
            output, shape = call(layer, drawn)
        except (TypeError, ValueError) as error:
            return f'{one_sentence(error)} when called'
    assert output.shape == shape and output.isfinite().all()
    return 'right'


def test_layers(long_run):
    fuzz('layers', cases, 2000 if long_run else 80, check)
