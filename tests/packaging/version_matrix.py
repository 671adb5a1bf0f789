"""Installs the wheel in fresh environments without a compiler, one for each row of versions, and tests it there.

    make wheel
    python tests/packaging/version_matrix.py [--rows NAME …] [--checks NAME …] [--out table.md] [--dist DIR]
    python tests/packaging/version_matrix.py --list

A row installs torch from PyPI and the wheel, loads the libraries, and runs the operator's tests, also in onnxruntime;
then it adds the stack and mmcv's operators from msda_plugin, runs ``python -m msda_plugin env``, and trains. All this
happens in a folder without the package's sources, with nothing but the environment on PATH. At last the sdist is
installed with a compiler, against the row's torch, with CUDA if nvcc is found. A row needs 8 GB of disk, which it
frees. The results are kept next to the table, so that rows and checks can be run one by one.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ('configs', 'projects', 'tests', 'pyproject.toml')
TORCH = '2.13.0'
OPERATOR = [
    'tests/ops/test_operator.py',
    'tests/ops/test_operator_checks.py',
    'tests/ops/test_operator_torch.py',
    'tests/ops/test_operator_backends.py',
]
ONNXRUNTIME = ['tests/export/test_onnx_operator.py', 'tests/export/test_onnxruntime_library.py']
TRAINING = ['tests/test_end_to_end.py', '-k', 'own_commands']
CHECKS = ('operator', 'onnxruntime', 'training', 'sources')
COMPILERS = ('gcc', 'g++', 'cc', 'c++', 'clang', 'clang++', 'nvcc')


@dataclass(frozen=True)
class Row:
    """One environment.

    Attributes:
        python: Version of the interpreter.
        torch: Version of torch.
        stack: OpenMMLab packages, 'forks' or 'upstream'.
        setuptools: Allowed versions of setuptools.
        numpy: Allowed versions of numpy.
        onnxruntime: Allowed versions of onnxruntime.
    """

    python: str = '3.11'
    torch: str = TORCH
    stack: str = 'forks'
    setuptools: str = ''
    numpy: str = ''
    onnxruntime: str = ''

    @property
    def name(self) -> str:
        names = [f'python{self.python}', f'torch{self.torch}', self.stack]
        names += [f'setuptools{self.setuptools}'] if self.setuptools else []
        names += [f'numpy{self.numpy}'] if self.numpy else []
        names += [f'onnxruntime{self.onnxruntime}'] if self.onnxruntime else []
        return '-'.join(names)


ROWS = (
    Row('3.10', '2.10.0'),
    Row('3.12', '2.11.0'),
    Row('3.10', '2.12.1'),
    Row('3.13', '2.13.0'),
    Row('3.12', '2.14.1'),
    Row('3.12', '2.15.0'),
    Row('3.13', '2.15.0'),
    Row(setuptools='==80.*'),  # the oldest that onedl-mim supports
    Row(setuptools='>=82'),
    Row(numpy='==1.26.*', onnxruntime='==1.17.*'),  # the oldest that the library supports
    Row(onnxruntime='==1.20.*'),
    Row(stack='upstream', setuptools='==77.*'),
    Row(stack='upstream', setuptools='>=82'),
)


class StepError(Exception):
    """A command of a row failed. The message is the end of its output."""


class Environment:
    """A fresh virtual environment, with the tests but without the package's sources."""

    def __init__(self, row: Row, folder: Path, tree: Path) -> None:
        self.row, self.folder, self.tree = row, folder, tree
        self.python = folder / 'bin' / 'python'
        subprocess.run([interpreter(row.python), '-m', 'venv', folder], check=True)
        found = [name for name in COMPILERS if shutil.which(name, path=str(folder / 'bin'))]
        if found:
            raise StepError(f'the environment has {", ".join(found)}')

    def run(self, *command: str, path: str = '', **environment: str) -> str:
        """Run a command of the environment; PATH holds the environment and ``path``. Returns what it prints."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(('PYTHONPATH', 'MSDA_'))}
        kept['PATH'] = os.pathsep.join(filter(None, [str(self.folder / 'bin'), path]))
        done = subprocess.run(
            [str(self.folder / 'bin' / command[0]), *command[1:]],  # an absolute path stays what it is
            cwd=self.tree,
            capture_output=True,
            text=True,
            timeout=3600,
            env={**kept, **environment},
        )
        if done.returncode:
            raise StepError((done.stdout + done.stderr)[-3000:])
        return done.stdout

    def pip(self, *arguments: str) -> None:
        """Install by uv if it is on PATH, else by pip, which takes minutes for torch."""
        uv = shutil.which('uv')
        if uv:
            cache = self.folder / 'cache'  # deleted with the environment
            self.run(uv, 'pip', 'install', '-q', '--python', str(self.python), *arguments, UV_CACHE_DIR=str(cache))
        else:
            self.run('python', '-m', 'pip', 'install', '-q', '--no-cache-dir', *arguments)

    def install(self, wheel: Path) -> dict[str, str]:
        """Install as docs/install.md says, constrained to the versions of the row."""
        row = self.row
        constraints = self.folder / 'constraints.txt'
        pinned = dict(setuptools=row.setuptools, numpy=row.numpy, torch=f'=={row.torch}')
        constraints.write_text(''.join(f'{name}{versions}\n' for name, versions in pinned.items() if versions))
        self.held = ['-c', str(constraints)]
        self.pip(f'torch=={row.torch}')
        started = time.monotonic()
        self.run('python', '-m', 'pip', 'install', '-q', '--no-deps', str(wheel))
        seconds = time.monotonic() - started
        self.pip(*self.held, str(wheel), 'setuptools>=77', 'pytest', 'hypothesis')
        return dict(wheel=f'{seconds:.0f} s')

    def check_libraries(self) -> dict[str, str]:
        """Returns the versions and the libraries that are loaded and have registered their kernels."""
        code = """
import json, platform, numpy, setuptools, torch
from msda_plugin.ops import backends
loaded = [name for name in ('cpu', 'cuda') if not backends.unsupported_reason(name)]
registered = [torch._C._dispatch_has_kernel_for_dispatch_key('msda::ms_deform_attn', name.upper()) for name in loaded]
assert all(registered), registered
print(json.dumps(dict(
    python=platform.python_version(), torch=torch.__version__, numpy=numpy.__version__,
    setuptools=setuptools.__version__, libraries=', '.join(backends.library_path(name).stem for name in loaded),
)))"""
        result = json.loads(self.run('python', '-W', 'ignore', '-c', code))
        expected = 'libmsda_cpu' if '+cpu' in result['torch'] else 'libmsda_cpu, libmsda_cuda'
        if not result['libraries'].startswith(expected):
            raise StepError(f'only {result["libraries"]} is loaded')
        return dict(result, libraries=result['libraries'].replace('libmsda_', ''))

    def check_onnxruntime(self) -> str:
        """Install onnxruntime and run the library's tests. Returns its version and the counts."""
        self.pip(*self.held, 'onnx', f'onnxruntime{self.row.onnxruntime}')
        version = self.run('python', '-c', 'import onnxruntime; print(onnxruntime.__version__)').strip()
        return f'{version}: {self.pytest(*ONNXRUNTIME)}'

    def check_training(self, wheel: Path) -> str:
        """Install the stack and mmcv's operators, as docs/install.md says; train and test."""
        self.pip(*self.held, f'{wheel}[{self.row.stack}]', 'tensorboard')
        self.run('python', '-m', 'msda_plugin', 'mmcv-ops', 'install')
        self.run('python', '-m', 'msda_plugin', 'env')  # fails on any problem
        return f'{self.row.stack}: {self.pytest(*TRAINING)}'

    def pytest(self, *arguments: str) -> str:
        """Test the installed package. Returns the last line of pytest's report."""
        # Without the project's -q: a second one would hide the counts.
        options = ['-o', 'addopts=--import-mode=importlib', '-q', '-p', 'no:cacheprovider']
        output = self.run('python', '-m', 'pytest', *options, *arguments)
        return output.strip().splitlines()[-1].strip('= ').partition(' in ')[0]

    def check_sources(self, sdist: Path) -> str:
        """Install the sdist with a compiler, against the row's torch, and load its libraries. Returns their names."""
        out, empty = self.folder / 'built', self.folder / 'empty'
        empty.mkdir()
        options = ['--no-build-isolation', '--no-deps', '--target', str(out), str(sdist)]
        mode = '1' if shutil.which('nvcc') else '0'
        # A compiler is on PATH; one architecture is enough.
        path = os.environ['PATH']
        self.run('python', '-m', 'pip', 'install', *options, path=path, MSDA_BUILD_CUDA=mode, MSDA_CUDA_ARCHS='90')
        paths = sorted((out / 'msda_plugin/ops/lib').glob('*.so'))
        # By path: the package would load no library for another CUDA than torch's. A CPU-only torch can load none.
        code = (
            'import sys, torch, msda_plugin.ops\n'
            'for path in sys.argv[1:]:\n'
            '    if "cuda" not in path or torch.version.cuda: torch.ops.load_library(path)'
        )
        self.run('python', '-c', code, *map(str, paths), PYTHONPATH=str(out), MSDA_LIBRARY_DIR=str(empty))
        return ', '.join(path.stem.removeprefix('libmsda_') for path in paths)


def run_row(row: Row, checks: Sequence[str], wheel: Path, sdist: Path, tree: Path, folder: Path) -> dict[str, str]:
    """Test a row. Returns its versions, and for each check the result or 'FAILED: …'."""
    result = dict(python=row.python, torch=row.torch)
    try:
        env = Environment(row, folder, tree)
        result |= env.install(wheel)
        result |= env.check_libraries()
        functions = dict(
            operator=lambda: env.pytest('-m', 'not slow', *OPERATOR),
            onnxruntime=env.check_onnxruntime,
            training=lambda: env.check_training(wheel),
            sources=lambda: env.check_sources(sdist),
        )
        for name in checks:
            try:
                result[name] = functions[name]()
            except (StepError, subprocess.TimeoutExpired) as error:
                result[name] = f'FAILED: {error}'
    except (StepError, subprocess.SubprocessError, FileNotFoundError) as error:
        result['wheel'] = f'FAILED: {error}'
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return result


def interpreter(version: str) -> Path:
    """Find the interpreter of a version, on PATH or in pyenv.

    Raises:
        FileNotFoundError: If there is none.
    """
    if version == f'{sys.version_info.major}.{sys.version_info.minor}':
        return Path(sys.executable).resolve()
    found = shutil.which(f'python{version}')
    pyenv = Path(os.environ.get('PYENV_ROOT', Path.home() / '.pyenv')) / 'versions'
    candidates = [*pyenv.glob(f'{version}.*/bin/python'), *([Path(found)] if found else [])]
    if not candidates:
        raise FileNotFoundError(f'no Python {version} is installed')
    return candidates[0]


def copy_tests(tree: Path) -> None:
    """Copy the tests and the configs, but not the package."""
    ignore = shutil.ignore_patterns('__pycache__', '*.so')
    tree.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=ignore)
        else:
            shutil.copy2(ROOT / name, tree)


COLUMNS = {
    'Python': 'python',
    'torch': 'torch',
    'setuptools': 'setuptools',
    'numpy': 'numpy',
    'wheel installs in': 'wheel',
    'libraries loaded': 'libraries',
    'operator tests': 'operator',
    'onnxruntime': 'onnxruntime',
    'training': 'training',
    'built from source': 'sources',
}


def table(results: dict[str, dict[str, str]]) -> str:
    """Format the results as a Markdown table."""
    lines = [f'| {" | ".join(COLUMNS)} |', '|' + ' -- |' * len(COLUMNS)]
    for row in ROWS:
        if row.name in results:
            texts = [results[row.name].get(key, '') for key in COLUMNS.values()]
            lines.append(f'| {" | ".join("failed" if text.startswith("FAILED") else text for text in texts)} |')
    return '\n'.join(lines) + '\n'


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [row.name for row in ROWS]
    parser.add_argument('--rows', nargs='+', choices=names, metavar='NAME', help='rows to run (default: all)')
    parser.add_argument('--checks', nargs='+', choices=CHECKS, default=CHECKS, help='besides loading the libraries')
    parser.add_argument('--out', type=Path, default=Path('version_matrix.md'), help='default: %(default)s')
    parser.add_argument('--dist', type=Path, default=ROOT / 'dist', help='wheel and sdist (default: dist)')
    parser.add_argument('--work', type=Path, help='folder for the environments (default: a temporary one)')
    parser.add_argument('--list', action='store_true', help='list the rows and stop')
    args = parser.parse_args(argv)
    if args.list:
        print(*names, sep='\n')
        return 0
    wheel, sdist = ([*args.dist.resolve().glob(pattern)] for pattern in ('msda_plugin-*.whl', 'msda_plugin-*.tar.gz'))
    if len(wheel) != 1 or len(sdist) != 1:
        parser.error(f'{args.dist} needs one wheel and one sdist of msda_plugin: run `make wheel`')
    kept = args.out.with_suffix('.json')
    results = json.loads(kept.read_text()) if kept.is_file() else {}
    chosen = [row for row in ROWS if not args.rows or row.name in args.rows]
    with tempfile.TemporaryDirectory(dir=args.work, prefix='versions-') as work:
        copy_tests(Path(work) / 'tree')
        for row in chosen:
            found = run_row(row, args.checks, *wheel, *sdist, Path(work) / 'tree', Path(work) / 'environment')
            results[row.name] = results.get(row.name, {}) | found
            kept.write_text(json.dumps(results, indent=1))
            args.out.write_text(table(results))
            print(json.dumps({row.name: results[row.name]}, indent=1), flush=True)
    print(table(results))
    return int(any(text.startswith('FAILED') for row in chosen for text in results[row.name].values()))


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
