"""Puts the operators in place of mmcv's compiled extension, takes them away, and tells what runs.

The substitute is a source file, ``mmcv/_ext.py``. Python prefers a compiled ``_ext`` in the same folder, so compiled
operators always win. Nothing here imports mmcv.
"""

import ast
import ctypes
import importlib.util
import re
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Literal, NamedTuple

from msda_plugin.files import atomic_write

MARKER = '# Written by msda_plugin; "python -m msda_plugin mmcv-ops remove" deletes it.'
SUBSTITUTE = f'''{MARKER}
"""mmcv's operators from msda_plugin: this mmcv was installed without compiled ones, which would win over this file."""

try:
    from msda_plugin.mmcv_ops import extension
except ImportError as error:
    raise ImportError(
        'mmcv was installed without compiled operators and msda_plugin, which provided them, cannot be imported '
        f'({{error}}): install msda_plugin again, or delete {{__file__}} and compile mmcv'
    ) from None


def __getattr__(name):
    return getattr(extension, name)
'''
DISTRIBUTIONS = ('onedl-mmcv', 'mmcv', 'mmcv-lite')
REINSTALL = 'pip install --force-reinstall --no-deps --no-cache-dir onedl-mmcv (or mmcv-lite)'
INSTALL = 'python -m msda_plugin mmcv-ops install'
CHECK = '"python -m msda_plugin env" says how to fix it'
COMPILE = (
    'make setup MMCV_OPS=1, or '
    'pip install --no-build-isolation --force-reinstall --no-deps --no-cache-dir onedl-mmcv (or mmcv)'
)


class Installation(NamedTuple):
    """Where mmcv's operators come from.

    ``kind`` is 'compiled', 'substitute' (msda_plugin's), 'foreign' (another ``_ext.py``) or 'none'; ``file`` is the
    file they come from, ``folder`` that of mmcv.
    """

    kind: Literal['compiled', 'substitute', 'foreign', 'none']
    folder: Path
    file: Path | None


class Row(NamedTuple):
    """What runs for an operator on a device: 'compiled mmcv', 'msda_plugin kernels', 'torchvision', 'PyTorch' or
    'not available'."""

    operator: str
    device: str
    runs: str
    reason: str


def find() -> Installation:
    """Look at mmcv's folder without importing mmcv.

    Raises:
        RuntimeError: If mmcv is missing or incomplete.
    """
    spec = importlib.util.find_spec('mmcv')
    locations = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not locations:
        for name in DISTRIBUTIONS:
            if list(metadata.distributions(name=name)):
                raise RuntimeError(f'{name} is installed, but its files are missing: {REINSTALL}')
        raise RuntimeError('mmcv is not installed: run "make setup", or install it with "pip install onedl-mmcv"')
    folder = Path(locations[0])
    compiled = [folder / f'_ext{suffix}' for suffix in EXTENSION_SUFFIXES if (folder / f'_ext{suffix}').exists()]
    if compiled:
        return Installation('compiled', folder, compiled[0])
    source = folder / '_ext.py'
    if not source.exists():
        return Installation('none', _complete(folder), None)
    kind = 'substitute' if source.read_text(errors='replace').startswith(MARKER) else 'foreign'
    return Installation(kind, folder, source)


def load_failure(library: Path) -> str:
    """Why a compiled extension of mmcv cannot be loaded, with the remedy; empty if it can. Imports torch."""
    try:
        import torch  # noqa: F401  (the extension needs its symbols)
    except (ImportError, OSError) as error:
        return f'torch cannot be imported ({_line(error)}): {CHECK}'
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        return f'mmcv was compiled for another torch ({_line(error)}): {REINSTALL}, then {INSTALL}'
    return ''


def _complete(folder: Path) -> Path:
    for name in ('__init__.py', 'ops/__init__.py', 'utils/ext_loader.py'):
        if not (folder / name).is_file():
            raise RuntimeError(f'mmcv in {folder} is incomplete, {name} is missing: {REINSTALL}')
    return folder


def install() -> str:
    """Write ``mmcv/_ext.py`` unless mmcv has compiled operators; returns what was done in one sentence.

    Raises:
        RuntimeError: If mmcv is missing or incomplete, has another ``_ext.py`` or compiled operators that do not load,
            or its folder is not writable.
    """
    found = find()
    if found.kind == 'compiled':
        if failure := load_failure(found.file):
            raise RuntimeError(failure)
        return f'mmcv has compiled operators, and they run: {found.file}. Nothing was installed.'
    _check_ours(found)
    _complete(found.folder)
    target = found.folder / '_ext.py'
    if found.kind == 'substitute' and target.read_text() == SUBSTITUTE:
        return f'mmcv already uses the operators of msda_plugin: {target}.'
    try:
        with atomic_write(target) as unfinished:
            unfinished.write_text(SUBSTITUTE)
    except OSError as error:
        raise RuntimeError(_not_writable(found.folder, error)) from error
    return f'mmcv now uses the operators of msda_plugin: {target}. "python -m msda_plugin mmcv-ops remove" undoes this.'


def remove() -> str:
    """Delete msda_plugin's ``mmcv/_ext.py``; returns what was done in one sentence.

    Raises:
        RuntimeError: If mmcv is missing, has another ``_ext.py``, or its folder is not writable.
    """
    found = find()
    source = found.folder / '_ext.py'
    if found.kind == 'compiled' and source.exists() and source.read_text(errors='replace').startswith(MARKER):
        found = Installation('substitute', found.folder, source)
    _check_ours(found)
    if found.kind != 'substitute':
        return f'There is nothing to remove in {found.folder}.'
    try:
        source.unlink()
        Path(importlib.util.cache_from_source(str(source))).unlink(missing_ok=True)
    except OSError as error:
        raise RuntimeError(_not_writable(found.folder, error)) from error
    return f'Removed {source}.'


def _check_ours(found: Installation) -> None:
    if found.kind == 'foreign':
        raise RuntimeError(f'{found.file} was not written by msda_plugin and stays as it is; delete it if it is stale')


def _line(error: Exception) -> str:
    return ' '.join(str(error).split())[:300]


def _not_writable(folder: Path, error: OSError) -> str:
    return (
        f'{folder} is not writable ({error.strerror or error}): run the command as the owner of the environment, or '
        'install into a virtual environment'
    )


def status() -> list[Row]:
    """Tell what runs for each operator of mmcv, on the CPU and, where torch sees one, on the GPU.

    Raises:
        RuntimeError: If mmcv is missing or incomplete.
    """
    found = find()
    asked = _asked_for(_complete(found.folder))
    reason = ''
    if found.kind == 'compiled':
        reason = load_failure(found.file)
        if not reason:
            return [Row(name, 'all', 'compiled mmcv', str(found.file)) for name in asked]
    elif found.kind == 'none':
        reason = f'run "{INSTALL}"'
    elif found.kind == 'foreign':
        reason = f'{found.file} was not written by msda_plugin'
    else:
        try:
            import torch

            from msda_plugin.mmcv_ops import extension
        except Exception as error:
            reason = f'{type(error).__name__}: {_line(error)}; {CHECK}'
    if reason:
        return [Row(name, 'all', 'not available', reason) for name in asked]
    devices = ['cpu', *(['cuda'] if torch.cuda.is_available() else [])]
    provided = {_operator(name) for name in extension.__all__}
    rows = [Row(name, device, *_provider(name, device)) for name in asked if name in provided for device in devices]
    return rows + [
        Row(name, 'all', 'not available', f'compile mmcv: {COMPILE}') for name in asked if name not in provided
    ]


def _provider(operator: str, device: str) -> tuple[str, str]:
    import torch

    from msda_plugin.mmcv_ops import torchvision_ops
    from msda_plugin.ops import backend_for

    if operator == 'ms_deform_attn':
        backend = backend_for(device, torch.float32)
        return ('PyTorch' if backend.name == 'reference' else 'msda_plugin kernels'), backend.reason
    if operator in TORCHVISION_OPERATORS:
        ops, reason = torchvision_ops.find(device)
        return ('torchvision', TORCHVISION_OPERATORS[operator]) if ops is not None else ('PyTorch', reason)
    return 'PyTorch', ''


TORCHVISION_OPERATORS = {
    'nms': 'float32 and float64; PyTorch for others and offset=1',
    'roi_align': "float32; PyTorch for others and pool_mode='max'",
    'deform_conv': 'float32 and float64; PyTorch for others',
    'modulated_deform_conv': 'float32 and float64; PyTorch for others',
}


def _asked_for(folder: Path) -> list[str]:
    """The operators that mmcv's Python looks up in its extension, without _forward and _backward, sorted."""
    names = set()
    for path in (folder / 'ops').glob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, 'attr', '') == 'load_ext':
                names |= {_operator(name) for name in ast.literal_eval(node.args[1])}
    return sorted(names - {'get_compiler_version', 'get_compiling_cuda_version'})


def _operator(function: str) -> str:
    return re.sub(r'_(forward|backward)(_input|_parameters)?$', '', function)
