"""Loads the compiled libraries and chooses the backend that runs the operator.

By default, the compiled kernels of the value's device run. If they are unavailable, the reference runs after one
warning that names the reason. ``MSDA_BACKEND`` or :func:`use_backend` chooses a backend; if that one cannot run, the
operator raises instead of falling back. ``MSDA_LIBRARY_DIR`` names another directory of compiled libraries, such as a
build with sanitizers.
"""

import ctypes
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from msda_plugin.libraries import LIBRARY_DIR
from msda_plugin.ops.checks import VALUE_DTYPES

NAMES = ('cuda', 'cpu', 'reference')


class Backend(NamedTuple):
    """The name of a backend (``'cuda'``, ``'cpu'`` or ``'reference'``) and the reason why it runs."""

    name: str
    reason: str


def library_path(name: str) -> Path:
    """The compiled library of a device type; for CUDA, the one for the major version of CUDA of this torch."""
    major = (torch.version.cuda or '').partition('.')[0] if name == 'cuda' else ''
    return LIBRARY_DIR / f'libmsda_{name}{major}.so'


def _load(name: str) -> str:
    """Load the compiled library of a device type. Returns the reason why it cannot be used, or an empty string."""
    if name == 'cuda' and torch.version.cuda is None:
        return f'torch {torch.__version__} is built without CUDA'
    path = library_path(name)
    if not path.exists():
        others = sorted(other.name for other in LIBRARY_DIR.glob('libmsda_cuda*.so')) if name == 'cuda' else []
        if others:
            return (
                f'torch {torch.__version__} is built for CUDA {torch.version.cuda} and needs {path.name}, but there is '
                f'only {" and ".join(others)}: install a torch for the CUDA version of such a library, or run '
                f'"NVCC=PATH python csrc/build.py" with the nvcc of torch\'s CUDA version'
            )
        return f'{path.name} was not built: run "python csrc/build.py", or reinstall where a compiler is found'
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f'{path.name} could not be loaded: {error}'
    return ''


def _call(name: str, function: str) -> str:
    """Call a function of a loaded library that returns a string."""
    exported = ctypes.CDLL(str(library_path(name)))[function]
    exported.restype = ctypes.c_char_p
    return exported().decode()


def _describe(name: str) -> str:
    if name != 'cpu' or _unsupported[name]:
        return f'compiled kernels for {name}'
    return f'compiled kernels for cpu, {_call("cpu", "msda_cpu_instruction_set")}'


_unsupported = {name: _load(name) for name in ('cpu', 'cuda')}  # '' if the kernels can run
_description = {name: _describe(name) for name in _unsupported}
_warned: set[str] = set()


def _name_from_environment() -> str | None:
    name = os.environ.get('MSDA_BACKEND') or None
    if name is not None and name not in NAMES:
        raise ValueError(f'MSDA_BACKEND is {name!r}, but one of {", ".join(NAMES)} is needed (unset: automatic)')
    return name


_chosen = _name_from_environment()


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Choose the backend within a ``with`` block, for all threads of the process. None restores the default.

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
    """Return the backend that would run for a value of this device and dtype, with the reason.

    Raises:
        TypeError: If the operator does not support the dtype.
        RuntimeError: If a backend was chosen that cannot run on the device.
    """
    if dtype not in VALUE_DTYPES:
        raise TypeError(f'dtype is {dtype}, but one of float64, float32, float16, bfloat16 is needed')
    device_type = device.type if isinstance(device, torch.device) else torch.device(device).type
    unsupported = _unsupported.get(device_type, f'there are no kernels for device type {device_type!r}')
    if _chosen == 'reference':
        return Backend('reference', 'chosen by use_backend or MSDA_BACKEND')
    if _chosen is not None:
        if _chosen != device_type or unsupported:
            reason = unsupported or f'the tensors are on device type {device_type!r}'
            raise RuntimeError(
                f'the backend {_chosen!r} was chosen by use_backend or MSDA_BACKEND, but it cannot run: {reason}'
            )
        return Backend(_chosen, 'chosen by use_backend or MSDA_BACKEND')
    if unsupported:
        return Backend('reference', unsupported)
    return Backend(device_type, _description[device_type])


def unsupported_reason(name: str) -> str:
    """Why the compiled kernels of a device type (``'cpu'`` or ``'cuda'``) cannot run. Empty if they can."""
    return _unsupported[name]


def cuda_architectures() -> list[str]:
    """The GPU code in the loaded CUDA library: ``'sm_90'`` for machine code, ``'compute_120'`` for PTX."""
    return _call('cuda', 'msda_cuda_architectures').split('+')


def runs_native(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether compiled kernels run. Warns once for each device type that falls back to the reference."""
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
