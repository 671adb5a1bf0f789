"""csrc/sass.py: registers, spills and inner loops of the CUDA kernels."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / 'msda_plugin' / 'ops' / 'lib' / 'libmsda_cuda13.so'
SASS = """
\t\tFunction : _ZN4msda12_GLOBAL__N__114forward_kernelIffLi4EEvNS_7ProblemEPT_
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P1 LDG.E.128.CONSTANT R16, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.CONSTANT R4, desc[UR4][R2.64] ;
        /*0030*/              @!P0 BRA 0x20 ;
        /*0040*/                   LDG.E.128.CONSTANT R20, desc[UR4][R2.64] ;
        /*0050*/                   FFMA R5, R16, R20, R5 ;
        /*0060*/               @P3 BRA 0x40 ;
        /*0070*/               @P2 BRA 0x10 ;
        /*0080*/                   EXIT ;
        /*0090*/                   BRA 0x0 ;
\t\tFunction : plain_function
        /*0000*/                   EXIT ;
"""
RESOURCES = """
 Function _ZN4msda12_GLOBAL__N__114forward_kernelIffLi4EEvNS_7ProblemEPT_:
  REG:63 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:536 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


@pytest.fixture(scope='module')
def sass():
    spec = importlib.util.spec_from_file_location('csrc_sass', ROOT / 'csrc' / 'sass.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_inner_loops_and_resources(sass):
    loops = sass.inner_loops(SASS)
    assert set(loops) == {'forward_kernelIffLi4E', 'plain_function'}
    (loop,) = loops['forward_kernelIffLi4E']
    assert loop == {'LDG': 1, 'FFMA': 1, 'BRA': 1}
    assert sass.resources(RESOURCES) == {'forward_kernelIffLi4E': (63, 8)}


def test_missing_cuobjdump(sass, monkeypatch):
    monkeypatch.setenv('CUOBJDUMP', 'no-such-command')
    with pytest.raises(FileNotFoundError, match='set CUOBJDUMP'):
        sass.find_cuobjdump()


@pytest.fixture(scope='module')
def library(sass):
    if not LIBRARY.exists():
        pytest.skip('libmsda_cuda13.so is not built')
    try:
        sass.find_cuobjdump()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return LIBRARY


def test_no_kernel_spills(sass, library):
    found = [
        (arch, name, stack)
        for arch in ('sm_75', 'sm_80', 'sm_86', 'sm_89', 'sm_90', 'sm_100', 'sm_120')
        for name, (_, stack) in sass.resources(sass.dump(library, arch, 'resource-usage')).items()
    ]
    assert found and not [one for one in found if one[2]]


def test_forward_loop(sass, library):
    """Loads that wait for nothing but each other; two samples at a time in float32."""
    wide = {k.name: k.loops for k in sass.kernels(library, 'sm_90') if re.match('forward_kernelI.*Li[48]E', k.name)}
    assert len(wide) == 5
    for name, loops in wide.items():
        assert loops and all(loop['LDG'] in (4, 8) and loop['BRA'] == 1 for loop in loops), name
    (float32,) = [loops for name, loops in wide.items() if name.startswith('forward_kernelIffLi4E')]
    assert all(loop['LDG'] == 8 and loop.total() <= 80 for loop in float32)


def test_tensor_core_loop(sass, library):
    """One step takes four samples of a unit. Old GPUs have machine code of the kernel, but do not use it."""
    found = [k for k in sass.kernels(library, 'sm_90') if k.name.startswith('tensor_core_forward_kernel')]
    assert len(found) == 4
    for kernel in found:
        (loop,) = [loop for loop in kernel.loops if 'HMMA' in loop]
        assert loop['LDG'] == loop['HMMA'] == 4 and loop['BRA'] == 1 and loop.total() <= 60, kernel


def test_backward_loop(sass, library):
    (kernel,) = [k for k in sass.kernels(library, 'sm_90') if k.name.startswith('backward_kernelIffLi4ELb1ELi8')]
    dots, sums = kernel.loops  # of two samples, and of two pairs of pixels
    assert dots['LDG'] == 8 and dots['BRA'] == 1 and dots.total() <= 100, dots
    assert sums['REDG'] == 4 and sums.total() <= 100, sums


def test_backward_loop_on_tensor_cores(sass, library):
    found = [k for k in sass.kernels(library, 'sm_90') if re.search(r'^backward_kernelI\w*Li8ELb1ELi[48]E', k.name)]
    assert len(found) == 8
    for kernel in found:
        dots = kernel.loops[0]  # of one sample
        assert dots['LDG'] == dots['HMMA'] == 4 and dots['BRA'] == 1 and dots.total() <= 55, kernel


def test_gather_loop(sass, library):
    """Four samples, whose loads do not wait for each other, and the rare steps from one pixel to the next."""
    found = [k for k in sass.kernels(library, 'sm_90') if k.name.startswith('gather_kernelIfLi4E')]
    (loop,) = [loop for kernel in found for loop in kernel.loops if loop['FFMA'] == 32]
    assert loop['LDG'] == 4 and loop.total() <= 200, loop
