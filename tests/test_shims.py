"""Importing msda_plugin.shims provides the compiled extensions of research repositories; the stand-ins import them as
those repositories do."""

import importlib
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from msda_plugin.ops import ms_deform_attn, ms_deform_attn_reference, use_backend

SHAPES, STARTS = torch.tensor([(6, 4), (3, 2)]), torch.tensor([0, 24])
FUNCTION = """
import torch

class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs)
        return extension.ms_deform_attn_forward(*inputs, 64)

    @staticmethod
    def backward(ctx, grad_output):
        value, locations, weights = extension.ms_deform_attn_backward(*ctx.saved_tensors, grad_output, 64)
        return value, None, None, locations, weights
"""
# File of a repository -> how it imports its extension.
REPOSITORIES = {
    'functions.py': 'import MultiScaleDeformableAttention as extension',
    'groundingdino/models/GroundingDINO/ms_deform_attn.py': 'from groundingdino import _C; extension = _C',
    'detrex/layers/multi_scale_deform_attn.py': 'from detrex import _C; extension = _C',
    'adet/layers/ms_deform_attn.py': 'from adet import _C; extension = _C',
}


@pytest.fixture
def shims():
    module = importlib.import_module('msda_plugin.shims')
    module.install()
    yield module
    module.uninstall()
    sys.modules.pop('msda_plugin.shims')  # the next import installs again


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A folder on Python's path; its modules are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], '__file__', None)).startswith(str(tmp_path)):
            del sys.modules[name]


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for package in path.relative_to(folder).parents[:-1]:
            (folder / package / '__init__.py').touch()


def inputs(dtype=torch.float64, sampling_dtype=None):
    generator = torch.Generator().manual_seed(0)
    value, locations, weights = (
        torch.rand(shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 30, 2, 8), (2, 5, 2, 2, 3, 2), (2, 5, 2, 2, 3))
    )
    weights /= weights.sum((-1, -2), keepdim=True)
    sampling = (t.to(sampling_dtype or dtype).requires_grad_() for t in (locations, weights))
    return value.to(dtype).requires_grad_(), SHAPES, STARTS, *sampling


def import_module(file):
    return importlib.import_module(file.removesuffix('.py').replace('/', '.'))


@pytest.mark.parametrize('file', REPOSITORIES)
def test_repository_runs_unmodified(shims, repository, file):
    write(repository, {file: f'{REPOSITORIES[file]}\n{FUNCTION}'})
    function = import_module(file).Function.apply
    value, shapes, starts, *sampling = inputs()
    torch.testing.assert_close(
        function(value, shapes, starts, *sampling), ms_deform_attn_reference(value, shapes, starts, *sampling)
    )
    assert torch.autograd.gradcheck(
        lambda *leaves: function(leaves[0], shapes, starts, *leaves[1:]), (value, *sampling)
    )


@pytest.mark.parametrize('backend', [None, 'reference'])
@pytest.mark.parametrize(
    'dtypes',
    [
        (torch.float64, None),
        (torch.float32, None),
        (torch.float16, None),
        (torch.bfloat16, None),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
    ],
)
def test_gradients_equal_those_of_the_operator(shims, dtypes, backend):
    leaves = inputs(*dtypes)
    with use_backend(backend):
        expected = ms_deform_attn(*leaves)
        grad_output = torch.rand(expected.shape, generator=torch.Generator().manual_seed(1)).to(expected)
        expected_grads = torch.autograd.grad(expected, (leaves[0], *leaves[3:]), grad_output)
        with torch.no_grad():
            assert torch.equal(shims.ms_deform_attn_forward(*leaves, 64), expected)
            grads = shims.ms_deform_attn_backward(*leaves, grad_output, 64)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert grad.dtype == expected_grad.dtype and torch.equal(grad, expected_grad)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_cuda_equals_the_reference(shims):
    leaves = [t.detach().cuda().requires_grad_(t.requires_grad) for t in inputs(torch.float32)]
    expected = ms_deform_attn_reference(*leaves)
    torch.testing.assert_close(shims.ms_deform_attn_forward(*leaves, 64), expected)
    expected_grads = torch.autograd.grad(expected.sum(), (leaves[0], *leaves[3:]))
    for grad, expected_grad in zip(
        shims.ms_deform_attn_backward(*leaves, torch.ones_like(expected), 64), expected_grads, strict=True
    ):
        torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize('file', REPOSITORIES)
def test_compiled_extension_wins(shims, repository, file):
    package = file.partition('/')[0] if '/' in file else ''
    compiled = f'{package}/_C.py' if package else 'MultiScaleDeformableAttention.py'
    write(repository, {file: REPOSITORIES[file], compiled: 'ms_deform_attn_forward = "compiled"'})
    assert import_module(file).extension.ms_deform_attn_forward == 'compiled'
    shims.uninstall()
    name = f'{package}._C' if package else 'MultiScaleDeformableAttention'
    assert sys.modules[name].ms_deform_attn_forward == 'compiled'


def test_compiled_extension_that_does_not_load_is_not_hidden(shims, repository):
    write(repository, {'MultiScaleDeformableAttention.py': 'raise ImportError("undefined symbol")'})
    with pytest.raises(ImportError, match='undefined symbol'):
        importlib.import_module('MultiScaleDeformableAttention')


@pytest.mark.parametrize('file', REPOSITORIES)
def test_uninstall(shims, repository, file):
    finders = [finder for finder in sys.meta_path if finder is not shims._extensions]
    write(repository, {file: f'{REPOSITORIES[file]}\n{FUNCTION}'})
    module = import_module(file)
    name = module.extension.__name__
    shims.install()
    assert sys.meta_path == [*finders, shims._extensions]
    shims.uninstall()
    assert sys.meta_path == finders and name not in sys.modules
    with pytest.raises(ImportError):
        importlib.import_module(name)
    package, _, attribute = name.rpartition('.')
    assert not package or not hasattr(sys.modules[package], attribute)
    assert module.Function.apply(*inputs()).shape == (2, 5, 16)  # imported before
    shims.uninstall()


def test_other_functions_are_named(shims, repository):
    write(repository, {'detrex/layers/dcn_v3.py': 'from detrex import _C'})
    extension = importlib.import_module('detrex.layers.dcn_v3')._C
    with pytest.raises(AttributeError, match=r'^detrex\._C is provided by .* alone: compile detrex for dcnv3_forward$'):
        extension.dcnv3_forward()


def test_too_late(shims, repository):
    file = 'groundingdino/models/GroundingDINO/ms_deform_attn.py'
    shims.uninstall()
    write(repository, {file: 'try:\n    from groundingdino import _C\nexcept:\n    print("running without")'})
    module = import_module(file)
    with pytest.raises(ImportError, match=r'imported, without groundingdino\._C: import msda_plugin\.'):
        shims.install()
    assert shims._extensions not in sys.meta_path
    del sys.modules[module.__name__]
    shims.install()
    assert import_module(file)._C.ms_deform_attn_forward is shims.ms_deform_attn_forward
    shims.uninstall()
    shims.install()  # it has one, from before


def test_logs_once(shims, caplog):
    caplog.set_level(logging.INFO, 'msda_plugin.shims')
    importlib.import_module('MultiScaleDeformableAttention')
    importlib.import_module('MultiScaleDeformableAttention')
    [message] = caplog.messages
    assert message == 'MultiScaleDeformableAttention is provided by msda_plugin'


def run(folder, *arguments):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=folder, timeout=120, env=dict(PYTHONPATH=PATH)
    )


PATH = str(Path(__file__).parents[1])


def test_script_without_openmmlab(repository):
    """In a new process where MMEngine, mmcv and MMDetection cannot be imported."""
    write(
        repository,
        {
            'tools/train.py': (
                'import sys\n'
                'sys.modules.update(mmengine=None, mmcv=None, mmdet=None)\n'
                'import helper\n'
                'import msda_plugin.shims\n'
                'print(__name__, sys.argv, helper.extension.ms_deform_attn_forward.__name__)\n'
                'msda_plugin.shims.uninstall()\n'
                'print("MultiScaleDeformableAttention" in sys.modules)\n'
            ),
            'tools/helper.py': REPOSITORIES['functions.py'],
        },
    )
    done = run(repository, '-m', 'msda_plugin.shims', 'tools/train.py', '--epochs', '3')
    assert done.returncode == 0, done.stderr
    assert done.stdout == ("__main__ ['tools/train.py', '--epochs', '3'] ms_deform_attn_forward\nFalse\n")
    assert 'No module named' in run(repository, 'tools/train.py').stderr


def test_script_that_is_missing(tmp_path):
    done = run(tmp_path, '-m', 'msda_plugin.shims', 'train.py')
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert done.stderr.endswith('error: train.py is not a file: name the Python script to run\n')


def test_msda_plugin_alone_provides_nothing():
    done = run(
        None, '-c', 'import sys; before = list(sys.meta_path); import msda_plugin; print(sys.meta_path == before)'
    )
    assert done.stdout == 'True\n', done.stderr


@pytest.mark.parametrize('compiled', [False, True])
def test_mmcv_without_compiled_operators(tmp_path, compiled):
    """A stand-in for mmcv, in a new process: its compiled operators win."""
    write(tmp_path, {'mmcv/__init__.py': ''})
    if compiled:
        write(tmp_path, {'mmcv/_ext.py': 'ms_deform_attn_forward = ms_deform_attn_backward = print'})
    code = f"""
import importlib, sys
sys.path.insert(0, {str(tmp_path)!r})
import msda_plugin.shims, torch
extension = importlib.import_module('mmcv._ext')
assert all(hasattr(extension, name) for name in ('ms_deform_attn_forward', 'ms_deform_attn_backward'))
if extension.ms_deform_attn_forward is print:
    sys.exit('compiled')
value, shapes, starts = torch.rand(1, 6, 2, 4), torch.tensor([(2, 3)]), torch.tensor([0])
locations, weights = torch.rand(1, 5, 2, 1, 3, 2), torch.rand(1, 5, 2, 1, 3)
output = extension.ms_deform_attn_forward(value, shapes, starts, locations, weights, im2col_step=64)
grads = [torch.zeros_like(t) for t in (value, locations, weights)]
arguments = (value, shapes, starts, locations, weights, torch.ones_like(output))
extension.ms_deform_attn_backward(*arguments, *grads, im2col_step=64)
expected = msda_plugin.shims.ms_deform_attn_backward(*arguments, 64)
assert all(torch.equal(*pair) and pair[0].any() for pair in zip(grads, expected))
msda_plugin.shims.uninstall()
assert 'mmcv._ext' not in sys.modules and not hasattr(sys.modules['mmcv'], '_ext')
"""
    done = run(tmp_path, '-c', code)
    assert (done.returncode, done.stderr.strip()) == ((1, 'compiled') if compiled else (0, '')), done.stderr
