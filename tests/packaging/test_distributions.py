"""The contents of wheel and sdist, and an installation without a compiler."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def build(folder, *, hook, **environment):
    """Call the build backend as pip does, without an isolated environment."""
    program = f'import setuptools.build_meta as b, sys; print(b.{hook}(sys.argv[1]))'
    return subprocess.run(
        [sys.executable, '-c', program, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **environment},
    )


@pytest.fixture(scope='module')
def without_compiler(tmp_path_factory):
    folder = tmp_path_factory.mktemp('wheel')
    done = build(folder, hook='build_wheel', CXX='no-such-compiler', MSDA_BUILD_CUDA='0')
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout + done.stderr


def test_wheel_has_the_files_for_mim(without_compiler):
    folder, _ = without_compiler
    [wheel] = folder.glob('*.whl')
    assert wheel.name.startswith('msda_plugin-') and '-py3-none-' in wheel.name and 'any' not in wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        'model-index.yml',
        'tools/train.py',
        'tools/test.py',
        'configs/shapes/metafile.yml',
        'configs/shapes/deformable-detr-two-stage_shunted-nano_1xb4-8e_shapes.py',
    ):
        assert f'msda_plugin/.mim/{name}' in names
    assert not any(name.startswith(('tests/', 'csrc/', 'projects/')) for name in names)


def test_without_a_compiler_the_reference_backend_runs_with_a_warning(without_compiler, tmp_path):
    folder, log = without_compiler
    assert log.count('installed without compiled libraries') == 1 and 'no-such-compiler' in log
    [wheel] = folder.glob('*.whl')
    zipfile.ZipFile(wheel).extractall(tmp_path)
    assert not list(tmp_path.rglob('*.so'))
    program = """
import sys, warnings; sys.path.insert(0, sys.argv[1])
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    from msda_plugin import ops
    for _ in range(2):
        out = ops.ms_deform_attn(torch.rand(1, 4, 2, 8), [(2, 2)], None, torch.rand(1, 3, 2, 1, 4, 2),
                                 torch.rand(1, 3, 2, 1, 4))
assert ops.__file__.startswith(sys.argv[1]) and out.shape == (1, 3, 16)
assert ops.backend_for('cpu', torch.float32).name == 'reference'
print(sum('libmsda_cpu.so was not built' in str(warning.message) for warning in caught))
"""
    done = subprocess.run(
        [sys.executable, '-c', program, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        env={k: v for k, v in os.environ.items() if k != 'MSDA_BACKEND'},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == '1'


def test_wheel_has_the_models_for_custom_data(without_compiler, tmp_path):
    folder, _ = without_compiler
    [wheel] = folder.glob('*.whl')
    zipfile.ZipFile(wheel).extractall(tmp_path)
    program = """
import sys; sys.path.insert(0, sys.argv[1])
from msda_plugin.engine.model_zoo import config_folder, models
from msda_plugin.tools.custom_data.config import DEFAULT_MODEL
assert config_folder().is_relative_to(sys.argv[1]) and DEFAULT_MODEL in models()
"""
    done = subprocess.run(
        [sys.executable, '-c', program, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(Path('/usr/local/cuda/bin/nvcc').exists(), reason='nvcc in /usr/local/cuda cannot be hidden')
def test_required_cuda_library_fails_without_nvcc(tmp_path):
    done = build(
        tmp_path,
        hook='build_wheel',
        MSDA_BUILD_CUDA='1',
        CUDA_HOME='',
        CUDA_PATH='',
        NVCC='',
        PATH='/nowhere',
        CXX=sys.executable,
    )
    assert done.returncode != 0 and 'nvcc' in done.stderr


def test_invalid_msda_build_cuda(tmp_path):
    done = build(tmp_path, hook='build_wheel', MSDA_BUILD_CUDA='yes')
    assert done.returncode != 0 and "MSDA_BUILD_CUDA='yes'" in done.stdout + done.stderr


def test_sdist_becomes_a_compiled_package(tmp_path):
    done = build(tmp_path, hook='build_sdist')
    assert done.returncode == 0, done.stdout + done.stderr
    [sdist] = tmp_path.glob('*.tar.gz')
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter='data')
    for name in ('csrc/cuda/ms_deform_attn.cu', 'model-index.yml', 'LICENSE'):
        assert (tmp_path / sdist.name.removesuffix('.tar.gz') / name).is_file()

    site = tmp_path / 'site'
    pip = [sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--no-build-isolation', '--target', str(site)]
    done = subprocess.run(
        [*pip, str(sdist)], capture_output=True, text=True, timeout=600, env={**os.environ, 'MSDA_BUILD_CUDA': '0'}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    program = """
import sys; sys.path.insert(0, sys.argv[1])
import torch
from msda_plugin import ops
assert ops.__file__.startswith(sys.argv[1])
print(ops.backend_for('cpu', torch.float32).name)
"""
    done = subprocess.run(
        [sys.executable, '-c', program, str(site)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        env={k: v for k, v in os.environ.items() if not k.startswith('MSDA_')},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == 'cpu'
