"""The cost formulas against torch's FLOP counter on real layers."""

import pytest
import torch
from mmcv.ops import ModulatedDeformConv2dPack
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from msda_plugin import costs, ops
from msda_plugin.costs.counting import count_macs
from msda_plugin.layers import MultiScaleDeformableAttention, ShuntedSelfAttention
from msda_plugin.layers.shifted_window_attention import ShiftedWindowAttention
from msda_plugin.layers.spatial_reduction_attention import SpatialReductionAttention

SIZES = [(14, 21), (16, 16), (9, 25)]


def count(layer, *args, **kwargs):
    return count_macs(layer.eval(), lambda: layer(*args, **kwargs))['']


@pytest.mark.parametrize('height, width', SIZES)
@pytest.mark.parametrize('kernel_size', [1, 3, 5])
def test_convolution(height, width, kernel_size):
    layer = nn.Conv2d(12, 12, kernel_size, padding=kernel_size // 2)
    expected = costs.convolution(height, width, 12, kernel_size)
    assert count(layer, torch.rand(1, 12, height, width)) == expected.macs


@pytest.mark.parametrize('num_queries, num_keys', [(30, 30), (7, 50)])
def test_attention(num_queries, num_keys):
    layer = nn.MultiheadAttention(32, 4, batch_first=True)
    query, key = torch.rand(1, num_queries, 32), torch.rand(1, num_keys, 32)
    expected = costs.cross_attention(num_queries, num_keys, 32, 4)
    assert count(layer, query, key, key, need_weights=False) == expected.macs
    assert expected.memory == num_queries * 32 + 2 * num_keys * 32 + 4 * num_queries * num_keys


def test_vit_and_detr_are_sums_of_attention():
    assert costs.vit_attention(224, 220, 192, 16, 3) == costs.self_attention(14 * 14, 192, 3)
    assert costs.detr_encoder_layer(25, 34, 256) == costs.self_attention(850, 256)
    assert costs.detr_decoder_layer(100, 25, 34, 256) == (
        costs.self_attention(100, 256) + costs.cross_attention(100, 850, 256)
    )


@pytest.mark.parametrize('height, width', SIZES)
@pytest.mark.parametrize('reduction', [1, 2, 4])
def test_spatial_reduction(height, width, reduction):
    layer = SpatialReductionAttention(32, 4, sr_ratio=reduction)
    expected = costs.spatial_reduction_attention(height, width, 32, reduction, 4)
    assert count(layer, torch.rand(1, height * width, 32), (height, width)) == expected.macs


@pytest.mark.parametrize('height, width', SIZES)
def test_linear_spatial_reduction(height, width):
    layer = SpatialReductionAttention(32, 4, linear=True)
    expected = costs.linear_spatial_reduction_attention(height, width, 32, 4)
    assert count(layer, torch.rand(1, height * width, 32), (height, width)) == expected.macs


@pytest.mark.parametrize('height, width', SIZES)
@pytest.mark.parametrize('shift', [0, 3])
def test_windows(height, width, shift):
    layer = ShiftedWindowAttention(32, 4, window_size=7, shift_size=shift)
    expected = costs.window_attention(height, width, 32, 7, 4)
    assert count(layer, torch.rand(1, height * width, 32), (height, width)) == expected.macs


@pytest.mark.parametrize('height, width', SIZES)
@pytest.mark.parametrize('reduction', [1, 2, 8])
def test_shunted(height, width, reduction):
    layer = ShuntedSelfAttention(32, 4, reduction)
    expected = costs.shunted_attention(height, width, 32, reduction, 4)
    assert count(layer, torch.rand(1, height * width, 32), (height, width)) == expected.macs


@pytest.mark.parametrize('num_queries', [1, 40])
def test_deformable(num_queries):
    shapes = [(9, 11), (5, 6)]
    layer = MultiScaleDeformableAttention(32, 4, num_levels=2, num_points=3, batch_first=True)
    value = torch.rand(1, 129, 32)
    counted = count(
        layer,
        torch.rand(1, num_queries, 32),
        value=value,
        spatial_shapes=shapes,
        level_start_index=torch.tensor([0, 99]),
        reference_points=torch.rand(1, num_queries, 2, 2),
    )
    assert counted == costs.deformable_attention(num_queries, 129, 32, 4, 2, 3).macs


def test_torchs_counter_sees_the_layer_forward_and_backward():
    layer = MultiScaleDeformableAttention(32, 4, num_levels=2, num_points=3, batch_first=True).train()
    query, value = torch.rand(2, 40, 32, requires_grad=True), torch.rand(2, 129, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        out = layer(
            query,
            value=value,
            spatial_shapes=[(9, 11), (5, 6)],
            level_start_index=torch.tensor([0, 99]),
            reference_points=torch.rand(2, 40, 2, 2),
        )
        forward = counter.get_total_flops()
        out.sum().backward()
    macs = 2 * costs.deformable_attention(40, 129, 32, 4, 2, 3).macs  # batch 2
    assert forward == 2 * macs
    assert counter.get_total_flops() == 3 * 2 * macs


def test_torchs_counter_sees_the_plain_operator():
    value = torch.rand(2, 129, 4, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        out = ops.ms_deform_attn(
            value, [(9, 11), (5, 6)], None, torch.rand(2, 40, 4, 2, 3, 2), torch.rand(2, 40, 4, 2, 3)
        )
        out.sum().backward()
    flops = 2 * 2 * costs.deformable_attention(40, 129, 32, 4, 2, 3).mixing
    assert counter.get_flop_counts()['Global'] == {
        torch.ops.msda.ms_deform_attn: flops,
        torch.ops.msda.ms_deform_attn_backward: 2 * flops,
    }


def test_torchs_counter_sees_points_per_level():
    value = torch.rand(2, 129, 4, 8)
    with FlopCounterMode(display=False) as counter:
        ops.ms_deform_attn(
            value, [(9, 11), (5, 6)], None, torch.rand(2, 40, 4, 6, 2), torch.rand(2, 40, 4, 6), num_points=[2, 4]
        )
    assert counter.get_total_flops() == 2 * 2 * costs.deformable_attention(40, 129, 32, 4, 2, 3).mixing


def test_views_of_parameters_may_be_arguments():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.linear = nn.Parameter(torch.rand(5, 16)), nn.Linear(8, 16)

        def forward(self):
            query, query_pos = self.query.split(8, 1)
            return self.linear(query) + self.linear(query_pos)

    model = Model()
    assert count_macs(model, model) == {'': 1280, 'linear': 1280}
    assert model.query.requires_grad


class Counted(float):
    """A number that counts the products it takes part in."""

    products = 0

    def __mul__(self, other):
        Counted.products += 1
        return Counted(float(self) * float(other))

    def __add__(self, other):
        return Counted(float(self) + float(other))


def test_macs_of_a_sample():
    """Equation 2 of Deformable DETR for one channel of one sample, number by number."""
    neighbors, weights = [Counted(v) for v in (1.0, 2.0, 3.0, 4.0)], [Counted(w) for w in (0.1, 0.2, 0.3, 0.4)]
    Counted.products = 0
    value = Counted(0)
    for neighbor, weight in zip(neighbors, weights, strict=True):
        value = value + neighbor * weight
    assert float(value * Counted(0.5)) == pytest.approx(1.5)
    assert Counted.products == costs.formulas.MACS_PER_SAMPLE


def test_growth_with_resolution():
    """Four times the pixels: sixteen times the mixing of full attention, four times that of the linear ones."""

    def growth(cost, *rest):
        return cost(56, 56, *rest).mixing / cost(28, 28, *rest).mixing

    assert growth(lambda h, w: costs.self_attention(h * w, 64)) == 16
    assert growth(costs.spatial_reduction_attention, 64, 4) == 16
    assert growth(costs.shunted_attention, 64, 4) == 16
    assert growth(costs.linear_spatial_reduction_attention, 64) == 4
    assert growth(costs.window_attention, 64, 7) == 4
    assert growth(lambda h, w: costs.deformable_attention(h * w, h * w, 64)) == 4
    assert costs.deformable_attention(300, 10_000, 64).mixing == costs.deformable_attention(300, 40_000, 64).mixing


def test_modules_of_a_model_are_counted_once_each():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Sequential(nn.Linear(16, 4)))
    assert count_macs(model, lambda: model(torch.rand(3, 8))) == {'': 576, '0': 384, '2': 192, '2.0': 192}
    assert count_macs(model, lambda: (model(torch.rand(3, 8)), model(torch.rand(1, 8))))['2.0'] == 256


def test_deformable_convolutions_are_counted():
    model = nn.Sequential(ModulatedDeformConv2dPack(8, 12, 3, padding=1))
    samples = 5 * 6 * 9
    offsets = samples * 8 * 27  # a convolution to 2 coordinates and a weight for each of 9 taps
    counted = count_macs(model, lambda: model(torch.rand(1, 8, 5, 6)))
    assert counted[''] == counted['0'] == samples * 8 * (12 + 5) + offsets
