"""``python -m msda_plugin env``, also with missing and broken packages."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from msda_plugin import mmcv_ops
from msda_plugin.ops import backend_for, use_backend
from msda_plugin.tools import env

ROOT = Path(__file__).parents[2]


@pytest.fixture
def broken(monkeypatch):
    """Makes the import of some packages raise."""

    def break_packages(**errors):
        real = env.import_module

        def import_module(name):
            if name in errors:
                raise errors[name]
            return real(name)

        monkeypatch.setattr(env, 'import_module', import_module)

    return break_packages


@pytest.fixture
def installed(monkeypatch):
    """Replaces the installed distributions by these versions."""

    def install(**versions):
        def version(name):
            try:
                return versions[name.replace('-', '_')]
            except KeyError:
                raise metadata.PackageNotFoundError(name) from None

        monkeypatch.setattr(env.metadata, 'version', version)

    return install


def test_json_and_page_agree(capsys):
    status = env.main(['--json'])
    report = json.loads(capsys.readouterr().out)
    assert status == (0 if report['healthy'] else 1)
    assert report['packages']['torch'] == dict(version=torch.__version__, error=None)
    assert report['stack']['kind'] in ('forks', 'upstream')
    assert env.main([]) == status
    page = capsys.readouterr().out
    for name, package in report['packages'].items():
        assert f'{name:<12} {package["version"]}' in page
    assert ('No problems found.' in page) == report['healthy']


def test_backends_are_those_that_run():
    report = env.collect()
    table = {(entry['device'], entry['dtype']): entry for entry in report['backends']}
    assert len(table) == 8
    for device, dtype in (('cpu', 'float32'), ('cpu', 'bfloat16'), ('cuda', 'float16')):
        backend = backend_for(device, getattr(torch, dtype))
        assert (table[device, dtype]['backend'], table[device, dtype]['reason']) == tuple(backend)


def test_chosen_backend_is_in_the_table():
    with use_backend('reference'):
        assert {entry['backend'] for entry in env.collect()['backends']} == {'reference'}
    with use_backend('cpu'):
        entries = [entry for entry in env.collect()['backends'] if entry['device'] == 'cuda']
    assert all(entry['backend'] is None and 'cannot run' in entry['reason'] for entry in entries)


def test_missing_and_broken_packages_are_reported(broken, installed, capsys):
    installed(onedl_mmdetection='3.5.1', pycocotools='2.0.10')
    broken(
        mmcv=ModuleNotFoundError("No module named 'mmcv'", name='mmcv'),
        mmdet=AssertionError('MMCV==2.3.6 is used but incompatible. Please install mmcv>=2.0.0rc4, <2.2.0.'),
        pycocotools=ImportError('numpy.dtype size changed'),
    )
    assert env.main([]) == 1
    page = capsys.readouterr().out
    assert 'PROBLEM: mmcv is not installed\n  fix: in a clone: pip install -r requ' in page
    assert 'PROBLEM: mmdet cannot be imported: AssertionError: MMCV==2.3.6 is used but incompatible' in page
    assert 'PROBLEM: pycocotools cannot be imported' in page and 'pip install --force-reinstall pycocotools' in page


def test_mmcv_without_its_compiled_operators_is_broken(broken):
    broken(**{'mmcv.ops': ModuleNotFoundError("No module named 'mmcv._ext'", name='mmcv._ext')})
    report = env.collect()
    assert 'mmcv._ext' in report['packages']['mmcv']['error'] and not report['healthy']
    assert report['problems'][0]['remedy'] == 'python -m msda_plugin mmcv-ops install'


def test_what_runs_for_mmcvs_operators(monkeypatch):
    rows = [('nms', 'cpu', 'PyTorch', ''), ('nms', 'cuda', 'torchvision', ''), ('knn', 'all', 'not available', '')]
    monkeypatch.setattr(mmcv_ops, 'find', lambda: mmcv_ops.Installation('substitute', Path('mmcv'), Path('_ext.py')))
    monkeypatch.setattr(mmcv_ops, 'status', lambda: [mmcv_ops.Row(*row) for row in rows])
    report = env.collect()
    assert report['mmcv_operators'] == {'PyTorch': ['nms'], 'torchvision': ['nms (cuda)'], 'not available': ['knn']}
    page = env.page(report)
    assert 'PyTorch: nms' in page and 'torchvision: nms (cuda)' in page and 'not available: 1 operators' in page
    monkeypatch.setattr(mmcv_ops, 'find', lambda: mmcv_ops.Installation('none', Path('mmcv'), None))
    assert env.collect()['mmcv_operators'] == {}


def test_without_torch_the_rest_is_reported(broken, installed):
    installed()
    broken(torch=ModuleNotFoundError("No module named 'torch'", name='torch'))
    report = env.collect()
    assert report['libraries'] == {} and report['backends'] == []
    assert 'torch is not installed' in [problem['what'] for problem in report['problems']]
    assert 'PROBLEM: torch is not installed' in env.page(report)


def test_an_old_torch_is_too_old():
    problems = env.Problems()
    assert env._check_torch(dict(version='2.9.1+cpu', error=None), problems)
    assert 'torch is 2.9.1+cpu, but torch >= 2.10 is needed' in problems[0]['what']
    problems.clear()
    assert env._check_torch(dict(version='2.13.0+cu130', error=None), problems) and not problems


def test_an_old_torch_is_the_only_problem(monkeypatch):
    monkeypatch.setattr(env, 'TORCH_MINIMUM', (99, 0))
    monkeypatch.setattr(env, '_try', lambda device: 'symbol lookup error')
    (problem,) = env.collect()['problems']
    assert problem['what'].startswith(f'torch is {torch.__version__}, but torch >=')
    assert problem['remedy'] == env.INSTALL_TORCH


def test_libraries_that_were_not_built(monkeypatch, tmp_path):
    """As after an installation without a compiler."""
    from msda_plugin.ops import backends

    monkeypatch.setattr(backends, 'LIBRARY_DIR', tmp_path)
    monkeypatch.setattr(backends, '_unsupported', {name: backends._load(name) for name in ('cpu', 'cuda')})
    (problem,) = env.collect()['problems']
    assert 'runs in plain PyTorch on the CPU: libmsda_cpu.so was not built' in problem['what']
    assert problem['remedy'].startswith('install a wheel of msda_plugin, or a C++20 compiler')


def test_two_stacks_at_once(installed):
    installed(mmcv='2.1.0', onedl_mmcv='2.3.6')
    problems = env.Problems()
    stack = env._stack({}, problems)
    assert stack['kind'] == 'mixed' and 'onedl-mmcv 2.3.6, mmcv 2.1.0' in problems[0]['what']
    assert 'uninstall' in problems[0]['remedy']


def test_mmcv_and_mmcv_lite_at_once(installed):
    installed(mmcv='2.1.0', mmcv_lite='2.1.0', mmdet='3.3.0')
    problems = env.Problems()
    assert env._stack({}, problems)['kind'] == 'upstream'
    assert [problem['what'] for problem in problems] == [
        'mmcv 2.1.0 and mmcv-lite 2.1.0 are installed and overwrite each other'
    ]
    assert problems[0]['remedy'].startswith('pip uninstall mmcv mmcv-lite; pip install --no-deps mmcv-lite==2.1.0; ')


@pytest.mark.parametrize(
    'name, error, remedy',
    [
        ('mmcv', None, 'pip install --force-reinstall --no-deps --no-cache-dir onedl-mmcv==2.3.6; then python -m'),
        (
            'mmcv',
            'ImportError: mmcv/_ext.cpython-311-x86_64-linux-gnu.so: undefined symbol: _ZNK3c10',
            'pip install --force-reinstall --no-deps --no-cache-dir onedl-mmcv==2.3.6; then python -m',
        ),
        ('mmcv', "ModuleNotFoundError: No module named 'mmcv.ops'", 'pip install --force-reinstall --no-deps'),
        ('mmcv', "ModuleNotFoundError: No module named 'addict'", 'in a clone: pip install -r requirements/forks.txt'),
        ('mmcv', "ModuleNotFoundError: No module named 'torch'", 'install torch >= 2.10'),
        ('mmdet', None, 'in a clone: pip install -r requirements/forks.txt'),
        ('scipy', None, 'pip install scipy'),
    ],
)
def test_half_installed_packages(installed, name, error, remedy):
    installed(onedl_mmcv='2.3.6', onedl_mmengine='0.10.12')
    problems = env.Problems()
    env._stack({name: dict(version=None, error=error)}, problems)
    assert problems[0]['remedy'].startswith(remedy)
    if error is None:
        expected = 'onedl-mmcv 2.3.6 is installed, but its files are missing' if name == 'mmcv' else 'is not installed'
        assert problems[0]['what'].endswith(expected)


def test_operators_for_a_folder_that_is_not_writable(broken, monkeypatch, tmp_path):
    broken(**{'mmcv.ops': ModuleNotFoundError("No module named 'mmcv._ext'", name='mmcv._ext')})
    monkeypatch.setattr(mmcv_ops, 'find', lambda: mmcv_ops.Installation('none', tmp_path, None))
    monkeypatch.setattr(env.os, 'access', lambda path, mode: path != tmp_path)
    (problem,) = env.collect()['problems']
    assert problem['remedy'] == (
        f'python -m msda_plugin mmcv-ops install, as the owner of the environment, since {tmp_path} is not writable; '
        'or use a virtual environment'
    )


def test_mmcv_lite_belongs_to_the_upstream_stack(installed):
    installed(mmengine='0.10.7', mmcv_lite='2.1.0', mmdet='3.3.0')
    stack = env._stack({}, env.Problems())
    assert stack == dict(kind='upstream', distributions=['mmengine 0.10.7', 'mmcv-lite 2.1.0', 'mmdet 3.3.0'])


# ---- GPU code -------------------------------------------------------------------------------------------------------
class LoadedLibraries:
    """Stands for `msda_plugin.ops.backends` with a usable CUDA library."""

    @staticmethod
    def library_path(name):
        return Path(f'/nowhere/libmsda_{name}13.so')

    @staticmethod
    def unsupported_reason(name):
        return ''

    @staticmethod
    def cuda_architectures():
        return ['sm_75', 'sm_90', 'compute_90']


def test_architectures_come_from_the_library():
    library = env._library(LoadedLibraries, 'cuda')
    assert (library['machine_code'], library['ptx']) == ([75, 90], [90])
    assert env._architectures(library) == 'sm_75, sm_90, compute_90 (PTX)'


class Driver:
    """Stands for libcuda.so.1 of a driver for CUDA 12.4."""

    def __init__(self, name):
        assert name == 'libcuda.so.1'

    @staticmethod
    def cuDriverGetVersion(version):
        version._obj.value = 12040
        return 0


def test_the_driver_is_for_the_cuda_version_of_the_library(monkeypatch):
    monkeypatch.setattr(env.ctypes, 'CDLL', Driver)
    library = env._library(LoadedLibraries, 'cuda')
    assert library['driver'] == '12.4'
    problems = env.Problems()
    env._check_driver(library, problems)
    assert 'runs CUDA 12.4 at most, but torch and libmsda_cuda13.so are for CUDA 13' in problems[0]['what']
    assert 'install torch for CUDA 12' in problems[0]['remedy']
    problems.clear()
    env._check_driver(dict(library, path='/nowhere/libmsda_cuda12.so'), problems)
    env._check_driver(dict(library, driver='13.1'), problems)
    env._check_driver(dict(library, driver=None), problems)
    env._check_driver(dict(library, usable=False), problems)
    assert not problems


def test_without_a_driver(monkeypatch):
    def missing(name):
        raise OSError(f'{name}: cannot open shared object file')

    monkeypatch.setattr(env.ctypes, 'CDLL', missing)
    assert env._driver() is None
    monkeypatch.setattr(env, '_driver', lambda: None)
    report = env.collect()
    assert 'driver       no NVIDIA driver' in env.page(report)
    report['libraries']['cuda']['driver'] = '12.4'
    assert 'driver       NVIDIA, CUDA 12.4 or older' in env.page(report)


@pytest.mark.parametrize(
    'capability, runs',
    [(75, True), (86, True), (89, True), (80, False), (87, True), (90, False), (100, False), (120, True), (121, True)],
)
def test_which_gpus_the_code_runs_on(capability, runs):
    assert env.has_code(capability, machine_code=[75, 86], ptx=[120]) is runs


def report_with_gpu(has_code, usable):
    library = dict(
        path='lib.so',
        usable=usable,
        reason=None if usable else 'libmsda_cuda.so was not built',
        machine_code=[75],
        ptx=[],
    )
    return dict(
        libraries=dict(cuda=library),
        environment={},
        gpus=[dict(name='Tesla', arch='sm_60', memory_gib=16.0, has_code=has_code)],
    )


def test_a_gpu_that_the_library_has_no_code_for():
    problems = env.Problems()
    env._check_gpu(report_with_gpu(has_code=False, usable=True), problems)
    assert 'no code for Tesla (sm_60); it has sm_75' in problems[0]['what']
    assert problems[0]['remedy'].startswith('MSDA_CUDA_ARCHS=60 MSDA_BUILD_CUDA=1 pip install')


def test_a_gpu_without_the_library():
    problems = env.Problems()
    env._check_gpu(report_with_gpu(has_code=False, usable=False), problems)
    assert 'plain PyTorch on it: libmsda_cuda.so was not built' in problems[0]['what']


def test_an_operator_that_fails_or_errs(monkeypatch):
    from msda_plugin import ops

    assert env._try('cpu') is None
    monkeypatch.setattr(ops, 'ms_deform_attn', lambda *args: ops.ms_deform_attn_reference(*args) + 1)
    assert 'differs from the reference' in env._try('cpu')

    def fail(*args):
        raise RuntimeError('no kernel image is available')

    monkeypatch.setattr(ops, 'ms_deform_attn', fail)
    assert 'no kernel image' in env._try('cpu')


def test_as_a_process_with_a_broken_mmcv_and_a_wrong_choice(tmp_path):
    (tmp_path / 'mmcv.py').write_text("raise ImportError('libcudart.so.12: cannot open shared object file')\n")
    done = subprocess.run(
        [sys.executable, '-m', 'msda_plugin', 'env'],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, 'PYTHONPATH': str(tmp_path), 'MSDA_BACKEND': 'gpu'},
    )
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert 'mmcv cannot be imported: ImportError: libcudart.so.12' in done.stdout
    assert "msda_plugin.ops cannot be imported: ValueError: MSDA_BACKEND is 'gpu'" in done.stdout


def test_commands_without_torch(tmp_path):
    (tmp_path / 'torch.py').write_text('raise ModuleNotFoundError("No module named \'torch\'", name="torch")\n')
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join((str(tmp_path), str(ROOT)))}

    def run(*command):
        command = [sys.executable, '-m', 'msda_plugin', *command]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path)
        assert 'Traceback' not in done.stderr
        return done.returncode, done.stdout + done.stderr

    code, page = run('env')
    problem = (
        f'PROBLEM: torch {torch.__version__} is installed, but its files are missing\n  fix: install torch >= 2.10'
    )
    assert code == 1 and problem in page
    sentence = 'msda_plugin train: No module named \'torch\'; "python -m msda_plugin env" says how to fix it\n'
    assert run('train', '--data', 'folder') == (2, sentence)
    code, said = run('mmcv-ops', 'status')
    assert code == 1 and 'not available: ' in said and "No module named 'torch'" in said
