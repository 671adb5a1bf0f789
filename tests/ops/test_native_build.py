"""The build of the compiled libraries, also with sanitizers, and the symbols they need."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARIES = sorted((ROOT / 'msda_plugin' / 'ops' / 'lib').glob('libmsda_c*.so'))  # cpu, cuda


@pytest.fixture(scope='module')
def build():
    spec = importlib.util.spec_from_file_location('csrc_build', ROOT / 'csrc' / 'build.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def undefined_symbols(library):
    done = subprocess.run(['nm', '-D', '--undefined-only', library], capture_output=True, text=True, check=True)
    return {line.split()[-1].split('@')[0] for line in done.stdout.splitlines()}


def check_stable_abi(library):
    """From torch, only the C functions of its stable ABI are used."""
    symbols = undefined_symbols(library)
    assert any(name.startswith(('aoti_torch_', 'torch_')) for name in symbols)
    mangled = {name for name in symbols if re.match(r'_ZNK?\d*(N?\d*)?(2at|3c10|5torch)', name)}
    assert not mangled
    others = {name for name in symbols if re.match(r'(aoti|torch|c10|at_|cu)', name)} - {
        name for name in symbols if name.startswith(('aoti_torch_', 'torch_'))
    }
    assert not others


@pytest.mark.skipif(not LIBRARIES, reason='no library is built')
@pytest.mark.skipif(shutil.which('nm') is None, reason='there is no nm')
@pytest.mark.parametrize('library', LIBRARIES, ids=lambda path: path.name)
def test_only_the_stable_abi_is_used(library):
    check_stable_abi(library)


def ptxas_report(log):
    """Return (kernel, (bytes of stack, of spill stores, of spill loads)) for each kernel."""
    found = re.findall(
        r"entry function '\w*?([a-z]+)_kernel\w*' for .*\n.*\n\s+(\d+) bytes stack frame, "
        r'(\d+) bytes spill stores, (\d+) bytes spill loads',
        log,
    )
    return [(name, tuple(map(int, sizes))) for name, *sizes in found]


def test_no_code_of_a_larger_instruction_set_is_shared():
    """The CPU kernels' headers include nothing that the linker could share among instruction sets."""
    names = ('cpu/kernels.h', 'cpu/layout.h', 'cpu/memory.h', 'cpu/simd.h', 'cpu/tile.h', 'ms_deform_attn.h')
    kernels = [(ROOT / 'csrc' / name).read_text() for name in names]
    included = {name for text in kernels for name in re.findall(r'#include <(\w+)>', text)}
    assert included <= {'cstddef', 'cstdint', 'cstdlib', 'cstring', 'new', 'type_traits'}


def test_errors_name_the_remedy(build, monkeypatch, tmp_path):
    monkeypatch.setenv('CXX', 'no-such-compiler')
    with pytest.raises(build.CompilerNotFound, match='no-such-compiler.*unset it'):
        build.build(tmp_path, 'off')
    monkeypatch.delenv('CXX')
    monkeypatch.setattr(build.shutil, 'which', lambda name: None)
    with pytest.raises(build.CompilerNotFound, match='install g'):
        build.build(tmp_path, 'off')
    (tmp_path / 'torch').mkdir()
    (tmp_path / 'torch' / 'version.py').write_text("__version__ = '2.9.1'\n")
    monkeypatch.setattr(build.sysconfig, 'get_path', lambda key: str(tmp_path))
    with pytest.raises(build.TorchNotFound, match='torch 2.9.1 .* torch >= 2.10 is needed'):
        build.build(tmp_path, 'off')
    with pytest.raises(ValueError, match="cuda is 'yes'"):
        build.build(tmp_path, 'yes')


def test_torch_is_found_without_importing_it():
    code = (
        'import sys; sys.path.insert(0, sys.argv[1]); import build; build.find_torch(); '
        'assert "torch" not in sys.modules'
    )
    assert subprocess.run([sys.executable, '-c', code, str(ROOT / 'csrc')]).returncode == 0


@pytest.mark.parametrize('cuda, torch_has_cuda, built', [('auto', False, 0), ('auto', True, 1), ('on', False, 1)])
def test_cuda_library_is_built_for_a_torch_with_cuda_or_on_request(
    build, monkeypatch, tmp_path, cuda, torch_has_cuda, built
):
    (tmp_path / 'lib').mkdir()
    if torch_has_cuda:
        (tmp_path / 'lib' / 'libtorch_cuda.so').touch()
    compilers = []

    class Builder:
        def __init__(self, work, torch_dir, compiler, nvccs, *options):
            compilers.extend(nvccs)

        def run(self):
            return []

    monkeypatch.setattr(build, '_Builder', Builder)
    monkeypatch.setattr(build, 'find_torch', lambda: tmp_path)
    monkeypatch.setattr(build, 'find_compiler', lambda: 'g++')
    monkeypatch.setattr(build, 'find_nvcc', lambda: 'nvcc')
    build.build(tmp_path / 'out', cuda)
    assert compilers == ['nvcc'] * built


def test_nvcc_is_found(build, monkeypatch, tmp_path):
    for name in ('NVCC', 'CUDA_HOME', 'CUDA_PATH'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build.shutil, 'which', lambda name: name if 'nvcc' in name and Path(name).exists() else None)
    home, other = tmp_path / 'home' / 'bin' / 'nvcc', tmp_path / 'nvcc-13'
    for path in (home, other):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setenv('CUDA_HOME', str(tmp_path / 'home'))
    assert build.find_nvcc() == str(home)
    monkeypatch.setenv('NVCC', str(other))
    assert build.find_nvcc() == str(other)


def test_one_cuda_library_for_each_nvcc(build, monkeypatch, tmp_path):
    """NVCC names several: each compiles for its own architectures, and its major version names the library."""
    names, commands = [], []
    for major, archs in (12, (75, 90)), (13, (90, 120)):
        path = tmp_path / f'nvcc-{major}'
        listed = '; '.join(f'echo compute_{arch}' for arch in archs)
        path.write_text(f'#!/bin/sh\ncase $1 in --version) echo release {major}.1, V{major}.1.2;; *) {listed};; esac\n')
        path.chmod(0o755)
        names.append(str(path))
    monkeypatch.setenv('NVCC', os.pathsep.join(names))
    monkeypatch.delenv('MSDA_CUDA_ARCHS', raising=False)
    execute = build._Builder.execute

    def record(self, command):
        commands.append(command)
        if '-o' in command:
            Path(command[command.index('-o') + 1]).touch()
            return ''
        return execute(self, command)

    monkeypatch.setattr(build._Builder, 'execute', record)
    paths = build.build(tmp_path / 'out', 'on')
    source = str(ROOT / 'csrc/cuda/ms_deform_attn.cu')
    assert [path.name for path in paths] == [
        'libmsda_cpu.so',
        'libmsda_onnxruntime.so',
        'libmsda_cuda12.so',
        'libmsda_cuda13.so',
    ]
    for name, codes in zip(names, (('sm_75', 'sm_90', 'compute_90'), ('sm_90', 'sm_120', 'compute_120')), strict=True):
        [kernels] = [command for command in commands if command[0] == name and source in command]
        assert [part.rpartition('=')[2] for part in kernels if part.startswith('-gencode')] == list(codes)
    outputs = [command[command.index('-o') + 1] for command in commands if '-c' in command]
    assert len(outputs) == len(set(outputs))

    monkeypatch.setenv('NVCC', os.pathsep.join([names[0], 'no-such-nvcc']))
    with pytest.raises(build.CompilerNotFound, match='no nvcc was found'):
        build.build(tmp_path / 'out', 'on')


@pytest.mark.slow
def test_cuda_library_builds(build, monkeypatch, tmp_path, capfd):
    if build.find_nvcc() is None:
        pytest.skip('there is no nvcc')
    monkeypatch.setenv('MSDA_CUDA_ARCHS', '90')
    version = subprocess.run([build.find_nvcc(), '--version'], capture_output=True, text=True).stdout
    [major] = re.findall(r'release (\d+)', version)
    names = ['libmsda_cpu.so', 'libmsda_onnxruntime.so', f'libmsda_cuda{major}.so']
    paths = build.build(tmp_path, 'on', verbose=True)
    kernels = ptxas_report(capfd.readouterr().out)
    assert len(kernels) > 40 and {'forward', 'backward', 'gather', 'scatter'} <= {name for name, _ in kernels}
    assert not [kernel for kernel in kernels if kernel[1] != (0, 0, 0)]
    assert [path.name for path in paths] == names
    check_stable_abi(paths[2])
    assert b'sm_90+compute_90\0' in paths[2].read_bytes()  # read by msda_plugin.ops.backends.cuda_architectures
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


@pytest.mark.slow
def test_kernels_under_sanitizers(build, tmp_path, long_run):
    """Run the optimized library with sizes that do not fill whole vectors."""
    if not long_run:
        pytest.skip('takes 3 minutes: run with --long. Short form: tests/reliability/test_native_sanitizers.py')
    where = [*build.find_compiler(), '-print-file-name=libasan.so']
    runtime = subprocess.run(where, capture_output=True, text=True).stdout.strip()
    if not Path(runtime).exists():
        pytest.skip('the compiler has no libasan.so')
    library, _ = build.build(tmp_path, 'off', sanitize='address,undefined')
    script = ROOT / 'tests' / 'ops' / 'exercise_kernels.py'
    environment = {
        **os.environ,
        'LD_PRELOAD': runtime,
        'ASAN_OPTIONS': 'detect_leaks=0',
        'PYTHONPATH': str(ROOT),
        'MSDA_LIBRARY_DIR': str(library.parent),
    }
    for isa in ('avx512', 'avx2', 'portable'):
        done = subprocess.run(
            [sys.executable, str(script)], capture_output=True, text=True, env={**environment, 'MSDA_CPU_ISA': isa}
        )
        assert done.returncode == 0, done.stdout + done.stderr
