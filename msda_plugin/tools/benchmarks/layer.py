"""``benchmark layer``: each attention layer against the stock layer with the same weights."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from mmcv.ops import MultiScaleDeformableAttention as MMCVDeformableAttention
from mmdet.models.backbones.pvt import SpatialReductionAttention as MMDetSpatialReductionAttention
from mmdet.models.backbones.swin import ShiftWindowMSA
from torch import Tensor, nn

from msda_plugin.layers import (
    DeformableAttention,
    DeformableMultiHeadAttention,
    MultiScaleDeformableAttention,
    ShiftedWindowAttention,
    ShuntedSelfAttention,
    SpatialReductionAttention,
)
from msda_plugin.layers.attention_weights import attention_weights
from msda_plugin.layers.token_layout import map_to_tokens, merge_heads, tokens_to_map
from msda_plugin.tools.benchmarks.backbone import plain_attention
from msda_plugin.tools.benchmarks.comparison import Comparison, Measurement
from msda_plugin.tools.benchmarks.options import add_options, describe_machine
from msda_plugin.tools.benchmarks.timing import Timer

QUERIES = 300
STRIDES = (8, 16, 32, 64)
Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: The layer and the origin of its sizes.
        stock: 'mmcv', 'mmdet', or 'plain': the published arithmetic step by step, where no stock layer exists.
        channels: Channels of the feature maps.
        strides: Strides of the feature maps.
        build: (levels, device) -> the modules whose gradients are computed, and two functions that call the stock
            layer and ours with the input (B, N, C).
        tokens: levels -> N.
    """

    name: str
    stock: str
    channels: int
    strides: tuple[int, ...]
    build: Callable[[list[tuple[int, int]], torch.device], tuple[list[nn.Module], Run, Run]]
    tokens: Callable[[list[tuple[int, int]]], int]


def pixels(levels: list[tuple[int, int]]) -> int:
    return sum(height * width for height, width in levels)


def same_weights(stock: nn.Module, ours: nn.Module, device: torch.device) -> list[nn.Module]:
    """Both modules in evaluation mode on the device; weights that are initially zero are drawn before the copy."""
    for name in ('sampling_offsets', 'attention_weights'):
        if hasattr(stock, name):
            nn.init.normal_(getattr(stock, name).weight, std=0.05)
    ours.load_state_dict(stock.state_dict())
    return [module.to(device).eval() for module in (stock, ours)]


def deformable(levels: list[tuple[int, int]], device: torch.device, decoder: bool) -> tuple[list[nn.Module], Run, Run]:
    fields = dict(embed_dims=256, num_heads=8, num_levels=len(levels), dropout=0.0, batch_first=True)
    modules = same_weights(
        MMCVDeformableAttention(**fields),
        MultiScaleDeformableAttention(**fields) if len(levels) > 1 else DeformableAttention(256, 8, dropout=0.0),
        device,
    )
    shapes = torch.tensor(levels, device=device)
    areas = shapes.prod(1)
    queries = QUERIES if decoder else pixels(levels)
    value = torch.rand(1, pixels(levels), 256, device=device) if decoder else None
    given = dict(
        value=value,
        reference_points=torch.rand(1, queries, len(levels), 2, device=device),
        spatial_shapes=shapes,
        level_start_index=areas.cumsum(0) - areas,
    )
    return modules, *(partial(module, **given) for module in modules)


def reduced(levels: list[tuple[int, int]], device: torch.device) -> tuple[list[nn.Module], Run, Run]:
    modules = same_weights(
        MMDetSpatialReductionAttention(64, 1, sr_ratio=8), SpatialReductionAttention(64, 1, sr_ratio=8), device
    )
    return modules, *(partial(module, hw_shape=levels[0]) for module in modules)


def windows(levels: list[tuple[int, int]], device: torch.device, shift: int) -> tuple[list[nn.Module], Run, Run]:
    modules = same_weights(
        ShiftWindowMSA(96, 3, 7, shift, dropout_layer=dict(type='DropPath', drop_prob=0.0)),
        ShiftedWindowAttention(96, 3, 7, shift),
        device,
    )
    return modules, *(partial(module, hw_shape=levels[0]) for module in modules)


def shunted(levels: list[tuple[int, int]], device: torch.device) -> tuple[list[nn.Module], Run, Run]:
    layer = ShuntedSelfAttention(64, 2, sr_ratio=8).to(device).eval()
    return [layer], lambda x: plain_attention(layer, x, levels[0]), lambda x: layer(x, levels[0])


def moved_points(levels: list[tuple[int, int]], device: torch.device) -> tuple[list[nn.Module], Run, Run]:
    layer = DeformableMultiHeadAttention(384, 12, 3, map_size=levels[0]).to(device).eval()

    def plain(x: Tensor) -> Tensor:
        """Softmax(q k^T + bias) and the bias of all queries in memory."""
        query, key, value, bias, _ = layer.attention_inputs(tokens_to_map(x, levels[0]))
        weights = attention_weights(query, key, bias(slice(None)))
        return layer.proj(merge_heads(weights @ value))

    return [layer], plain, lambda x: map_to_tokens(layer(tokens_to_map(x, levels[0])))


CASES = (
    Case('deformable, encoder', 'mmcv', 256, STRIDES, partial(deformable, decoder=False), pixels),
    Case('deformable, decoder', 'mmcv', 256, STRIDES, partial(deformable, decoder=True), lambda _: QUERIES),
    Case('deformable, one scale', 'mmcv', 256, (16,), partial(deformable, decoder=False), pixels),
    Case('spatial reduction, PVT stage 1', 'mmdet', 64, (4,), reduced, pixels),
    Case('windows, Swin stage 1', 'mmdet', 96, (4,), partial(windows, shift=0), pixels),
    Case('shifted windows, Swin stage 1', 'mmdet', 96, (4,), partial(windows, shift=3), pixels),
    Case('shunted, stage 1', 'plain', 64, (4,), shunted, pixels),
    Case('moved points, DAT stage 3', 'plain', 384, (16,), moved_points, pixels),
)


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the subcommand ``layer``, whose namespace `run` takes."""
    parser = subparsers.add_parser(
        'layer',
        help="attention layers against mmcv's and MMDetection's, with the same weights",
        description="Time each attention layer against mmcv's or MMDetection's with the same weights, on the feature "
        'maps of an image; where there is no stock layer, against the published arithmetic step by step.',
    )
    add_options(parser, repeats=5)
    parser.add_argument('--height', type=int, default=800, help='image height (default: %(default)s)')
    parser.add_argument('--width', type=int, default=1066, help='image width (default: %(default)s)')
    return parser


def conditions(args: argparse.Namespace) -> str:
    """The conditions of the measurements."""
    return (
        f'maps of an image of {args.height}x{args.width}, batch 1, {describe_machine(args)}; median of {args.repeats} '
        'runs'
    )


def run(args: argparse.Namespace) -> int:
    """Print one line for the forward pass of each layer and one for forward and backward."""
    print(conditions(args))
    print(f'{"layer":<32}{"":<20}{"stock":<8}{"stock ms":>10}{"ours ms":>10}{"ratio":>8}{"difference":>12}')
    for row in comparisons(args):
        print(f'{row.case:<32}{row.run:<20}{row.sides[0]:<8}{row.milliseconds()}{row.difference:>12.1e}', flush=True)
    return 0


def comparisons(args: argparse.Namespace) -> Iterator[Comparison]:
    """Every layer, forward and with the gradients of input and parameters; with the difference of the outputs."""
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    timer = Timer(device, args.repeats)
    for case in CASES:
        torch.manual_seed(0)
        levels = [(-(-args.height // stride), -(-args.width // stride)) for stride in case.strides]
        modules, stock, ours = case.build(levels, device)
        x = torch.randn(1, case.tokens(levels), case.channels, device=device)
        difference = largest_difference(stock, ours, x)
        for what, step in (('forward', forward), ('forward + backward', partial(forward_backward, modules))):
            timed = map(Measurement, timer(*(partial(step, function, x) for function in (stock, ours))))
            yield Comparison(case.name, what, (case.stock, 'ours'), *timed, difference)


@torch.no_grad()
def forward(function: Run, x: Tensor) -> Tensor:
    return function(x)


def forward_backward(modules: list[nn.Module], function: Run, x: Tensor) -> None:
    """Backpropagate the mean of the output to the input and the parameters."""
    leaf = x.detach().requires_grad_()
    for module in modules:
        module.zero_grad(set_to_none=True)
    function(leaf).mean().backward()


@torch.no_grad()
def largest_difference(stock: Run, ours: Run, x: Tensor) -> float:
    """Largest difference of the outputs, relative to the largest output."""
    expected = stock(x)
    return float((ours(x) - expected).abs().max() / expected.abs().max())
