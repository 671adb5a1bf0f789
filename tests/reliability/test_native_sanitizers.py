"""The checks and kernels of the CPU operator under sanitizers, with random arguments.

`fuzz_kernels.cpp` is the target. CI compiles one instruction set and runs seeded cases. With ``--long``, all of them
are compiled, and libFuzzer searches if it is installed: `pip install atheris`, or set ``MSDA_LIBFUZZER`` to the path of
libclang_rt.fuzzer_no_main.a. GCC instruments the program for it (-fsanitize-coverage).
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SANITIZE = ['-fsanitize=address,undefined', '-fno-sanitize-recover=all', '-g1']
COVERAGE = ['-fsanitize-coverage=trace-pc,trace-cmp']
ENVIRONMENT = {**os.environ, 'ASAN_OPTIONS': 'detect_leaks=0', 'OMP_NUM_THREADS': '1'}
TORCH = Path(torch.__file__).parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which('g++') is None, reason='g++ is needed for its sanitizers'),
]


@pytest.fixture(scope='module')
def native():
    spec = importlib.util.spec_from_file_location('csrc_build', ROOT / 'csrc' / 'build.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_target(native, folder, isa, *, optimize='-O0', define='MSDA_SEEDED', flags=(), libraries=()):
    """Compile the program for one instruction set, with few optimizations to save time."""
    common = [flag for flag in native.COMMON_FLAGS if flag != '-O3']
    driver = [
        '-O0',
        f'-D{define}',
        f'-DMSDA_FUZZ_ISA={isa}',
        f'-DMSDA_FUZZ_{isa}',
        *native.STABLE_ABI_FLAGS,
        '-isystem',
        str(TORCH / 'include'),
    ]
    objects = []
    for source, options in (
        (ROOT / 'tests' / 'reliability' / 'fuzz_kernels.cpp', driver),
        (ROOT / 'csrc' / 'cpu' / 'ms_deform_attn.cpp', ['-O0']),
        (ROOT / 'csrc' / 'cpu' / f'ms_deform_attn_{isa}.cpp', [optimize, *native.KERNEL_FLAGS, *native.ISA_FLAGS[isa]]),
    ):
        objects.append(folder / f'{source.stem}.o')
        call('g++', *common, *SANITIZE, *flags, *options, '-c', source, '-o', objects[-1])
    program = folder / f'fuzz_{isa}'
    call(
        'g++',
        *SANITIZE[:2],
        *objects,
        *libraries,
        f'-L{TORCH / "lib"}',
        f'-Wl,-rpath,{TORCH / "lib"}',
        '-Wl,--no-as-needed',
        '-ltorch_cpu',
        '-o',
        program,
    )
    return program


def call(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=ENVIRONMENT, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def has(isa):
    flags = Path('/proc/cpuinfo').read_text() if Path('/proc/cpuinfo').is_file() else ''
    return isa == 'portable' or {'avx2': ' avx2', 'avx512': ' avx512dq'}[isa] in flags


@pytest.mark.parametrize('isa', ['portable', 'avx2', 'avx512'])
def test_drawn_arguments(isa, native, tmp_path, long_run):
    if isa != 'portable' and not long_run:
        pytest.skip('takes a minute to compile: run with --long')
    if not has(isa):
        pytest.skip(f'this machine has no {isa}')
    program = compile_target(native, tmp_path, isa, optimize='-O1' if long_run else '-O0')
    said = call(program, 20_000 if long_run else 1000, 0)
    number, refused = map(int, re.search(rf'{isa}: (\d+) cases, (\d+) of them refused by a check', said).groups())
    assert 0.2 * number < refused < 0.9 * number, said  # both outcomes need enough cases
    print(said.strip())


def libfuzzer():
    if os.environ.get('MSDA_LIBFUZZER'):
        return Path(os.environ['MSDA_LIBFUZZER'])
    spec = importlib.util.find_spec('atheris')
    path = Path(spec.origin).parents[1] / 'libclang_rt.fuzzer_no_main.a' if spec else None
    return path if path and path.is_file() else None


def test_libfuzzer_finds_nothing(native, tmp_path, long_run):
    if not long_run:
        pytest.skip('searches for minutes: run with --long')
    if libfuzzer() is None:
        pytest.skip('libFuzzer is missing: pip install atheris, or set MSDA_LIBFUZZER')
    program = compile_target(
        native,
        tmp_path,
        'portable',
        define='MSDA_LIBFUZZER_MAIN',
        flags=COVERAGE,
        libraries=['-Wl,--allow-multiple-definition', libfuzzer(), '-lpthread', '-ldl'],
    )
    (tmp_path / 'corpus').mkdir()
    said = call(
        program,
        tmp_path / 'corpus',
        '-runs=100000',
        '-max_total_time=300',
        '-max_len=128',
        '-len_control=0',
        '-seed=1',
        '-print_final_stats=1',
        '-detect_leaks=0',
        cwd=tmp_path,
    )
    done = int(re.search(r'stat::number_of_executed_units: (\d+)', said)[1])
    kept = len(list((tmp_path / 'corpus').iterdir()))
    assert done > 1000 and kept > 10, said[-3000:]
    print(f'libFuzzer: {done} inputs, {kept} kept for their coverage')


# ---- static analysis -------------------------------------------------------------------------------------------------
def clang_tidy():
    installed = Path(sys.executable).parent / 'clang-tidy'
    return installed if installed.is_file() else shutil.which('clang-tidy')


@pytest.mark.parametrize('source', ['cpu/ms_deform_attn.cpp', 'cpu/ms_deform_attn_portable.cpp', 'cpu/binding.cpp'])
def test_static_analysis(source, native):
    """Run clang-tidy with the checks of csrc/.clang-tidy."""
    if clang_tidy() is None:
        pytest.skip('clang-tidy is missing: pip install clang-tidy')
    headers = subprocess.run(['g++', '-print-file-name=include'], capture_output=True, text=True).stdout.strip()
    call(
        clang_tidy(),
        '--quiet',
        ROOT / 'csrc' / source,
        '--',
        '-std=c++20',
        *native.STABLE_ABI_FLAGS,
        '-isystem',
        TORCH / 'include',
        '-isystem',
        headers,
    )
