"""``benchmark onnxruntime``: msda_plugin's node in onnxruntime against the operator's ``GridSample`` form."""

import argparse
import io
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from msda_plugin.libraries import onnxruntime_library
from msda_plugin.tools.benchmarks.comparison import Comparison, Measurement
from msda_plugin.tools.benchmarks.op import SHAPES, Shape, fused, make_inputs, plain
from msda_plugin.tools.benchmarks.options import describe_machine
from msda_plugin.tools.benchmarks.timing import Timer
from msda_plugin.tools.common.errors import user_errors

INPUTS = {'plain': ('value', 'locations', 'weights'), 'fused': ('value', 'points', 'offsets', 'logits')}


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the subcommand ``onnxruntime``, whose namespace `run` takes."""
    parser = subparsers.add_parser('onnxruntime', help="the operator's node in onnxruntime against GridSample, CPU")
    parser.add_argument('--threads', type=int, default=2, help='CPU threads (default: %(default)s)')
    parser.add_argument(
        '--repeats', type=int, default=15, help='timed runs, after one warm-up run (default: %(default)s)'
    )
    parser.set_defaults(device='cpu')
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the comparisons of `comparisons`. Needs the packages onnx and onnxruntime."""
    with user_errors('benchmark onnxruntime'):
        onnxruntime_library()
        try:
            import onnx  # noqa: F401  (for the export)
            import onnxruntime
        except ImportError as error:
            raise ImportError(
                f'onnx and onnxruntime are needed ({error}): pip install "msda_plugin[export]"'
            ) from error

    print(f'{describe_machine(args)}, onnxruntime {onnxruntime.__version__}; median of {args.repeats} runs')
    for sides in (('grid_sample', 'custom'), ('torch', 'custom')):
        print(
            f'{"shape":<14}{"operator":<10}'
            + ''.join(f'{side + " ms":>16}' for side in sides)
            + f'{"ratio":>9}{"difference":>13}'
        )
        for item in comparisons(args, sides):
            times = ''.join(f'{measured.seconds * 1e3:>16.2f}' for measured in (item.stock, item.ours))
            print(f'{item.case:<14}{item.run:<10}{times}{item.speed:>8.2f}x{item.difference:>13.1e}', flush=True)
    return 0


def comparisons(
    args: argparse.Namespace, sides: tuple[str, str], shapes: tuple[Shape, ...] = SHAPES
) -> Iterator[Comparison]:
    """Both operators at each shape on both sides: a form for onnxruntime, or 'torch' for the kernels in torch."""
    torch.set_num_threads(args.threads)
    timer = Timer(torch.device('cpu'), args.repeats)
    for shape in shapes:
        tensors = make_inputs(shape, timer.device)
        for form, names in INPUTS.items():
            inputs = {name: tensors[name] for name in names}
            functions = [_function(side, Operator(form, shape), inputs, args.threads) for side in sides]
            stock, ours = (function() for function in functions)
            difference = ((stock - ours).abs().max() / stock.abs().max()).item()
            yield Comparison(shape.name, form, sides, *map(Measurement, timer(*functions)), difference)


class Operator(nn.Module):
    """The plain or the fused operator at fixed levels."""

    def __init__(self, form: str, shape: Shape) -> None:
        super().__init__()
        self.operator = dict(plain=plain, fused=fused)[form]
        self.register_buffer('levels', torch.tensor(shape.levels))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.operator(self.levels, *inputs)


def _function(side: str, operator: Operator, inputs: dict[str, Tensor], threads: int) -> Callable[[], Tensor]:
    if side == 'torch':
        return torch.no_grad()(partial(operator, *inputs.values()))
    import onnxruntime

    from msda_plugin.export.onnx_operator import operator_as

    file = io.BytesIO()
    with operator_as(side), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.onnx.export(operator, tuple(inputs.values()), file, input_names=[*inputs], dynamo=False, opset_version=16)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(onnxruntime_library())
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=['CPUExecutionProvider'])
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    return lambda: torch.from_numpy(session.run(None, arrays)[0])
