"""``benchmark op``: the operator against what mmcv runs on the same device, with the same inputs."""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from msda_plugin.ops import backend_for, ms_deform_attn, ms_deform_attn_fused
from msda_plugin.ops.functional import Shapes
from msda_plugin.tools.benchmarks.comparison import Comparison, Measurement
from msda_plugin.tools.benchmarks.fresh_process import in_a_process, status_bytes
from msda_plugin.tools.benchmarks.options import add_options, describe_machine, named_function
from msda_plugin.tools.benchmarks.timing import Timer

Form = Callable[[tuple[tuple[int, int], ...], Tensor, Tensor, Tensor, Tensor], Tensor]

PYRAMID = ((100, 134), (50, 67), (25, 34), (13, 17))


@dataclass(frozen=True)
class Shape:
    """One row of the table: levels (h, w), and sizes as in :func:`msda_plugin.ops.ms_deform_attn`."""

    name: str
    levels: tuple[tuple[int, int], ...]
    batch: int
    queries: int
    heads: int = 8
    head_dim: int = 32
    points: int = 4

    @property
    def corner_bytes(self) -> int:
        """float32 bytes of all rows of the value that a forward pass reads: four corners a sample."""
        return 16 * self.batch * self.queries * self.heads * len(self.levels) * self.points * self.head_dim


SHAPES = (
    Shape('encoder', PYRAMID, 1, 17821),
    Shape('decoder', PYRAMID, 1, 300),
    Shape('five levels', ((200, 267), *PYRAMID), 2, 900),
    Shape('one level', ((50, 67),), 1, 3350, head_dim=64),
)


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the subcommand ``op``, whose namespace `run` takes."""
    parser = subparsers.add_parser('op', help="the operator against mmcv's on the same device")
    add_options(parser, repeats=15)
    parser.add_argument('--quick', action='store_true', help="only the comparison with mmcv's operator and peers")
    parser.add_argument(
        '--peer',
        action='append',
        default=[],
        metavar='MODULE:FUNCTION',
        help='another implementation to compare with, such as torch_ms_deform_attn:ms_deform_attn: function(value, '
        'spatial_shapes, level_start_index, locations, weights), as in ms_deform_attn',
    )
    return parser


def conditions(args: argparse.Namespace) -> str:
    """The conditions of the measurements."""
    backend = backend_for(args.device, torch.float32)
    return f'{describe_machine(args)}; backend {backend.name} ({backend.reason}); median of {args.repeats} runs'


def run(args: argparse.Namespace) -> int:
    """Print the comparison with mmcv and, without ``--quick``, the other measurements."""
    from msda_plugin.tools.common.errors import user_errors  # `benchmark gpu` uses this module without MMEngine

    with user_errors('benchmark op'):
        peers = [(name, _peer(name)) for name in args.peer]
    print(conditions(args))
    sides, own = None, ('parts', 'float32')
    for item in comparisons(args, peers):
        if isinstance(item, str):
            print(item, flush=True)
            continue
        if item.sides != sides:
            sides = item.sides
            print(
                f'{"" if sides[0] in own else "shape":<14}{"":<20}'
                + ''.join(f'{_column(side):>10}' for side in sides)
                + f'{"ratio":>8}'
            )
        print(f'{item.case:<14}{item.run:<20}{item.milliseconds()}', flush=True)
    return 0


def _peer(name: str) -> Form:
    """The function that ``--peer`` names."""
    try:
        function = named_function(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f'--peer {name} cannot be imported: {error}') from error

    def form(levels: Tensor, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        areas = levels.prod(1)
        return function(value, levels, areas.cumsum(0) - areas, locations, weights)

    return form


def _column(side: str) -> str:
    return side if side.endswith(('32', '16')) else f'{side} ms'


def comparisons(args: argparse.Namespace, peers: Sequence[tuple[str, Form]] = ()) -> Iterator[Comparison | str]:
    """The comparisons and sentences that `run` prints, in order. ``peers`` are names and functions."""
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    timer = Timer(device, args.repeats)
    yield from compare(timer, device, 'mmcv', mmcv_path(device))
    for name, form in peers:
        yield f'peer: {name}'
        yield from compare(timer, device, 'peer', form)
    if not args.quick:
        yield from compare_forms(timer, device)
        yield from growth(timer, device)
        yield host_cost(timer)
        if device.type == 'cpu':
            yield cache_bound(timer, args.threads)
            yield memory(args.threads)


def _compare(
    measure: Callable[..., list[float]],
    sides: tuple[str, str],
    shape: Shape,
    what: str,
    functions: tuple[Callable, Callable],
) -> Comparison:
    return Comparison(shape.name, what, sides, *map(Measurement, measure(*functions)))


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Seeded inputs of the plain and the fused form. Locations are uniform, the worst case for caches."""
    generator = torch.Generator().manual_seed(0)

    def rand(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator)

    keys = sum(h * w for h, w in shape.levels)
    sampling = (shape.batch, shape.queries, shape.heads, len(shape.levels), shape.points)
    logits = rand(*sampling)
    tensors = {
        'value': rand(shape.batch, keys, shape.heads, shape.head_dim).to(dtype),
        'locations': rand(*sampling, 2),
        'weights': logits.flatten(-2).softmax(-1).view(sampling),
        'points': rand(shape.batch, shape.queries, len(shape.levels), 2),
        'offsets': rand(*sampling, 2) * 8 - 4,
        'logits': logits,
        'grad': rand(shape.batch, shape.queries, shape.heads * shape.head_dim).to(dtype),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def call(form: Form, shape: Shape, inputs: dict[str, Tensor], backward: bool) -> tuple[Tensor, ...]:
    """The output and, with ``backward``, the gradients of value, locations and weights."""
    levels = torch.tensor(shape.levels, device=inputs['value'].device)
    tensors = [inputs[name].detach().requires_grad_(backward) for name in ('value', 'locations', 'weights')]
    with torch.set_grad_enabled(backward):
        output = form(levels, *tensors)
    return (output, *torch.autograd.grad(output, tensors, inputs['grad'])) if backward else (output,)


def plain(levels: Shapes, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    return ms_deform_attn(value, levels, None, locations, weights)


def mmcv_path(device: torch.device) -> Form:
    """mmcv's operator on this device: its CUDA kernel, or grid_sample level by level."""
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch

    def form(levels: Tensor, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        if device.type != 'cuda':
            return multi_scale_deformable_attn_pytorch(value, levels, locations, weights)
        areas = levels.prod(1)
        return MultiScaleDeformableAttnFunction.apply(value, levels, areas.cumsum(0) - areas, locations, weights, 64)

    return form


def compare(timer: Timer, device: torch.device, name: str, other: Form) -> Iterator[Comparison]:
    """The operator against another implementation of this name, forward and with the gradients."""
    for shape in SHAPES:
        inputs = make_inputs(shape, device)
        for what, backward in (('forward', False), ('forward + backward', True)):
            yield _compare(
                timer,
                (name, 'ours'),
                shape,
                what,
                tuple(partial(call, form, shape, inputs, backward) for form in (other, plain)),
            )


def compare_forms(timer: Timer, device: torch.device) -> Iterator[Comparison]:
    """The fused form against its parts, and a bfloat16 value against float32.

    The runs alternate, because the differences are small.
    """
    for shape in SHAPES:
        inputs = make_inputs(shape, device)
        for what, backward in (('forward', False), ('forward + backward', True)):
            yield _compare(
                timer.in_turn,
                ('parts', 'fused'),
                shape,
                what,
                tuple(partial(_call_fused, form, shape, inputs, backward) for form in (parts, fused)),
            )
    for shape in SHAPES:
        yield _compare(
            timer.in_turn,
            ('float32', 'bfloat16'),
            shape,
            'forward',
            tuple(
                partial(call, plain, shape, make_inputs(shape, device, dtype), False)
                for dtype in (torch.float32, torch.bfloat16)
            ),
        )


def parts(
    levels: Tensor, value: Tensor, points: Tensor, offsets: Tensor, logits: Tensor, starts: Tensor | None = None
) -> Tensor:
    """The fused form as softmax, location arithmetic and the plain form."""
    weights = logits.flatten(-2).softmax(-1).view_as(logits)
    locations = points[:, :, None, :, None] + offsets / levels.flip(1)[:, None]
    return ms_deform_attn(value, levels, starts, locations, weights)


def fused(levels: Tensor, value: Tensor, points: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    return ms_deform_attn_fused(value, levels, None, points, offsets, logits)


def _call_fused(form: Callable[..., Tensor], shape: Shape, inputs: dict[str, Tensor], backward: bool) -> None:
    levels = torch.tensor(shape.levels, device=inputs['value'].device)
    names = ('value', 'points', 'offsets', 'logits')
    tensors = [inputs[name].detach().requires_grad_(backward) for name in names]
    with torch.set_grad_enabled(backward):
        output = form(levels, *tensors)
    if backward:
        torch.autograd.grad(output, tensors, inputs['grad'])


def growth(timer: Timer, device: torch.device) -> Iterator[str]:
    """Fit seconds ~ size ** exponent and seconds = fixed + slope * size, over queries and over points per level.

    The sizes are large enough for the fixed cost (packing the value, writing the output) to matter little; the line
    reports it. With more queries, every output is large enough for the allocator to request new memory in each call,
    a cost that also grows linearly. With more samples, there is one level that fits the L2 cache: in a pyramid, a
    coarse level would stay in the L1 cache, and further points would cost less.
    """
    for what, shapes in (
        ('queries', [Shape('', PYRAMID, 1, n) for n in (71284, 142568, 285136)]),
        ('samples', [Shape('', PYRAMID[1:2], 1, 4456, points=n) for n in (128, 256, 512, 1024)]),
    ):
        sizes = [
            shape.queries * (shape.heads * len(shape.levels) * shape.points if what == 'samples' else 1)
            for shape in shapes
        ]
        seconds = timer.in_turn(*(partial(call, plain, shape, make_inputs(shape, device), False) for shape in shapes))
        exponent = np.polyfit(np.log(sizes), np.log(seconds), 1)[0]
        slope, fixed = np.polyfit(sizes, seconds, 1, w=1 / np.array(seconds))  # relative errors count alike
        yield (
            f'growth of the forward pass with {what}, {sizes[0]} to {sizes[-1]}: exponent {exponent:.3f}; '
            f'{slope * 1e9:.1f} ns each, {fixed * 1e3:.2f} ms fixed'
        )


def host_cost(timer: Timer, calls: int = 200) -> str:
    """The cost of a call apart from its work: one head, two queries, and 20 pixels. On a GPU, of its submission."""
    shape = Shape('', ((4, 4), (2, 2)), 1, 2, heads=1, head_dim=4, points=1)
    inputs = make_inputs(shape, timer.device)
    tensors = [inputs[name] for name in ('value', 'locations', 'weights')]
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]

    def forward() -> None:
        with torch.no_grad():
            for _ in range(calls):
                plain(shape.levels, *tensors)

    def recorded() -> None:
        for _ in range(calls):
            plain(shape.levels, *leaves)

    def backward() -> None:
        for _ in range(calls):
            torch.autograd.grad(plain(shape.levels, *leaves), leaves, inputs['grad'])

    costs = [f'{seconds / calls * 1e6:.1f} µs' for seconds in timer.in_turn(forward, recorded, backward)]
    return f'cost of a call: without gradients {costs[0]}, recorded for gradients {costs[1]}, with backward {costs[2]}'


def cache_bound(timer: Timer, threads: int) -> str:
    """The encoder's forward pass against the time to read its corner rows at the speed of copies within the L2 cache.

    A copy moves each byte that it reads, and each line that it writes, from the L2 into the L1: both are counted. All
    threads copy at once, each within 310 KiB, alternating with the forward pass; the fastest copy of a round counts.
    """
    forward = partial(call, plain, SHAPES[0], make_inputs(SHAPES[0], timer.device), False)
    rounds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(2 * timer.repeats):
            speed = max(sum(pool.map(_copy_speed, range(threads))) for _ in range(3))
            forward()  # fills the caches with its inputs and its memory
            rounds.append((SHAPES[0].corner_bytes / speed, timer.once(forward)))
    bound, seconds = map(statistics.median, zip(*rounds, strict=True))
    speed = SHAPES[0].corner_bytes / bound
    return (
        f'L2 copy: {speed / 1e9:.0f} GB/s on {threads} threads; bound of the encoder forward, '
        f'{SHAPES[0].corner_bytes / 1e9:.2f} GB of corner rows: {bound * 1e3:.2f} ms; ours {seconds * 1e3:.2f} ms, '
        f'{seconds / bound:.2f}x the bound'
    )


def _copy_speed(_: int) -> float:
    """Bytes per second that one thread moves from its L2 into its L1."""
    line, passes, length = 64, 400, 128 * 1024

    def buffer() -> np.ndarray:
        memory = np.ones((length + (passes + 1) * line) // 8)
        aligned = memory[-memory.ctypes.data % line // 8 :]
        # One row per pass, each a cache line after the previous one: a single call copies all without the GIL.
        return np.lib.stride_tricks.as_strided(aligned, (passes, length // 8), (line, 8))

    source, target = buffer(), buffer()
    start = time.perf_counter()
    np.copyto(target, source)
    return 2 * source.size * source.itemsize / (time.perf_counter() - start)


def memory(threads: int) -> str:
    """Peak memory of forward + backward at the encoder shape, without inputs, output and gradients."""
    stock, ours = (in_a_process(_extra_memory, stock, threads) for stock in (True, False))
    return (
        f'extra peak memory of forward + backward at the encoder shape: mmcv {stock / 1e6:.0f} MB, ours '
        f'{ours / 1e6:.0f} MB, {ours / stock:.1%}'
    )


def _extra_memory(stock: bool, threads: int) -> int:
    torch.set_num_threads(threads)
    device = torch.device('cpu')
    form = mmcv_path(device) if stock else plain
    small = Shape('', ((4, 4),), 1, 8)
    call(form, small, make_inputs(small, device), True)  # loads libraries, which are not part of the cost
    inputs = make_inputs(SHAPES[0], device)
    with open('/proc/self/clear_refs', 'w') as file:
        file.write('5')  # resets the peak
    before = status_bytes('VmRSS')
    results = call(form, SHAPES[0], inputs, True)
    return status_bytes('VmHWM') - before - sum(t.nbytes for t in results)
