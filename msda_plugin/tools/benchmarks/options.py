"""Options that the benchmarks share, and the line that describes under which conditions they measure."""

import argparse
import platform
from collections.abc import Callable
from importlib import import_module

import torch


def add_options(parser: argparse.ArgumentParser, repeats: int) -> None:
    """Add ``--device``, ``--threads`` and ``--repeats`` with this default."""
    parser.add_argument('--device', default='cpu', help='default: %(default)s')
    parser.add_argument('--threads', type=int, default=2, help='CPU threads (default: %(default)s)')
    parser.add_argument(
        '--repeats', type=int, default=repeats, help='timed runs, after one warm-up run (default: %(default)s)'
    )


def named_function(name: str) -> Callable:
    """Import ``MODULE:FUNCTION``.

    Raises:
        ImportError, AttributeError: If there is no such module or function.
        ValueError: If the name has no colon.
    """
    module, separator, function = name.partition(':')
    if not separator:
        raise ValueError('expected MODULE:FUNCTION')
    return getattr(import_module(module), function)


def describe_machine(args: argparse.Namespace) -> str:
    return f'float32, {args.device}, {args.threads} threads, {platform.machine()}, torch {torch.__version__}'


def describe_memory(device: str) -> str:
    """What `fresh_process.peak_bytes` measures on this device."""
    return 'memory of the GPU' if torch.device(device).type == 'cuda' else 'resident memory of the process'
