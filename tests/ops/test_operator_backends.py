"""The choice of the backend."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from operator_cases import make_case

from msda_plugin.ops import Backend, backend_for, backends, ms_deform_attn, use_backend


def run(case):
    return ms_deform_attn(case.value, case.shapes, None, case.locations, case.weights)


def test_reference_can_be_chosen():
    with use_backend('reference'):
        assert backend_for('cpu', torch.float32).name == 'reference'
        assert 'chosen' in backend_for('cuda:1', torch.float16).reason
        with use_backend(None):
            assert backend_for('cpu', torch.float32) == Backend(*backend_for(torch.device('cpu'), torch.float64))


def test_other_devices_and_dtypes():
    backend = backend_for('mps', torch.float32)
    assert backend.name == 'reference' and "'mps'" in backend.reason
    with pytest.raises(TypeError, match='dtype is torch.int64'):
        backend_for('cpu', torch.int64)


def test_chosen_backend_does_not_fall_back(monkeypatch):
    with use_backend('cuda'), pytest.raises(RuntimeError, match="'cuda' was chosen.*cannot run"):
        run(make_case())
    monkeypatch.setitem(backends._unsupported, 'cpu', 'of this test')
    with use_backend('cpu'), pytest.raises(RuntimeError, match='of this test'):
        run(make_case())
    with pytest.raises(ValueError, match="name is 'gpu', but one of cuda, cpu, reference"):
        with use_backend('gpu'):
            pass


def test_fallback_warns_once_with_its_reason(monkeypatch):
    monkeypatch.setitem(backends._unsupported, 'cpu', 'of this test')
    monkeypatch.setattr(backends, '_warned', set())
    case = make_case()
    assert backend_for('cpu', torch.float32) == ('reference', 'of this test')
    with pytest.warns(UserWarning, match='plain PyTorch on cpu.*because of this test') as caught:
        run(case)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        run(case)


def test_missing_and_broken_libraries_have_reasons(monkeypatch, tmp_path):
    monkeypatch.setattr(backends, 'LIBRARY_DIR', tmp_path)
    assert 'libmsda_cpu.so was not built' in backends._load('cpu')
    (tmp_path / 'libmsda_cpu.so').write_text('not a library')
    assert 'could not be loaded' in backends._load('cpu')


def test_the_cuda_library_is_the_one_for_the_cuda_version_of_torch(monkeypatch, tmp_path):
    loaded = []
    monkeypatch.setattr(backends, 'LIBRARY_DIR', tmp_path)
    monkeypatch.setattr(backends.torch.ops, 'load_library', lambda path: loaded.append(path.name))
    for version in ('12.8', '13.0', '13.2'):
        monkeypatch.setattr(torch.version, 'cuda', version)
        assert f'libmsda_cuda{version[:2]}.so was not built' in backends._load('cuda')
    for major in (12, 13):
        (tmp_path / f'libmsda_cuda{major}.so').touch()
    for version in ('12.8', '13.0', '13.2'):
        monkeypatch.setattr(torch.version, 'cuda', version)
        assert backends._load('cuda') == ''
    assert loaded == ['libmsda_cuda12.so', 'libmsda_cuda13.so', 'libmsda_cuda13.so']
    for version in ('11.8', '14.0'):
        monkeypatch.setattr(torch.version, 'cuda', version)
        reason = backends._load('cuda')
        assert f'built for CUDA {version} and needs libmsda_cuda{version[:2]}.so' in reason
        assert 'only libmsda_cuda12.so and libmsda_cuda13.so' in reason and 'nvcc' in reason
    monkeypatch.setattr(torch.version, 'cuda', None)
    assert 'built without CUDA' in backends._load('cuda') and len(loaded) == 3


def test_architectures_are_those_the_cuda_library_reports(monkeypatch):
    monkeypatch.setattr(backends, '_call', lambda *names: {'msda_cuda_architectures': 'sm_80+compute_80'}[names[1]])
    assert backends.cuda_architectures() == ['sm_80', 'compute_80']


@pytest.mark.parametrize('name, expected', [('reference', 'reference'), ('', None), ('gpu', 'ValueError')])
def test_environment_variable(name, expected):
    code = 'import torch, msda_plugin.ops as o; print(o.backend_for("cpu", torch.float32).name)'
    done = subprocess.run(
        [sys.executable, '-c', code], env={**os.environ, 'MSDA_BACKEND': name}, capture_output=True, text=True
    )
    expected = expected or backend_for('cpu', torch.float32).name
    assert expected in done.stdout + done.stderr


def test_importing_the_package_loads_nothing():
    code = 'import sys, msda_plugin; assert "torch" not in sys.modules and "msda_plugin.ops" not in sys.modules'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0
