"""``python -m msda_plugin env``: report installed packages, the operator's backends, and problems with their fixes.

It also runs if packages are missing or broken, so what is imported outside of ``try`` needs only the standard library.
"""

import argparse
import ctypes
import json
import os
import platform
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib import import_module, metadata
from pathlib import Path

from msda_plugin import mmcv_ops
from msda_plugin.version import __version__

PACKAGES = ('torch', 'mmengine', 'mmcv', 'mmdet', 'numpy', 'pycocotools', 'scipy', 'matplotlib')
DISTRIBUTIONS = dict(
    mmengine=('onedl-mmengine', 'mmengine'), mmcv=mmcv_ops.DISTRIBUTIONS, mmdet=('onedl-mmdetection', 'mmdet')
)
COMPILED = dict(mmcv='mmcv.ops')  # compiled submodules, which the package itself does not import
DTYPES = ('float64', 'float32', 'float16', 'bfloat16')
TORCH_MINIMUM = (2, 10)
INSTALL_TORCH = 'install torch >= 2.10 for this machine, see https://pytorch.org'
INSTALL_STACK = 'in a clone: pip install -r requirements/'
REINSTALL = 'pip install --no-build-isolation --force-reinstall --no-deps .'
INDENT = dict(initial_indent='  ', subsequent_indent='    ', break_on_hyphens=False)
CODES = ('sm_', 'compute_')  # prefixes of architectures: machine code, PTX
REBUILD = f'in a clone: python csrc/build.py; or reinstall: {REINSTALL}'
INSTALL_LIBRARIES = f'install a wheel of msda_plugin, or a C++20 compiler (gcc >= 11) and then {REBUILD}'


class Problems(list):
    """A list of dicts with ``what`` and ``remedy``."""

    def add(self, what: str, remedy: str) -> None:
        self.append(dict(what=what, remedy=remedy))


def collect() -> dict:
    """Return the report as a dict of plain values. ``healthy`` is True if ``problems`` is empty."""
    problems = Problems()
    packages = {name: _package(name) for name in PACKAGES}
    stack = _stack(packages, problems)
    report = dict(
        msda_plugin=__version__,
        python=platform.python_version(),
        executable=sys.executable,
        platform=platform.platform(),
        packages=packages,
        stack=stack,
        environment={name: value for name, value in os.environ.items() if name.startswith('MSDA_')},
        libraries={},
        backends=[],
        gpus=[],
        mmcv_operators=_mmcv_operators(),
    )
    if _check_torch(packages['torch'], problems):
        before = list(problems)
        try:
            from msda_plugin.ops import backends
        except Exception as error:
            problems.add(
                f'msda_plugin.ops cannot be imported: {_summary(error)}',
                'correct the environment variable' if 'MSDA_' in str(error) else REBUILD,
            )
        else:
            report['libraries'] = {name: _library(backends, name) for name in ('cpu', 'cuda')}
            report['gpus'] = _gpus(report['libraries']['cuda'])
            devices = ('cpu', 'cuda')
            report['backends'] = [_backend(device, dtype) for device in devices for dtype in DTYPES]
            _check_cpu(report, problems)
            _check_driver(report['libraries']['cuda'], problems)
            _check_gpu(report, problems)
            _check_chosen(report, problems)
        if _is_old(packages['torch']):
            problems[:] = before  # it explains the others
    return dict(report, problems=list(problems), healthy=not problems)


# ---- packages -------------------------------------------------------------------------------------------------------
def _package(name: str) -> dict:
    """Return the version and the error raised by the import; each is None if there is none."""
    try:
        with redirect_stdout(sys.stderr):  # standard output is the report's
            module = import_module(name)
            if name in COMPILED:
                import_module(COMPILED[name])
    except ModuleNotFoundError as error:
        missing = error.name == name
        return dict(version=None, error=None if missing else _summary(error))
    except Exception as error:  # a broken package can raise anything
        return dict(version=_installed_version(name), error=_summary(error))
    return dict(version=getattr(module, '__version__', None) or _installed_version(name), error=None)


def _installed(name: str) -> list[str]:
    """The installed distributions of a package, as ``'NAME VERSION'``."""
    found = []
    for distribution in DISTRIBUTIONS.get(name, (name,)):
        try:
            found.append(f'{distribution} {metadata.version(distribution)}')
        except metadata.PackageNotFoundError:
            continue
    return found


def _installed_version(name: str) -> str | None:
    found = _installed(name)
    return found[0].partition(' ')[2] if found else None


def _stack(packages: dict, problems: Problems) -> dict:
    """Find the distributions of mmengine, mmcv and mmdet; add problems for missing, broken and mixed packages."""
    installed = [label for name in DISTRIBUTIONS for label in _installed(name)]
    forks = [label for label in installed if label.startswith('onedl-')]
    upstream = [label for label in installed if label not in forks]
    kind = 'mixed' if forks and upstream else 'forks' if forks else 'upstream' if upstream else 'none'
    if kind == 'mixed':
        problems.add(
            f'two stacks that overwrite each other are installed: {", ".join(forks + upstream)}',
            'pip uninstall all of these, then install one set: requirements/forks.txt or requirements/upstream.txt',
        )
    elif len(both := _installed('mmcv')) > 1:
        problems.add(
            f'{" and ".join(both)} are installed and overwrite each other',
            f'pip uninstall mmcv mmcv-lite; pip install --no-deps {both[-1].replace(" ", "==")}; {mmcv_ops.INSTALL}',
        )
    install = f'{INSTALL_STACK}{"upstream" if kind == "upstream" else "forks"}.txt'
    for name, package in packages.items():
        found = _installed(name)
        if package['error']:
            what = f'{name} cannot be imported: {package["error"]}'
        elif package['version'] is None:
            what = f'{found[0]} is installed, but its files are missing' if found else f'{name} is not installed'
        else:
            continue
        problems.add(what, _remedy(name, package['error'] or '', found, install))
    return dict(kind=kind, distributions=forks + upstream)


def _remedy(name: str, error: str, distributions: list[str], install_stack: str) -> str:
    """How to install a package, or to repair it if distributions of it are installed."""
    missing = re.search(r"No module named '(\w+)", error)
    if 'torch' in (name, missing and missing[1]):
        return INSTALL_TORCH
    if "No module named 'mmcv._ext'" in error:
        return mmcv_ops.INSTALL + _unless_writable(mmcv_ops.find().folder)
    if name not in DISTRIBUTIONS:
        return f'pip install {"--force-reinstall " if distributions else ""}{name}'
    if not distributions or missing and missing[1] != name:
        return install_stack
    reinstall = '--force-reinstall --no-deps --no-cache-dir'
    if name == 'mmcv':
        return f'pip install {reinstall} {distributions[0].replace(" ", "==")}; then {mmcv_ops.INSTALL}'
    return f'{install_stack} {reinstall}; then {mmcv_ops.INSTALL}'


def _unless_writable(folder: Path) -> str:
    if os.access(folder, os.W_OK):
        return ''
    return f', as the owner of the environment, since {folder} is not writable; or use a virtual environment'


def _mmcv_operators() -> dict:
    """What runs for mmcv's operators: ``{'PyTorch': ['nms', 'nms (cuda)', …], …}``; empty if mmcv has none."""
    try:
        found = mmcv_ops.find()
        rows = mmcv_ops.status() if found.kind in ('compiled', 'substitute') else []
    except Exception:  # mmcv or torch is missing or broken, which `_stack` reports
        return {}
    runs = {}
    for row in rows:
        runs.setdefault(row.runs, []).append(row.operator + (f' ({row.device})' if row.device == 'cuda' else ''))
    return runs


def _check_torch(package: dict, problems: Problems) -> bool:
    """Whether torch can be imported. Adds a problem if it is too old."""
    if package['error'] or package['version'] is None:
        return False
    if _is_old(package):
        problems.add(f'torch is {package["version"]}, but torch >= 2.10 is needed for its stable ABI', INSTALL_TORCH)
    return True


def _is_old(torch: dict) -> bool:
    return tuple(int(part) for part in torch['version'].split('.')[:2]) < TORCH_MINIMUM


# ---- the operator ---------------------------------------------------------------------------------------------------
def _library(backends, name: str) -> dict:
    """Describe a compiled library: its file, whether it is usable or why not, and the GPU code in a CUDA library."""
    path = backends.library_path(name)
    reason = backends.unsupported_reason(name)
    library = dict(path=str(path), found=path.is_file(), usable=not reason, reason=reason or None)
    if name == 'cuda':
        codes = backends.cuda_architectures() if library['usable'] else []
        numbers = {kind: [int(code.removeprefix(kind)) for code in codes if code.startswith(kind)] for kind in CODES}
        library.update(machine_code=numbers['sm_'], ptx=numbers['compute_'], driver=_driver())
    return library


def _driver() -> str | None:
    """The newest CUDA version that the NVIDIA driver runs, such as '13.0'; None if there is no driver."""
    version = ctypes.c_int()
    try:
        if ctypes.CDLL('libcuda.so.1').cuDriverGetVersion(ctypes.byref(version)):
            return None
    except (OSError, AttributeError):
        return None
    return f'{version.value // 1000}.{version.value % 1000 // 10}'


def _check_driver(library: dict, problems: Problems) -> None:
    """Add a problem if the driver is too old for the CUDA library, which holds the runtime of its major version."""
    major = Path(library['path']).stem.removeprefix('libmsda_cuda')
    if library['usable'] and library['driver'] and int(library['driver'].partition('.')[0]) < int(major):
        problems.add(
            f'the NVIDIA driver runs CUDA {library["driver"]} at most, but torch and {Path(library["path"]).name} are '
            f'for CUDA {major}',
            f'update the driver, or install torch for CUDA {library["driver"].partition(".")[0]}',
        )


def has_code(capability: int, machine_code: Sequence[int], ptx: Sequence[int]) -> bool:
    """Whether a GPU of this compute capability (90, 120, …) can run a library's code.

    Machine code runs on GPUs of the same major version and at least the same minor version, PTX on all newer GPUs.
    """
    return any(arch // 10 == capability // 10 and arch <= capability for arch in machine_code) or any(
        arch <= capability for arch in ptx
    )


def _gpus(library: dict) -> list[dict]:
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = 10 * properties.major + properties.minor
        gpus.append(
            dict(
                name=properties.name,
                arch=f'sm_{capability}',
                memory_gib=round(properties.total_memory / 2**30, 1),
                has_code=has_code(capability, library['machine_code'], library['ptx']),
            )
        )
    return gpus


def _backend(device: str, dtype: str) -> dict:
    """Return the backend for a device and dtype with its reason; ``backend`` is None if the chosen one cannot run."""
    import torch

    from msda_plugin.ops import backend_for

    try:
        backend = backend_for(device, getattr(torch, dtype))
    except RuntimeError as error:
        return dict(device=device, dtype=dtype, backend=None, reason=str(error))
    return dict(device=device, dtype=dtype, backend=backend.name, reason=backend.reason)


def _try(device: str) -> str | None:
    """Run the operator on a device and compare it with the reference. Returns the problem, or None."""
    import torch

    from msda_plugin.ops import ms_deform_attn, ms_deform_attn_reference

    generator = torch.Generator().manual_seed(0)
    levels = [(4, 6), (2, 3)]
    value, locations, weights = (
        torch.rand(shape, generator=generator) for shape in ((1, 30, 2, 8), (1, 5, 2, 2, 3, 2), (1, 5, 2, 2, 3))
    )
    expected = ms_deform_attn_reference(value, levels, None, locations, weights)
    try:
        out = ms_deform_attn(value.to(device), levels, None, locations.to(device), weights.to(device)).cpu()
    except RuntimeError as error:
        return _summary(error)
    difference = float((out - expected).abs().max())
    return None if difference < 1e-4 else f'its result differs from the reference by {difference:.1e}'


def _check_cpu(report: dict, problems: Problems) -> None:
    library = report['libraries']['cpu']
    if not library['usable']:
        problems.add(
            f'the operator runs in plain PyTorch on the CPU: {library["reason"]}',
            INSTALL_LIBRARIES if not library['found'] else REBUILD,
        )
    elif report['environment'].get('MSDA_BACKEND', '') in ('', 'cpu'):
        failure = _try('cpu')
        if failure:
            problems.add(f'the compiled operator fails on the CPU: {failure}', REBUILD)


def _check_gpu(report: dict, problems: Problems) -> None:
    import torch

    library, gpus = report['libraries']['cuda'], report['gpus']
    if not gpus:
        # Having no GPU is fine; having a GPU that torch cannot use is a problem.
        if not (Path('/proc/driver/nvidia/version').is_file() or shutil.which('nvidia-smi')):
            return
        if torch.version.cuda is None:
            problems.add(
                f'there is an NVIDIA driver, but torch {torch.__version__} is built without CUDA',
                'to use the GPU, ' + INSTALL_TORCH,
            )
        elif os.environ.get('CUDA_VISIBLE_DEVICES') is None:
            problems.add(
                f'there is an NVIDIA driver, but torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU',
                'update the driver, or install torch for the CUDA version that nvidia-smi shows',
            )
        return
    rebuild = f'MSDA_BUILD_CUDA=1 {REINSTALL} (in a clone, with nvcc)'
    if not library['usable']:
        problems.add(f'there is a GPU, but the operator runs in plain PyTorch on it: {library["reason"]}', rebuild)
        return
    for index, gpu in enumerate(gpus):
        if not gpu['has_code']:
            problems.add(
                f'{library["path"]} has no code for {gpu["name"]} ({gpu["arch"]}); it has {_architectures(library)}',
                f'MSDA_CUDA_ARCHS={gpu["arch"].removeprefix("sm_")} {rebuild}',
            )
        elif report['environment'].get('MSDA_BACKEND', '') in ('', 'cuda'):
            failure = _try(f'cuda:{index}')
            if failure:
                problems.add(f'the compiled operator fails on {gpu["name"]}: {failure}', rebuild)


def _check_chosen(report: dict, problems: Problems) -> None:
    chosen = report['environment'].get('MSDA_BACKEND')
    if chosen in report['libraries'] and not report['libraries'][chosen]['usable']:
        problems.add(
            f'MSDA_BACKEND={chosen} chooses a backend that cannot run: {report["libraries"][chosen]["reason"]}',
            'unset MSDA_BACKEND, or ' + REBUILD,
        )


def _summary(error: BaseException) -> str:
    return f'{type(error).__name__}: {" ".join(str(error).split())[:300]}'


# ---- the report -----------------------------------------------------------------------------------------------------
def page(report: dict) -> str:
    """Format the report as text."""
    lines = [f'msda_plugin {report["msda_plugin"]}, Python {report["python"]}, {report["platform"]}', '', 'packages']
    for name, package in report['packages'].items():
        lines.append(
            f'  {name:<12} {package["version"] or "not installed"}'
            + (f', broken: {package["error"]}' if package['error'] else '')
        )
    stack = report['stack']
    lines += [
        f'  stack        {stack["kind"]}'
        + (f' ({", ".join(stack["distributions"])})' if stack['distributions'] else '')
    ]
    if report['libraries']:
        lines += ['', 'compiled libraries']
        for name, library in report['libraries'].items():
            state = f'{Path(library["path"]).name} in use' if library['usable'] else library['reason']
            code = f'; code for {_architectures(library)}' if library.get('machine_code') else ''
            lines.append(f'  {name:<12} {state}{code}')
        driver = report['libraries']['cuda']['driver']
        lines.append(f'  driver       {f"NVIDIA, CUDA {driver} or older" if driver else "no NVIDIA driver"}')
    lines += [''] + [
        f'GPU {index}: {gpu["name"]}, {gpu["arch"]}, {gpu["memory_gib"]} GiB; the CUDA library has '
        f'{"" if gpu["has_code"] else "NO "}code for it'
        for index, gpu in enumerate(report['gpus'])
    ]
    lines += [] if report['gpus'] else ['GPU: none visible to torch']
    if report['backends']:
        lines += ['', 'backends']
        for entry in report['backends']:
            lines.append(
                f'  {entry["device"]:<5} {entry["dtype"]:<9} {entry["backend"] or "error":<10} {entry["reason"]}'
            )
    if report['mmcv_operators']:
        lines += ['', "mmcv's operators"]
        for runs, operators in report['mmcv_operators'].items():
            named = runs not in ('compiled mmcv', 'not available')  # these two are long: `mmcv-ops status` lists them
            listing = ', '.join(operators) if named else f'{len(operators)} operators'
            lines.append(textwrap.fill(f'{runs}: {listing}', 120, **INDENT))
    lines += ['', *(f'environment: {name}={value}' for name, value in report['environment'].items())]
    if report['healthy']:
        lines.append('No problems found.')
    for problem in report['problems']:
        lines += [f'PROBLEM: {problem["what"]}', f'  fix: {problem["remedy"]}']
    return '\n'.join(lines)


def _architectures(library: dict) -> str:
    return ', '.join(
        [*(f'sm_{arch}' for arch in library['machine_code']), *(f'compute_{arch} (PTX)' for arch in library['ptx'])]
    )


def main(argv: list[str]) -> int:
    """Run the command. Returns the exit status: 0 if there are no problems, else 1."""
    parser = argparse.ArgumentParser(
        prog='python -m msda_plugin env',
        description='Report the installed packages, the backend of the operator for each device and dtype, and '
        'problems with their fixes. Exit status: 0 if there are no problems, else 1.',
        epilog='example: python -m msda_plugin env --json',
    )
    parser.add_argument('--json', action='store_true', help='print the report as JSON')
    args = parser.parse_args(argv)
    report = collect()
    print(json.dumps(report, indent=1) if args.json else page(report))
    return 0 if report['healthy'] else 1


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
