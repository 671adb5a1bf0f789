"""``python -m msda_plugin env``: report installed packages, the operator's backends, and problems with their fixes.

It also runs if packages are missing or broken, so only the standard library is imported outside of ``try``.
"""

import argparse
import ctypes
import json
import os
import platform
import shutil
import sys
import textwrap
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib import import_module, metadata
from pathlib import Path

from msda_plugin.version import __version__

PACKAGES = ('torch', 'mmengine', 'mmcv', 'mmdet', 'numpy', 'pycocotools', 'scipy', 'matplotlib')
STACKS = dict(
    forks=dict(mmengine='onedl-mmengine', mmcv='onedl-mmcv', mmdet='onedl-mmdetection'),
    upstream=dict(mmengine='mmengine', mmcv='mmcv', mmdet='mmdet'),
)
LITE = 'mmcv-lite'  # the upstream mmcv without compiled operators
COMPILED = dict(mmcv='mmcv.ops')  # compiled submodules, which the package itself does not import
DTYPES = ('float64', 'float32', 'float16', 'bfloat16')
TORCH_MINIMUM = (2, 10)
INSTALL_TORCH = 'install torch >= 2.10 for this machine, see https://pytorch.org'
INSTALL_STACK = 'in a clone: pip install -r requirements/forks.txt'
INSTALL_OPERATORS = 'python -m msda_plugin mmcv-ops install'
REINSTALL = 'pip install --no-build-isolation --force-reinstall --no-deps .'
INDENT = dict(initial_indent='  ', subsequent_indent='    ', break_on_hyphens=False)
CODES = ('sm_', 'compute_')  # prefixes of architectures: machine code, PTX
REBUILD = f'in a clone: python csrc/build.py; or reinstall: {REINSTALL}'


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


def _installed_version(name: str) -> str | None:
    for distribution in (name, *(names[name] for names in STACKS.values() if name in names)):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def _stack(packages: dict, problems: Problems) -> dict:
    """Find the distributions of mmengine, mmcv and mmdet; add problems for missing, broken and mixed packages."""
    installed = {}
    for name, names in STACKS.items():
        installed[name] = {}
        for package, distribution in names.items():
            for candidate in (distribution, LITE) if distribution == 'mmcv' else (distribution,):
                try:
                    installed[name][package] = f'{candidate} {metadata.version(candidate)}'
                except metadata.PackageNotFoundError:
                    continue
    present = [name for name, found in installed.items() if found]
    kind = 'none' if not present else present[0] if len(present) == 1 else 'mixed'
    if kind == 'mixed':
        found = [label for name in present for label in installed[name].values()]
        problems.add(
            f'two stacks that overwrite each other are installed: {", ".join(found)}',
            'pip uninstall all of these, then install one set: requirements/forks.txt or requirements/upstream.txt',
        )
    for name, package in packages.items():
        if package['error']:
            problems.add(
                f'{name} cannot be imported: {package["error"]}',
                INSTALL_TORCH
                if name == 'torch'
                else INSTALL_OPERATORS
                if "No module named 'mmcv._ext'" in package['error']
                else f'{INSTALL_STACK} --force-reinstall --no-deps --no-cache-dir; then {INSTALL_OPERATORS}'
                if name in STACKS['forks']
                else f'pip install --force-reinstall {name}',
            )
        elif package['version'] is None:
            problems.add(
                f'{name} is not installed',
                INSTALL_TORCH
                if name == 'torch'
                else INSTALL_STACK
                if name in STACKS['forks']
                else f'pip install {name}',
            )
    return dict(kind=kind, distributions=[label for name in present for label in installed[name].values()])


def _mmcv_operators() -> dict:
    """What runs for mmcv's operators: ``{'PyTorch': ['nms', 'nms (cuda)', …], …}``; empty if mmcv has none."""
    try:
        from msda_plugin import mmcv_ops

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
    numbers = tuple(int(part) for part in package['version'].split('.')[:2])
    if numbers < TORCH_MINIMUM:
        problems.add(f'torch is {package["version"]}, but torch >= 2.10 is needed for its stable ABI', INSTALL_TORCH)
    return True


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
            'install a C++20 compiler (gcc >= 11), then ' + REBUILD if not library['found'] else REBUILD,
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
