"""How the time of each attention grows with the resolution, by the clock."""

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from msda_plugin.layers import MultiScaleDeformableAttention, ShuntedSelfAttention
from msda_plugin.layers.shifted_window_attention import ShiftedWindowAttention
from msda_plugin.layers.spatial_reduction_attention import SpatialReductionAttention

FITTED = 3  # sizes, the largest, that the growth is fitted to: smaller ones show what a call costs
WARM_UP_SECONDS = 0.05


def attention_layers(channels: int, num_heads: int) -> dict[str, Callable]:
    """Name -> a function of (side, device) that returns a call of that layer on a square map of that side."""

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


def measure(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of a call, after as many calls that are not counted as fill ``WARM_UP_SECONDS``."""

    def timed() -> float:
        start = time.perf_counter()
        call()
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    spent = timed()
    while spent < WARM_UP_SECONDS:
        spent += timed()
    return statistics.median(timed() for _ in range(repeats))


@torch.no_grad()
def measure_growth(
    sides: Sequence[int], channels: int, num_heads: int, device: torch.device, repeats: int = 5
) -> dict[str, list[float]]:
    """Seconds of each attention on square maps of these sides, (len(sides),) each, batch 1, float32."""
    return {
        name: [measure(prepare(side, device), device, repeats) for side in sides]
        for name, prepare in attention_layers(channels, num_heads).items()
    }


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The b of seconds = a * size^b, by least squares of the logarithms over the last ``FITTED`` sizes.

    Raises:
        ValueError: there are fewer than two sizes.
    """
    if len(sizes) < 2 or len(sizes) != len(seconds):
        raise ValueError(
            f'a growth is fitted to at least two sizes and as many times, but {len(sizes)} sizes and '
            f'{len(seconds)} times came'
        )
    return statistics.linear_regression(
        [math.log(size) for size in sizes[-FITTED:]], [math.log(second) for second in seconds[-FITTED:]]
    ).slope
