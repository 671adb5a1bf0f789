"""The contents of wheel and sdist, an installation without a compiler, and the toolkits that `make wheel` uses."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
slow = pytest.mark.slow


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


@slow
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
        'configs/shapes/rtdetr_r18vd-nano_1xb4-7e_shapes.py',
    ):
        assert f'msda_plugin/.mim/{name}' in names
    assert not any(name.startswith(('tests/', 'csrc/', 'projects/')) for name in names)


@slow
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


@slow
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


@slow
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


@slow
@pytest.mark.skipif(shutil.which('nvcc') is None, reason='there is no nvcc')
def test_wheel_has_a_cuda_library_for_each_nvcc_and_none_of_torch(tmp_path):
    """The second nvcc only claims to be of CUDA 12, as in the toolkit of csrc/toolkits.py."""
    other = tmp_path / 'nvcc'
    other.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec echo release 12.9\nexec {shutil.which("nvcc")} "$@"\n')
    other.chmod(0o755)
    nvccs = os.pathsep.join([str(other), shutil.which('nvcc')])
    done = build(tmp_path, hook='build_wheel', MSDA_BUILD_CUDA='1', MSDA_CUDA_ARCHS='90', NVCC=nvccs)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = tmp_path.glob('*.whl')
    assert re.fullmatch(r'msda_plugin-[0-9.]+-py3-none-linux_\w+\.whl', wheel.name)
    archive = zipfile.ZipFile(wheel)
    libraries = sorted(Path(name).name for name in archive.namelist() if '.so' in name)
    names = r'libmsda_cpu.so libmsda_cuda12.so libmsda_cuda1[3-9].so libmsda_onnxruntime.so'
    assert re.fullmatch(names, ' '.join(libraries))
    [tag] = [name for name in archive.namelist() if name.endswith('.dist-info/WHEEL')]
    assert b'Root-Is-Purelib: false' in archive.read(tag) and b'Tag: py3-none-linux_' in archive.read(tag)
    [metadata] = [name for name in archive.namelist() if name.endswith('.dist-info/METADATA')]
    for extra, package in (
        ('forks', 'onedl-mmcv'),
        ('upstream', 'mmcv-lite'),
        ('export', 'onnxruntime'),
        ('test', 'pytest'),
    ):
        assert re.search(f'Requires-Dist: {package}.*; extra == "{extra}"', archive.read(metadata).decode())


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\n{text}\n')


@pytest.fixture
def toolkits(tmp_path):
    """The toolkits of packages whose programs only print how they were called."""
    packages = tmp_path / 'nvidia'
    script(packages / 'cu13/bin/nvcc', 'echo nvcc 13 "$@"')
    script(packages / 'cu13/bin/ptxas', 'echo ptxas 13 "$@"')
    script(packages / 'cu13/nvvm/bin/cicc', 'echo cicc 13')
    script(packages / 'cu13/include/crt/host_runtime.h', 'of 13')
    script(packages / 'cu13/lib/libcudart_static.a', 'of 13')
    script(packages / 'cuda_nvcc/bin/ptxas', 'echo ptxas 12 "$@"')
    script(packages / 'cuda_nvcc/include/crt/host_runtime.h', 'of 12')
    script(packages / 'cuda_runtime/include/cuda_runtime.h', 'of 12')
    script(packages / 'cuda_runtime/lib/libcudart_static.a', 'of 12')
    script(packages / 'cuda_cccl/include/cub.h', 'of 12')
    spec = importlib.util.spec_from_file_location('csrc_toolkits', ROOT / 'csrc' / 'toolkits.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    nvccs = module.assemble(packages, tmp_path / 'out')
    assert nvccs == module.assemble(packages, tmp_path / 'out')  # a second time as well
    return nvccs


def printed(*command):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout.strip()


def test_toolkit_of_cuda_12_is_nvcc_13_with_the_assembler_and_runtime_of_12(toolkits, tmp_path):
    nvcc12, nvcc13 = toolkits
    assert 'release 12.9' in printed(nvcc12, '--version')
    assert printed(nvcc12, '-c', 'a b.cu') == 'nvcc 13 --compress-mode=speed -c a b.cu'
    assert printed(nvcc13, '-c', 'a b.cu') == 'nvcc 13 -c a b.cu'
    ptx = tmp_path / 'a b.ptx'
    for nvcc, major, version in (nvcc13, '13', '9.0'), (nvcc12, '12', '8.8'):
        ptx.write_text('//\n.version 9.0\n.target sm_90\n')
        assert printed(nvcc.parent / 'ptxas', '-arch=sm_90', ptx, '-o', 'x') == f'ptxas {major} -arch=sm_90 {ptx} -o x'
        assert ptx.read_text() == f'//\n.version {version}\n.target sm_90\n'
        root = nvcc.parent.parent
        assert f'of {major}' in (root / 'lib64/libcudart_static.a').read_text()
        assert 'of 13' in (root / 'include/crt/host_runtime.h').read_text()
        assert printed(root / 'nvvm/bin/cicc') == 'cicc 13'


@slow
def test_invalid_msda_build_cuda(tmp_path):
    done = build(tmp_path, hook='build_wheel', MSDA_BUILD_CUDA='yes')
    assert done.returncode != 0 and "MSDA_BUILD_CUDA='yes'" in done.stdout + done.stderr


@slow
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
import ctypes, msda_plugin
ctypes.CDLL(msda_plugin.onnxruntime_library()).RegisterCustomOps
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
