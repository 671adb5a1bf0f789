"""Time of each kind of attention against the resolution, measured."""

import math
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import nn

from msda_plugin.layers import MultiScaleDeformableAttention, ShuntedSelfAttention
from msda_plugin.layers.shifted_window_attention import ShiftedWindowAttention
from msda_plugin.layers.spatial_reduction_attention import SpatialReductionAttention
from msda_plugin.tools.benchmarks.timing import Timer

FITTED = 3  # largest sizes that the growth is fitted to; at smaller ones, the cost of a call dominates
WARM_UP_SECONDS = 0.05


def attention_layers(channels: int, num_heads: int) -> dict[str, Callable]:
    """Name -> a function of (side, device) that prepares a call of that layer on a square map of this side."""

    def over_tokens(layer: nn.Module) -> Callable:
        def prepare(side: int, device: torch.device) -> Callable[[], object]:
            placed, x = layer.to(device).eval(), torch.rand(1, side * side, channels, device=device)
            return lambda: placed(x, (side, side))

        return prepare

    def convolution(side: int, device: torch.device) -> Callable[[], object]:
        layer, x = (
            nn.Conv2d(channels, channels, 3, padding=1).to(device),
            torch.rand(1, channels, side, side, device=device),
        )
        return lambda: layer(x)

    def full(side: int, device: torch.device) -> Callable[[], object]:
        layer = nn.MultiheadAttention(channels, num_heads, batch_first=True).to(device).eval()
        x = torch.rand(1, side * side, channels, device=device)
        return lambda: layer(x, x, x, need_weights=False)

    def deformable(side: int, device: torch.device) -> Callable[[], object]:
        layer = MultiScaleDeformableAttention(channels, num_heads, num_levels=1, batch_first=True).to(device).eval()
        x, points = torch.rand(1, side * side, channels, device=device), torch.rand(1, side * side, 1, 2, device=device)
        return lambda: layer(x, value=x, reference_points=points, spatial_shapes=[(side, side)])

    return {
        'convolution 3x3': convolution,
        'full self-attention': full,
        'spatial reduction (PVT), R = 8': over_tokens(SpatialReductionAttention(channels, num_heads, sr_ratio=8)),
        'shunted, R = 8 and 4': over_tokens(ShuntedSelfAttention(channels, num_heads, sr_ratio=8)),
        'linear spatial reduction (PVT v2)': over_tokens(SpatialReductionAttention(channels, num_heads, linear=True)),
        'windows (Swin), M = 7': over_tokens(ShiftedWindowAttention(channels, num_heads)),
        'deformable, one level, K = 4': deformable,
    }


@torch.no_grad()
def measure_growth(
    sides: Sequence[int], channels: int, num_heads: int, device: torch.device, repeats: int = 5
) -> dict[str, list[float]]:
    """Median seconds of each attention on square maps of these sides, (len(sides),) each, batch 1, float32."""
    timer = Timer(device, repeats, WARM_UP_SECONDS)
    return {
        name: [timer.median(prepare(side, device)) for side in sides]
        for name, prepare in attention_layers(channels, num_heads).items()
    }


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The b of seconds = a * size^b, by least squares of the logarithms over the last ``FITTED`` sizes.

    Raises:
        ValueError: If there are fewer than two sizes, or the lengths differ.
    """
    if len(sizes) < 2 or len(sizes) != len(seconds):
        raise ValueError(
            f'got {len(sizes)} sizes and {len(seconds)} times; expected at least two sizes and one time for each to '
            'fit the growth'
        )
    return statistics.linear_regression(
        [math.log(size) for size in sizes[-FITTED:]], [math.log(second) for second in seconds[-FITTED:]]
    ).slope
