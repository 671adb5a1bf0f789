"""Tests the package in fresh environments, one for each row of versions.

    python tests/packaging/version_matrix.py [--rows NAME …] [--out table.md] [--wheel FILE] [--work DIR]
    python tests/packaging/version_matrix.py --list

One wheel is built in the environment that runs this script, and installed in every row. For each row, a virtual
environment is created, gets the stack of `requirements/`, runs ``python -m msda_plugin env`` and tests from a folder
without the package's sources, and is deleted. A row takes 2 to 4 minutes on two cores if pip has mmcv in its cache, and
10 more if mmcv is compiled. The results are kept next to the table, so that rows can be run one by one.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    'msda_plugin',
    'csrc',
    'configs',
    'projects',
    'tests',
    'requirements',
    'setup.py',
    'pyproject.toml',
    'MANIFEST.in',
    'README.md',
    'CHANGELOG.md',
    'LICENSE',
    'model-index.yml',
)
TORCH = '2.13.0'
OTHER_TORCH = '2.14.1'
OLD_TORCH = '2.10.0'
OPERATOR = [
    'tests/ops/test_operator.py',
    'tests/ops/test_operator_checks.py',
    'tests/ops/test_operator_torch.py',
    'tests/ops/test_operator_backends.py',
]
LAYERS = ['tests/layers', 'tests/test_registry.py', 'tests/test_compat.py']
TRAINING = ['tests/test_end_to_end.py']
PACKAGES = (
    'torch',
    'onedl-mmengine',
    'mmengine',
    'onedl-mmcv',
    'mmcv',
    'onedl-mmdetection',
    'mmdet',
    'numpy',
    'setuptools',
)


@dataclass(frozen=True)
class Row:
    """One environment.

    Attributes:
        name: Name of the row for ``--rows``.
        python: Version of the interpreter.
        stack: OpenMMLab packages, 'forks' or 'upstream', or None.
        torch: Version of torch, or None to test without torch.
        setuptools: Allowed versions of setuptools.
        numpy: Allowed versions of numpy.
        compiles: Whether mmcv must be compiled, because pip's cache has it for another torch.
    """

    name: str
    python: str = '3.11'
    stack: str | None = None
    torch: str | None = TORCH
    setuptools: str = '>=77,<82'
    numpy: str = ''
    compiles: bool = False


ROWS = (
    Row('forks', stack='forks'),
    Row('upstream', stack='upstream'),
    Row('forks-setuptools-80', stack='forks', setuptools='==80.*'),  # the oldest that onedl-mim supports
    Row('upstream-setuptools-77', stack='upstream', setuptools='==77.*'),
    Row('forks-no-pkg_resources', stack='forks', setuptools='>=82'),
    Row('upstream-no-pkg_resources', stack='upstream', setuptools='>=82'),
    Row('forks-numpy-1', stack='forks', numpy='==1.26.*'),
    Row('forks-torch-2.14', stack='forks', torch=OTHER_TORCH, compiles=True),
    Row('operator-torch-2.10', torch=OLD_TORCH),
    *(Row(f'package-python-{version}', python=version, torch=None) for version in ('3.10', '3.12', '3.13')),
    *(Row(f'operator-python-{version}', python=version, torch=OTHER_TORCH) for version in ('3.10', '3.12', '3.13')),
)


class StepError(Exception):
    """A command of a row failed. The message is the end of its output."""


class Environment:
    """A fresh virtual environment, with the tests but without the package's sources."""

    def __init__(self, row: Row, folder: Path, tree: Path) -> None:
        self.row, self.folder, self.tree = row, folder, tree
        self.python = folder / 'bin' / 'python'
        self.run(str(interpreter(row.python)), '-m', 'venv', str(folder))

    def run(self, *command: str, timeout: float = 7200, **environment: str) -> str:
        # mim starts the `python` of its own environment by name.
        path = os.pathsep.join([str(self.folder / 'bin'), os.environ['PATH']])
        kept = {key: value for key, value in os.environ.items() if key not in ('PYTHONPATH', 'MSDA_LIBRARY_DIR')}
        done = subprocess.run(
            command,
            cwd=self.tree,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**kept, 'PATH': path, 'PYTHONDONTWRITEBYTECODE': '1', **environment},
        )
        if done.returncode:
            raise StepError((done.stdout + done.stderr)[-3000:])
        return done.stdout

    def pip(self, *arguments: str) -> None:
        self.run(str(self.python), '-m', 'pip', 'install', '-q', '--disable-pip-version-check', *arguments)

    def install(self, wheel: Path) -> None:
        """Install the packages of `make setup` in the same order, constrained to the versions of the row."""
        row = self.row
        constraints = self.folder / 'constraints.txt'
        constraints.write_text(
            ''.join(
                f'{name}{versions}\n'
                for name, versions in (
                    ('setuptools', row.setuptools),
                    ('numpy', row.numpy),
                    ('torch', f'=={row.torch}' if row.torch else ''),
                )
            )
        )
        held = ['-c', str(constraints)]
        if row.torch:
            self.pip(f'torch=={row.torch}')
        self.pip(f'setuptools{row.setuptools}', 'wheel', 'ninja', 'psutil')
        if row.stack:
            if row.compiles:
                names = (ROOT / f'requirements/{row.stack}.txt').read_text().splitlines()
                [mmcv] = [name for name in names if 'mmcv' in name]
                self.pip('--no-build-isolation', '--no-cache-dir', '--no-binary', mmcv.partition('==')[0], *held, mmcv)
            self.pip('--no-build-isolation', *held, '-r', str(ROOT / f'requirements/{row.stack}.txt'))
            extra = ROOT / f'requirements/no-deps-{row.stack}.txt'
            if extra.is_file():
                self.pip('--no-build-isolation', '--no-deps', '-r', str(extra))
        if row.torch:
            self.pip(*held, str(wheel), 'pytest', 'hypothesis', 'tensorboard')
        else:
            self.pip(*held, '--no-deps', str(wheel))
            self.pip('--only-binary', ':all:', 'numpy', 'opencv-python-headless')

    def versions(self) -> dict[str, str]:
        code = (
            'import importlib.util, json, platform; from importlib import metadata\n'
            f'found = dict(python=platform.python_version())\nfor name in {PACKAGES!r}:\n'
            '    try: found[name] = metadata.version(name)\n'
            '    except metadata.PackageNotFoundError: pass\n'
            "found['pkg_resources'] = 'yes' if importlib.util.find_spec('pkg_resources') else 'no'\n"
            'print(json.dumps(found))'
        )
        return json.loads(self.run(str(self.python), '-c', code))

    def pytest(self, *arguments: str) -> str:
        """Test the installed package. Returns the last line of pytest's report."""
        # Without the project's -q: a second one would hide the counts.
        output = self.run(
            str(self.folder / 'bin' / 'pytest'),
            '-o',
            'addopts=--import-mode=importlib',
            '-q',
            '-p',
            'no:cacheprovider',
            *arguments,
        )
        return output.strip().splitlines()[-1].strip('= ')


def check_env(env: Environment) -> str:
    """Run ``python -m msda_plugin env``. Without torch, it must report the problem."""
    command = [str(env.python), '-m', 'msda_plugin', 'env', '--json']
    if env.row.torch is None:
        done = subprocess.run(command, cwd=env.tree, capture_output=True, text=True, timeout=600)
        problems = json.loads(done.stdout)['problems']
        if done.returncode != 1 or not any('torch' in problem['what'] for problem in problems):
            raise StepError(done.stdout + done.stderr)
        return 'says what is missing'
    if env.row.stack is None:  # the OpenMMLab packages are missing
        done = subprocess.run(command, cwd=env.tree, capture_output=True, text=True, timeout=600)
        report = json.loads(done.stdout)
    else:
        report = json.loads(env.run(*command))
    backends = {backend['dtype']: backend['backend'] for backend in report['backends'] if backend['device'] == 'cpu'}
    if set(backends.values()) != {'cpu'}:
        raise StepError(f'the backends are {backends}')
    return 'backend cpu'


def check_pure(env: Environment) -> str:
    """Compile every file without warnings, and run the commands that do not need torch."""
    package = env.run(str(env.python), '-c', 'import msda_plugin; print(*msda_plugin.__path__)').strip()
    env.run(
        str(env.python),
        '-W',
        'error',
        '-m',
        'compileall',
        '-q',
        '-f',
        package,
        'configs',
        'tests',
        PYTHONDONTWRITEBYTECODE='',
    )
    env.run(str(env.python), '-m', 'msda_plugin', '--help')
    out = env.folder / 'shapes'
    env.run(str(env.python), '-m', 'msda_plugin', 'shapes', '--out', str(out), '--train', '20', '--val', '5')
    boxes = len(json.loads((out / 'annotations/train.json').read_text())['annotations'])
    return f'compiles; draws the data, {boxes} boxes'


def run_row(row: Row, wheel: Path, tree: Path, work: Path) -> dict[str, str]:
    """Test a row. Returns its versions, and for each check the result or 'FAILED: …'."""
    result, started = {}, time.monotonic()
    checks = [('env', check_env)]
    if row.torch is None:
        checks.append(('tests', check_pure))
    elif row.stack is None:
        checks.append(('tests', lambda env: env.pytest('-m', 'not slow', *OPERATOR)))
    else:
        checks += [
            ('tests', lambda env: env.pytest('-m', 'not slow', *OPERATOR, *LAYERS)),
            ('training', lambda env: env.pytest(*TRAINING)),
        ]
    folder = work / row.name
    try:
        env = Environment(row, folder, tree)
        env.install(wheel)
        result |= env.versions()
        for name, check in checks:
            try:
                result[name] = check(env)
            except (StepError, subprocess.TimeoutExpired, ValueError, KeyError) as error:
                result[name] = f'FAILED: {error}'
    except (StepError, subprocess.TimeoutExpired, FileNotFoundError) as error:
        result['install'] = f'FAILED: {error}'
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result['minutes'] = f'{(time.monotonic() - started) / 60:.1f}'
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


def prepare(work: Path, wheel: Path | None) -> tuple[Path, Path]:
    """Build the wheel unless one is given, and copy the tests and configs to a folder. Returns both paths."""
    source, tree = work / 'source', work / 'tree'
    for folder in (source, tree):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    ignore = shutil.ignore_patterns('__pycache__', '*.so', 'lib')
    for name in SOURCES:
        for target in [source] if name in ('msda_plugin', 'setup.py') else [source, tree]:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, target / name, ignore=ignore)
            else:
                shutil.copy2(ROOT / name, target / name)
    if wheel is not None:
        return wheel.resolve(), tree
    subprocess.run(
        [
            sys.executable,
            '-m',
            'pip',
            'wheel',
            '-q',
            '--no-deps',
            '--no-build-isolation',
            '--no-cache-dir',
            '-w',
            str(work),
            str(source),
        ],
        check=True,
        env={**os.environ, 'MSDA_BUILD_CUDA': '0'},
    )
    return next(work.glob('msda_plugin-*.whl')), tree


def cell(text: str | None) -> str:
    if not text:
        return ''
    return 'failed' if text.startswith('FAILED') else text.partition(' in ')[0]


def table(results: dict[str, dict[str, str]]) -> str:
    """Format the results as a Markdown table."""
    lines = [
        '| row | Python | torch | mmengine, mmcv, mmdet | setuptools | numpy | `env` | tests | training |',
        '|---|---|---|---|---|---|---|---|---|',
    ]
    for row in ROWS:
        result = results.get(row.name)
        if result is None:
            continue
        stack = [
            result.get(f'onedl-{name}') or result.get(short)
            for name, short in (('mmengine', 'mmengine'), ('mmcv', 'mmcv'), ('mmdetection', 'mmdet'))
        ]
        setuptools = result.get('setuptools', '')
        if setuptools and result['pkg_resources'] == 'no':
            setuptools += ', no pkg_resources'
        checks = [
            cell(result.get('install') or result.get('env')),
            cell(result.get('tests')),
            cell(result.get('training')),
        ]
        lines.append(
            '| '
            + ' | '.join(
                [
                    row.name,
                    result.get('python', row.python),
                    result.get('torch', ''),
                    ', '.join(filter(None, stack)),
                    setuptools,
                    result.get('numpy', ''),
                    *checks,
                ]
            )
            + ' |'
        )
    return '\n'.join(lines) + '\n'


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--rows',
        nargs='+',
        choices=[row.name for row in ROWS],
        metavar='NAME',
        help='rows to run (default: all; those with another torch download gigabytes)',
    )
    parser.add_argument('--out', type=Path, default=Path('version_matrix.md'), help='default: %(default)s')
    parser.add_argument('--wheel', type=Path, help='a wheel that was built before, with the library')
    parser.add_argument('--work', type=Path, help='folder for the environments (default: a temporary one)')
    parser.add_argument('--list', action='store_true', help='list the rows and stop')
    args = parser.parse_args(argv)
    if args.list:
        print(*ROWS, sep='\n')
        return 0
    kept = args.out.with_suffix('.json')
    results = json.loads(kept.read_text()) if kept.is_file() else {}
    chosen = [row for row in ROWS if not args.rows or row.name in args.rows]
    with tempfile.TemporaryDirectory(dir=args.work, prefix='versions-') as work:
        wheel, tree = prepare(Path(work), args.wheel)
        for row in chosen:
            results[row.name] = run_row(row, wheel, tree, Path(work))
            kept.write_text(json.dumps(results, indent=1))
            args.out.write_text(table(results))
            print(json.dumps({row.name: results[row.name]}, indent=1), flush=True)
    print(table(results))
    return int(any('FAILED' in text for row in chosen for text in results[row.name].values()))


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
