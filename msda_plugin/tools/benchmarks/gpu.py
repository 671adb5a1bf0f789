"""``benchmark gpu``: the operator on a GPU, checked and timed against other implementations on the same tensors.

Needs only torch and the compiled operator. Comparisons that need mmcv's sources, another implementation or MMDetection
are skipped with a message. A part that fails is named and does not end the run; ``--json`` is updated after each row.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from msda_plugin.files import atomic_write
from msda_plugin.ops import backend_for, ms_deform_attn, ms_deform_attn_fused
from msda_plugin.ops.reference import attend, attend_fused
from msda_plugin.tools.benchmarks import mmcv_kernels
from msda_plugin.tools.benchmarks.op import PYRAMID, Shape, parts
from msda_plugin.tools.benchmarks.options import named_function
from msda_plugin.tools.benchmarks.timing import EventTimer

DTYPES = {'float32': torch.float32, 'float16': torch.float16, 'bfloat16': torch.bfloat16}
# Largest permitted error against the float64 result, relative in the Euclidean norm, of the output and each gradient.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}
MODELS = (
    'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
    'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py',
)
L1_BYTES_PER_CLOCK = 128  # per multiprocessor, sm_70 to sm_120


class Case(NamedTuple):
    """A shape, and whether its queries sample around their position (``local``) or anywhere."""

    shape: Shape
    local: bool


def _encoder(name: str, local: bool = True, head_dim: int = 32) -> Case:
    return Case(Shape(name, PYRAMID, 2, 17821, head_dim=head_dim), local)


CASES = (
    _encoder('encoder'),
    _encoder('encoder, uniform', local=False),
    _encoder('encoder, 16 channels', head_dim=16),
    _encoder('encoder, 64 channels', head_dim=64),
    Case(Shape('decoder, 300', PYRAMID, 2, 300), True),
    Case(Shape('decoder, 900', PYRAMID, 2, 900), True),
    Case(Shape('five levels', ((200, 267), *PYRAMID), 2, 900), True),
    Case(Shape("bird's eye view", ((200, 200),), 2, 40000, points=8), True),
)


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the subcommand ``gpu``, whose namespace `run` takes."""
    parser = subparsers.add_parser('gpu', help='the operator on a GPU, checked and timed against other implementations')
    parser.add_argument(
        '--cases',
        nargs='+',
        choices=[case.shape.name for case in CASES],
        metavar='CASE',
        help='only these cases, of: ' + '; '.join(case.shape.name for case in CASES),
    )
    parser.add_argument('--dtypes', nargs='+', choices=list(DTYPES), default=list(DTYPES), help='default: all')
    parser.add_argument('--repeats', type=int, default=30, help='maximum number of timed runs (default: %(default)s)')
    parser.add_argument(
        '--mmcv-sdist',
        type=Path,
        metavar='PATH',
        help="mmcv's source distribution (archive or folder), whose CUDA kernel is compiled and timed; download it "
        'with: pip download --no-binary :all: --no-deps onedl-mmcv (default: the installed mmcv, if it has CUDA '
        'operators)',
    )
    parser.add_argument(
        '--peer',
        action='append',
        default=[],
        metavar='MODULE:FUNCTION',
        help='another implementation to compare with: function(value, spatial_shapes, level_start_index, locations, '
        'weights), with shapes as in ms_deform_attn and all tensors of one dtype',
    )
    parser.add_argument('--json', type=Path, metavar='FILE', help='write all figures to this file')
    parser.add_argument('--skip-operator', action='store_true', help='only the models')
    parser.add_argument('--skip-models', action='store_true', help='only the operator')
    parser.add_argument(
        '--dry-run', action='store_true', help='run every step on the CPU with small shapes; the times mean nothing'
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the tables; returns 1 if a result of the operator is wrong or a part failed, 2 if it cannot run."""
    device = torch.device('cpu' if args.dry_run else 'cuda')
    if not args.dry_run and not torch.cuda.is_available():
        print('msda_plugin benchmark gpu: torch sees no GPU; --dry-run runs every step on the CPU')
        return 2
    backend = backend_for(device, torch.float32)
    if backend.name == 'reference':
        print(f'msda_plugin benchmark gpu: the compiled operator cannot run, because {backend.reason}')
        return 2
    if args.dry_run:
        print('DRY RUN on the CPU with small shapes: the times mean nothing; the column of mmcv is grid_sample')
    machine = Machine.measure(device)
    print(
        f'{machine.name}, torch {torch.__version__}; backend {backend.name} ({backend.reason}); copies '
        f'{machine.copy_speed / 1e9:.0f} GB/s, L1 {machine.l1_speed / 1e9:.0f} GB/s by arithmetic, L2 '
        f'{machine.l2_bytes / 2**20:.0f} MiB'
    )
    figures = {'machine': asdict(machine), 'dry_run': args.dry_run, 'operator': [], 'models': []}

    def save(part: str, row: dict) -> None:
        figures[part].append(row)
        if args.json:
            with atomic_write(args.json) as path:
                path.write_text(json.dumps(figures, indent=1) + '\n')

    rows: list[Row] = []
    if not args.skip_operator:
        for row in operator_rows(args, machine):
            rows.append(row)
            save('operator', asdict(row))
        print_summary(rows)
    failed = any(row.wrong or row.failures for row in rows)
    for model in [] if args.skip_models else model_rows(args):
        save('models', model)
        failed = failed or 'failure' in model
    return int(failed)


@dataclass(frozen=True)
class Machine:
    """Properties that the lower bounds are computed from.

    Attributes:
        name: Name of the device.
        device: As torch writes it.
        copy_speed: Bytes read and written by a copy, per second.
        l1_speed: Bytes per second of all L1 caches together, computed from the clock rate.
        l2_bytes: Size of the L2 cache.
    """

    name: str
    device: str
    copy_speed: float
    l1_speed: float
    l2_bytes: int

    @staticmethod
    def measure(device: torch.device) -> 'Machine':
        if device.type == 'cpu':
            return Machine('CPU', 'cpu', _copy_speed(device, 1 << 22), math.inf, 1 << 20)
        properties = torch.cuda.get_device_properties(device)
        # In kHz. Not every version of torch has it; the default is an H200's.
        clock = getattr(properties, 'clock_rate', 1_980_000) * 1e3
        return Machine(
            properties.name,
            str(device),
            _copy_speed(device, 1 << 30),
            L1_BYTES_PER_CLOCK * properties.multi_processor_count * clock,
            properties.L2_cache_size,
        )


def _copy_speed(device: torch.device, length: int) -> float:
    source = torch.ones(length // 4, device=device)
    target = torch.empty_like(source)
    return 2 * length / EventTimer(device, 10).median(lambda: target.copy_(source))


class Form(NamedTuple):
    """An implementation.

    Attributes:
        name: Its column.
        call: Takes (spatial_shapes, level_start_index, *inputs named by ``inputs``) and returns the output.
        inputs: Names of the tensors of `make_inputs` that it takes and whose gradients are computed.
        dtypes: Supported dtypes of the value.
        one_dtype: Whether all inputs must have the value's dtype.
        host_shapes: Whether it gets the spatial shapes on the CPU, so that reading them does not synchronize.
    """

    name: str
    call: Callable[..., Tensor]
    inputs: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] = tuple(DTYPES.values())
    one_dtype: bool = False
    host_shapes: bool = False


OWN = ('plain', 'fused', 'parts', 'deterministic')
PLAIN = ('value', 'locations', 'weights')
FUSED = ('value', 'points', 'offsets', 'logits')


def own_forms() -> list[Form]:
    return [
        Form('plain', _values_first(ms_deform_attn), PLAIN),
        Form('fused', _values_first(ms_deform_attn_fused), FUSED),
        Form('parts', lambda shapes, starts, *inputs: parts(shapes, *inputs, starts), FUSED),
        Form('deterministic', _values_first(partial(ms_deform_attn, deterministic=True)), PLAIN),
    ]


def peers(args: argparse.Namespace) -> list[Form]:
    """grid_sample, mmcv's kernel and deformops if they are available, and the functions named by ``--peer``."""
    forms = [Form('grid_sample', grid_sample, PLAIN, one_dtype=True, host_shapes=True)]
    mmcv = _mmcv(args)
    if mmcv is not None:
        forms.append(Form('mmcv', mmcv, PLAIN, (torch.float32, torch.float16), one_dtype=True))
    if find_spec('deformops') is not None:
        forms += [
            Form(f'deformops {backend}', partial(_deformops, backend), PLAIN, one_dtype=True)
            for backend in ('triton', 'cuda')
        ]
    for name in args.peer:
        try:
            forms.append(Form(name.rsplit(':', 1)[-1], _values_first(named_function(name)), PLAIN, one_dtype=True))
        except (ImportError, AttributeError, ValueError) as error:
            print(f'--peer {name}: skipped, because it cannot be imported ({error})')
    return forms


def _deformops(
    backend: str, shapes: Tensor, starts: Tensor, value: Tensor, locations: Tensor, weights: Tensor
) -> Tensor:
    from deformops.registry import Backend, msda

    # Its weights have one dimension for levels and points.
    return msda(value, shapes, starts, locations, weights.flatten(-2), backend=Backend[backend.upper()])


def _values_first(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda shapes, starts, value, *rest: function(value, shapes, starts, *rest)


def _mmcv(args: argparse.Namespace) -> Callable[..., Tensor] | None:
    if args.mmcv_sdist is not None:
        arch = 'sm_90' if args.dry_run else 'sm_{}{}'.format(*torch.cuda.get_device_capability())
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / 'libmmcv.so'
            try:
                mmcv_kernels.build(args.mmcv_sdist, arch, library)
            except (FileNotFoundError, RuntimeError) as error:
                print(f"mmcv's kernel: skipped, because {error}")
                return None
            return grid_sample if args.dry_run else _values_first(mmcv_kernels.MmcvKernels(library))
    if args.dry_run:
        return grid_sample
    try:
        from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction, ext_module

        ext_module.ms_deform_attn_forward  # noqa: B018
    except (ImportError, AttributeError) as error:
        print(
            "mmcv's kernel: skipped, because --mmcv-sdist is not given and no mmcv with CUDA operators is installed "
            f'({error})'
        )
        return None
    return lambda shapes, starts, value, *rest: MultiScaleDeformableAttnFunction.apply(value, shapes, starts, *rest, 64)


def grid_sample(shapes: Tensor, starts: Tensor, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Plain PyTorch: ``grid_sample`` level by level, then the weighted sum."""
    batch, _, heads, channels = value.shape
    queries, levels, points = locations.shape[1], locations.shape[3], locations.shape[4]
    areas = [(int(h), int(w)) for h, w in shapes.tolist()]
    grids, samples = 2 * locations - 1, []
    for level, part in enumerate(value.split([h * w for h, w in areas], 1)):
        image = part.flatten(2).transpose(1, 2).reshape(batch * heads, channels, *areas[level])
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        samples.append(F.grid_sample(image, grid, mode='bilinear', padding_mode='zeros', align_corners=False))
    weights = weights.transpose(1, 2).reshape(batch * heads, 1, queries, levels * points)
    output = (torch.stack(samples, -2).flatten(-2) * weights).sum(-1)
    return output.view(batch, heads * channels, queries).transpose(1, 2).contiguous()


def make_inputs(case: Case, device: torch.device, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Seeded inputs of the plain and the fused form, which sample the same positions with the same weights.

    Local positions are those of a detector: the initial offsets of its layers (one direction per head, one more pixel
    per point) plus noise of one pixel. If there are as many queries as pixels (an encoder), each query is a pixel;
    otherwise queries are anywhere. Positions keep a twentieth of a pixel from the borders between cells, where the
    gradient jumps and a comparison with float64 is meaningless. No value is zero.
    """
    shape = case.shape
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    keys = sum(h * w for h, w in shape.levels)
    sampling = (shape.batch, shape.queries, shape.heads, len(shape.levels), shape.points)
    sizes = torch.tensor([(w, h) for h, w in shape.levels], device=device, dtype=torch.float32)
    if shape.queries == keys:
        points = torch.cat(
            [
                torch.cartesian_prod(
                    (torch.arange(h, device=device) + 0.5) / h, (torch.arange(w, device=device) + 0.5) / w
                ).flip(-1)
                for h, w in shape.levels
            ]
        ).expand(shape.batch, -1, -1)
    else:
        points = torch.rand(shape.batch, shape.queries, 2, generator=generator, device=device)
    points = points[:, :, None].expand(-1, -1, len(shape.levels), -1).contiguous()
    if case.local:
        angle = torch.arange(shape.heads, device=device) * (2 * math.pi / shape.heads)
        direction = torch.stack((angle.cos(), angle.sin()), -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, shape.points + 1, device=device)
        offsets = direction[:, None, None] * steps[:, None] + normal(*sampling, 2)
        pixels = points[:, :, None, :, None] * sizes[:, None] + offsets - 0.5
    else:
        pixels = torch.rand(*sampling, 2, generator=generator, device=device) * sizes[:, None] - 0.5
    pixels = pixels.floor() + 0.05 + 0.9 * (pixels - pixels.floor())
    logits = normal(*sampling)
    return {
        'value': normal(shape.batch, keys, shape.heads, shape.head_dim).to(dtype),
        'locations': (pixels + 0.5) / sizes[:, None],
        'weights': logits.flatten(-2).softmax(-1).view(sampling),
        'points': points,
        'offsets': pixels + 0.5 - points[:, :, None, :, None] * sizes[:, None],
        'logits': logits,
        'grad': normal(shape.batch, shape.queries, shape.heads * shape.head_dim).to(dtype),
    }


@dataclass
class Row:
    """The results of a case, dtype and pass.

    Attributes:
        seconds: Median time of each form.
        errors: Largest error of each form over the output and all gradients.
        floor: Lower bound of the time in seconds, see `floor_seconds`.
        bytes: Size of the corner rows that are read and, in the backward pass, accumulated.
        wrong: Whether an error of msda_plugin's forms exceeds `TOLERANCE`.
        failures: What raised an error: a form, or the whole case under the name ``''``; and the error.
    """

    case: str
    dtype: str
    backward: bool
    seconds: dict[str, float]
    errors: dict[str, float]
    floor: float
    bytes: int
    wrong: bool
    failures: dict[str, str]


def operator_rows(args: argparse.Namespace, machine: Machine) -> Iterator[Row]:
    """Check, time and print every case, dtype and pass."""
    device = torch.device(machine.device)
    forms = own_forms() + peers(args)
    timer = EventTimer(device, 3 if args.dry_run else args.repeats)
    print(
        f'Microseconds, medians of up to {timer.repeats} runs. "floor": lower bound of the memory system; "share": '
        'floor / plain; "GB/s": corner rows per second in plain; "x mmcv": mmcv in float32 / plain; "error": relative '
        'error of plain, fused, parts and deterministic'
    )
    print(
        f'{"":<22}{"":<10}{"":<9}{"floor":>8}{"share":>7}{"GB/s":>7}'
        + ''.join(f'{form.name:>14}' for form in forms)
        + f'{"x mmcv":>8}{"error":>9}'
    )
    for case in CASES:
        if args.cases and case.shape.name not in args.cases:
            continue
        small = shrink(case) if args.dry_run else case
        mmcv: dict[bool, float] = {}
        for name in args.dtypes:
            for row in _measure_or_report(small, name, forms, timer, machine):
                if row.dtype == 'float32' and 'mmcv' in row.seconds:
                    mmcv[row.backward] = row.seconds['mmcv']
                _print(row, forms, mmcv.get(row.backward))
                yield row


def _measure_or_report(
    case: Case, dtype_name: str, forms: list[Form], timer: EventTimer, machine: Machine
) -> Iterator[Row]:
    try:
        yield from measure(case, dtype_name, forms, timer, machine)
    except RuntimeError as error:  # of torch itself, such as too little memory for the result in float64
        print(f'{case.shape.name}, {dtype_name}: failed ({error})', flush=True)
        yield Row(case.shape.name, dtype_name, False, {}, {}, 0.0, 0, False, {'': str(error)})


def shrink(case: Case) -> Case:
    """The case with levels a tenth as large, for a dry run."""
    levels = tuple((max(h // 10, 1), max(w // 10, 1)) for h, w in case.shape.levels)
    dense = case.shape.queries == sum(h * w for h, w in case.shape.levels)
    queries = sum(h * w for h, w in levels) if dense else case.shape.queries // 10
    return case._replace(shape=replace(case.shape, levels=levels, queries=queries))


def measure(case: Case, dtype_name: str, forms: list[Form], timer: EventTimer, machine: Machine) -> Iterator[Row]:
    """The rows of the forward and of the backward pass."""
    device, dtype = torch.device(machine.device), DTYPES[dtype_name]
    shapes = torch.tensor(case.shape.levels, device=device)
    starts = shapes.prod(1).cumsum(0) - shapes.prod(1)
    inputs = make_inputs(case, device, dtype)
    size = sum(tensor.nbytes for tensor in inputs.values())
    # Enough copies that the L2 cache no longer holds the inputs of a call when they are used again.
    copies = [
        inputs,
        *(
            {name: tensor.clone() for name, tensor in inputs.items()}
            for _ in range(math.ceil(2 * machine.l2_bytes / size))
        ),
    ]
    expected = {
        names: _results(function, shapes, starts, [inputs[name].double() for name in names], inputs['grad'].double())
        for names, function in ((PLAIN, _values_first(attend)), (FUSED, _values_first(attend_fused)))
    }
    forward, backward, errors, failures = {}, {}, {}, {}
    for form in forms:
        if dtype not in form.dtypes:
            continue
        rotation = [
            [entry[name].to(dtype) if form.one_dtype else entry[name] for name in form.inputs] for entry in copies
        ]
        grads = [entry['grad'] for entry in copies]
        levels = shapes.cpu() if form.host_shapes else shapes
        try:
            actual = _results(form.call, levels, starts, rotation[0], grads[0])
            errors[form.name] = max(map(relative_error, actual, expected[form.inputs]))
            del actual
            if form.name != 'deterministic':  # has the same forward pass as plain
                forward[form.name] = timer.median(_Forward(form, levels, starts, rotation))
            step = _Backward(form, levels, starts, rotation, grads)
            backward[form.name] = timer.median(step, step.prepare)
        except Exception as error:  # implementations of others raise errors of many types
            if form.name in OWN:
                failures[form.name] = f'{type(error).__name__}: {error}'
            print(f'{form.name}: failed for {case.shape.name}, {dtype_name} ({error})', flush=True)
    wrong = any(not error <= TOLERANCE[dtype] for name, error in errors.items() if name in OWN)
    for is_backward, seconds in ((False, forward), (True, backward)):
        yield Row(
            case.shape.name,
            dtype_name,
            is_backward,
            seconds,
            errors,
            floor_seconds(case.shape, dtype, is_backward, machine),
            corner_bytes(case.shape, dtype, is_backward),
            wrong,
            failures,
        )


def _results(
    call: Callable[..., Tensor], shapes: Tensor, starts: Tensor, inputs: list[Tensor], grad: Tensor
) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = call(shapes, starts, *leaves)
    return (output.detach(), *torch.autograd.grad(output, leaves, grad))


class _Forward:
    """A forward pass, in each call with the next inputs."""

    def __init__(self, form: Form, shapes: Tensor, starts: Tensor, rotation: list[list[Tensor]]) -> None:
        self.form, self.shapes, self.starts, self.rotation = form, shapes, starts, rotation
        self.count = 0

    def __call__(self) -> Tensor:
        self.count += 1
        with torch.no_grad():
            return self.form.call(self.shapes, self.starts, *self.rotation[self.count % len(self.rotation)])


class _Backward(_Forward):
    """A backward pass; ``prepare`` runs the forward pass before it, with the next inputs."""

    def __init__(
        self, form: Form, shapes: Tensor, starts: Tensor, rotation: list[list[Tensor]], grads: list[Tensor]
    ) -> None:
        super().__init__(form, shapes, starts, rotation)
        self.grads = grads

    def prepare(self) -> tuple[Tensor, list[Tensor], Tensor]:
        self.count += 1
        index = self.count % len(self.rotation)
        leaves = [tensor.detach().requires_grad_() for tensor in self.rotation[index]]
        return self.form.call(self.shapes, self.starts, *leaves), leaves, self.grads[index]

    def __call__(self, prepared: tuple[Tensor, list[Tensor], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(*prepared)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Distance from ``expected`` in the Euclidean norm, relative to its norm; NaN if ``actual`` contains NaN."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


def corner_bytes(shape: Shape, dtype: torch.dtype, backward: bool) -> int:
    """Bytes of all corner rows that are read and, in the backward pass, of the float32 rows that are accumulated."""
    return shape.corner_bytes // 4 * (dtype.itemsize + (4 if backward else 0))


def floor_seconds(shape: Shape, dtype: torch.dtype, backward: bool, machine: Machine) -> float:
    """Lower bound of the memory system: every tensor once through memory, or every corner row once through the L1.

    The backward pass reads the value, the gradient of the output, locations and weights, and writes all gradients; it
    accumulates in float32. The speed of atomic additions in the L2 cache is not considered.
    """
    keys = sum(h * w for h, w in shape.levels)
    value = shape.batch * keys * shape.heads * shape.head_dim * dtype.itemsize
    output = shape.batch * shape.queries * shape.heads * shape.head_dim * dtype.itemsize
    coordinates = shape.batch * shape.queries * shape.heads * len(shape.levels) * shape.points * 3 * 4
    once = value + output + coordinates + (value + coordinates if backward else 0)
    return max(once / machine.copy_speed, corner_bytes(shape, dtype, backward) / machine.l1_speed)


def _print(row: Row, forms: list[Form], mmcv: float | None) -> None:
    def cell(seconds: float | None, width: int) -> str:
        return f'{"-":>{width}}' if seconds is None else f'{seconds * 1e6:>{width}.1f}'

    plain = row.seconds.get('plain', math.nan)
    error = max((row.errors[name] for name in OWN if name in row.errors), default=math.nan)
    print(
        f'{row.case:<22}{row.dtype:<10}{"backward" if row.backward else "forward":<9}{row.floor * 1e6:>8.1f}'
        f'{row.floor / plain:>7.0%}{row.bytes / plain / 1e9:>7.0f}'
        + ''.join(cell(row.seconds.get(form.name), 14) for form in forms)
        + (f'{"-":>8}' if mmcv is None else f'{mmcv / plain:>7.2f}x')
        + f'{error:>9.1e}'
        + (' WRONG' if row.wrong else '')
        + (' FAILED' if row.failures else ''),
        flush=True,
    )


class Goal(NamedTuple):
    """A limit for the time of a form at the encoder's shape with local positions.

    Attributes:
        what: Text that is printed.
        dtype, backward, form: The time that the limit applies to.
        relative_to: Form whose time is the unit of ``limit``; None: seconds.
        limit: Largest time.
    """

    what: str
    dtype: str
    backward: bool
    form: str
    relative_to: str | None
    limit: float


GOALS = (
    Goal('forward, float32: 120 us', 'float32', False, 'plain', None, 120e-6),
    Goal('forward, bfloat16: 90 us', 'bfloat16', False, 'plain', None, 90e-6),
    Goal('backward, float32: 350 us', 'float32', True, 'plain', None, 350e-6),
    Goal("forward, float32: a quarter of mmcv's time", 'float32', False, 'plain', 'mmcv', 1 / 4),
    Goal("backward, float32: a quarter of mmcv's time", 'float32', True, 'plain', 'mmcv', 1 / 4),
    Goal('deterministic backward: 1.3 times the default one', 'float32', True, 'deterministic', 'plain', 1.3),
)


def print_summary(rows: list[Row]) -> None:
    """Print the goals and whether they are met."""
    found = {(row.case, row.dtype, row.backward): row for row in rows}
    print("Goals at the encoder's shape with local positions, on an H200:")
    for goal in GOALS:
        row = found.get(('encoder', goal.dtype, goal.backward))
        seconds = row and row.seconds.get(goal.form)
        base = 1.0 if goal.relative_to is None else row and row.seconds.get(goal.relative_to)
        if not seconds or not base:
            print(f'  not measured  {goal.what}')
            continue
        figure = f'{seconds * 1e6:.1f} us' if goal.relative_to is None else f'{seconds / base:.2f}'
        print(f'  {"met" if seconds / base <= goal.limit else "missed":<12}  {goal.what}: {figure}')
    slower = []
    for row in rows:
        wide = found.get((row.case, 'float32', row.backward))
        where = f'{row.case}, {row.dtype}, {"backward" if row.backward else "forward"}'
        if row.failures:
            slower.append(f'{where}: failed')
        if not {'plain', 'fused', 'parts'} <= row.seconds.keys():
            continue
        others = {name: seconds for name, seconds in row.seconds.items() if name not in OWN}
        if wide is not None and 'mmcv' in wide.seconds:
            others["mmcv's float32"] = wide.seconds['mmcv']
        slower += [f'{where}: slower than {name}' for name, seconds in others.items() if seconds < row.seconds['plain']]
        if row.seconds['fused'] > row.seconds['parts']:
            slower.append(f'{where}: fused {row.seconds["fused"] / row.seconds["parts"]:.2f} times its parts')
    print(
        f'  {"missed" if slower else "met":<12}  every case, dtype and pass: faster than the other implementations; '
        'fused not slower than its parts'
    )
    for line in slower:
        print(f'                  {line}')


def model_rows(args: argparse.Namespace) -> Iterator[dict]:
    """Measure stock detectors before and after ``accelerate``, in float32 and with bfloat16 autocast."""
    try:
        from msda_plugin.tools.benchmarks import model
    except ImportError as error:
        print(f'Models: skipped, because MMDetection is not installed ({error})')
        return
    small = args.dry_run
    print(f'{"":<36}{"":<10}{"":<15}{"stock s":>9}{"ours s":>9}{"speed":>8}{"stock MB":>10}{"ours MB":>9}')
    for config in MODELS[:1] if small else MODELS:
        settings = argparse.Namespace(
            config=config,
            device='cpu' if small else 'cuda',
            height=64 if small else 800,
            width=96 if small else 1333,
            batch=1 if small else 2,
            runs=1 if small else 10,
            threads=torch.get_num_threads(),
        )
        for autocast in (False, True):
            for training in (False, True):
                try:
                    stock, ours = (
                        model.in_a_process(measure_model, settings, accelerated, training, autocast)
                        for accelerated in (False, True)
                    )
                except (RuntimeError, OSError, ValueError, ImportError) as error:
                    print(f'{config}: failed ({error})', flush=True)
                    yield {'config': config, 'training': training, 'failure': str(error)}
                    continue
                row = {
                    'config': config,
                    'dtype': 'bfloat16' if autocast else 'float32',
                    'training': training,
                    'stock': stock._asdict(),
                    'ours': ours._asdict(),
                }
                print(
                    f'{Path(config).stem:<36}{row["dtype"]:<10}{"training step" if training else "inference":<15}'
                    f'{stock.seconds:>9.4f}{ours.seconds:>9.4f}{stock.seconds / ours.seconds:>7.2f}x'
                    f'{stock.peak / 1e6:>10.0f}{ours.peak / 1e6:>9.0f}',
                    flush=True,
                )
                yield row


def measure_model(args: argparse.Namespace, accelerated: bool, training: bool, autocast: bool) -> NamedTuple:
    """`model.measure`, with or without autocast to bfloat16."""
    from msda_plugin.tools.benchmarks import model

    with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=autocast):
        return model.measure(args, 'accelerated' if accelerated else None, training)
