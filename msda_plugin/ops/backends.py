"""Which implementation runs: the compiled libraries, the choice among backends, and the reasons.

Automatic choice: the compiled kernels of the value's device, else the reference with one warning that names the reason.
``MSDA_BACKEND`` or :func:`use_backend` chooses one; a chosen backend that cannot run raises, it never falls back.
``MSDA_LIBRARY_DIR`` names another directory with compiled libraries, such as a build with sanitizers.
"""

import ctypes
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from msda_plugin.ops.checks import VALUE_DTYPES

NAMES = ('cuda', 'cpu', 'reference')
LIBRARY_DIR = Path(os.environ.get('MSDA_LIBRARY_DIR') or Path(__file__).parent / 'lib')


class Backend(NamedTuple):
    """What would run (``'cuda'``, ``'cpu'`` or ``'reference'``), and why."""

    name: str
    reason: str


def _load(name: str) -> str:
    """Load the compiled library of one device type; an empty string, or the reason why its kernels cannot run."""
    path = LIBRARY_DIR / f'libmsda_{name}.so'
    if not path.exists():
        return f'{path.name} was not built: run "python csrc/build.py", or reinstall where a compiler is found'
    if name == 'cuda' and torch.version.cuda is None:
        return f'torch {torch.__version__} is built without CUDA'
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f'{path.name} could not be loaded: {error}'
    return ''


def _describe(name: str) -> str:
    if name != 'cpu' or _unavailable[name]:
        return f'compiled kernels for {name}'
    instruction_set = ctypes.CDLL(str(LIBRARY_DIR / 'libmsda_cpu.so')).msda_cpu_instruction_set
    instruction_set.restype = ctypes.c_char_p
    return f'compiled kernels for cpu, {instruction_set().decode()}'


_unavailable = {name: _load(name) for name in ('cpu', 'cuda')}  # '' where the kernels can run
_description = {name: _describe(name) for name in _unavailable}
_warned: set[str] = set()


def _name_from_environment() -> str | None:
    name = os.environ.get('MSDA_BACKEND') or None
    if name is not None and name not in NAMES:
        raise ValueError(f'MSDA_BACKEND is {name!r}, but one of {", ".join(NAMES)} is needed (unset: automatic)')
    return name


_chosen = _name_from_environment()


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Choose the backend within a ``with`` block, for the whole process; None chooses automatically.

    Example:
        >>> with use_backend('reference'):
        ...     backend_for('cpu', torch.float32).name
        'reference'
    """
    global _chosen
    if name is not None and name not in NAMES:
        raise ValueError(f'name is {name!r}, but one of {", ".join(NAMES)} or None is needed')
    previous, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = previous


def backend_for(device: torch.device | str, dtype: torch.dtype) -> Backend:
    """Tell which backend would run for a value of this device and dtype, and why.

    Raises:
        TypeError: The operator does not take this dtype.
        RuntimeError: A backend was chosen that cannot run there.
    """
    if dtype not in VALUE_DTYPES:
        raise TypeError(f'dtype is {dtype}, but one of float64, float32, float16, bfloat16 is needed')
    device_type = device.type if isinstance(device, torch.device) else torch.device(device).type
    unavailable = _unavailable.get(device_type, f'there are no kernels for device type {device_type!r}')
    if _chosen == 'reference':
        return Backend('reference', 'chosen by use_backend or MSDA_BACKEND')
    if _chosen is not None:
        if _chosen != device_type or unavailable:
            why = unavailable or f'the tensors are on device type {device_type!r}'
            raise RuntimeError(
                f'the backend {_chosen!r} was chosen by use_backend or MSDA_BACKEND, but it cannot run: {why}'
            )
        return Backend(_chosen, 'chosen by use_backend or MSDA_BACKEND')
    if unavailable:
        return Backend('reference', unavailable)
    return Backend(device_type, _description[device_type])


def why_unavailable(name: str) -> str:
    """Why the compiled kernels of a device type ('cpu', 'cuda') cannot run; empty where they can."""
    return _unavailable[name]


def runs_native(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether compiled kernels run, after the one warning if they ought to and cannot."""
    backend = backend_for(device, dtype)
    if backend.name != 'reference':
        return True
    if _chosen is None and device.type not in _warned and not torch.compiler.is_compiling():
        _warned.add(device.type)
        warnings.warn(
            f'multi-scale deformable attention runs in plain PyTorch on {device.type}, slower and with more '
            f'memory, because {backend.reason}. MSDA_BACKEND=reference chooses it without this warning.',
            stacklevel=4,
        )
    return False
