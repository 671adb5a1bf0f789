"""accelerate and restore with the models of transformers: same numbers, and other layers stay unchanged."""

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip('transformers')

from transformers.models.deformable_detr import modeling_deformable_detr as deformable_detr

import msda_plugin
from msda_plugin.acceleration import convert_model, low_precision, transformers_models
from msda_plugin.ops import points_per_level

sys.path.insert(0, str(Path(__file__).parent))
import transformers_families as families

sys.path.pop(0)

LAYERS = dict.fromkeys(families.FAMILIES, 2) | dict.fromkeys(
    ('deformable_detr', 'deformable_detr_two_stage', 'grounding_dino', 'mm_grounding_dino'), 4
)


@pytest.fixture
def log(monkeypatch):
    lines = []
    monkeypatch.setattr(convert_model, 'log', lambda message, level=20: lines.append((level, message)))
    return lines


@pytest.fixture
def model():
    return families.build('deformable_detr')[0].eval()


def attentions(model):
    return [module for module in model.modules() if 'sampling_offsets' in module._modules]


def outputs(model, inputs):
    torch.manual_seed(3)
    return list(families.tensors_in(model(**inputs)))


def assert_same(results, expected, tolerance=1e-5):
    """Within ``tolerance`` of the largest number of each tensor; of all tensors, where those of one cancel to 0."""
    results, expected = list(results), list(expected)
    largest = [wanted[wanted.isfinite()].abs().max().item() if wanted.isfinite().any() else 0 for wanted in expected]
    for result, wanted, size in zip(results, expected, largest, strict=True):
        size = max(size, 1e-6 * max(largest))
        torch.testing.assert_close(result, wanted, rtol=0, atol=tolerance * size, equal_nan=True)


@pytest.mark.parametrize('name', families.FAMILIES)
def test_same_outputs_and_undone(name, log, monkeypatch):
    calls = []
    fused = transformers_models.ms_deform_attn_fused
    for module in (transformers_models, points_per_level):
        monkeypatch.setattr(
            module, 'ms_deform_attn_fused', lambda *args, **kwargs: calls.append(1) or fused(*args, **kwargs)
        )
    model, inputs = families.build(name)
    model.eval()
    modules, classes = list(model.modules()), [type(module) for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        expected = outputs(model, inputs)
        assert msda_plugin.accelerate(model) == LAYERS[name]
        assert [level for level, _ in log] == [20] and 'backend cpu' in log[0][1]
        calls.clear()
        assert_same(outputs(model, inputs), expected)
        assert len(calls) == LAYERS[name]
        assert msda_plugin.accelerate(model) == 0

        assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
        assert all(isinstance(module, stock) for module, stock in zip(modules, classes, strict=True))
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())

        assert msda_plugin.restore(model) == LAYERS[name]
        assert [type(module) for module in model.modules()] == classes
        assert_same(outputs(model, inputs), expected, tolerance=0)

        # The outputs depend on the attention.
        for layer in attentions(model):
            layer.attention_weights.bias[::2] += 3
        with pytest.raises(AssertionError):
            assert_same(outputs(model, inputs), expected, tolerance=1e-4)


@pytest.mark.parametrize('name', families.FAMILIES)
def test_same_gradients_in_training(name):
    stock, inputs = families.build(name)
    stock.double().train()
    inputs |= dict(pixel_values=inputs['pixel_values'].double())
    fast = copy.deepcopy(stock)
    assert msda_plugin.accelerate(fast) == LAYERS[name]
    results = []
    for model in (fast, stock):
        finite = [t[t.isfinite()] for t in outputs(model, inputs) if t.requires_grad]
        loss = sum(t.mul(torch.linspace(-1, 1, t.numel(), dtype=t.dtype)).sum() for t in finite)
        loss.backward()
        results.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
        results[-1] |= {'loss': loss.detach(), 'random state': torch.rand(3)}
    assert list(results[0]) == list(results[1])
    assert_same(results[0].values(), results[1].values())
    assert any('attention_weights.weight' in key and grad.abs().max() > 0 for key, grad in results[1].items())


@pytest.mark.parametrize('name', ['deformable_detr', 'mask2former', 'lw_detr', 'd_fine'])
def test_attention_weights_are_returned(name):
    model, inputs = families.build(name)
    stock = copy.deepcopy(model.eval())
    assert msda_plugin.accelerate(model)
    with torch.no_grad():
        expected, results = stock(**inputs, output_attentions=True), model(**inputs, output_attentions=True)
    keys = [key for key in expected if 'attentions' in key]
    assert sum(len(expected[key]) for key in keys) > 0
    for key in keys:
        assert_same(families.tensors_in(results[key]), families.tensors_in(expected[key]))


@pytest.mark.parametrize('method', ['default', 'discrete'])
@pytest.mark.parametrize('points', [[4, 4, 4], [1, 5, 2]])
def test_boxes_across_the_border(points, method):
    model, _ = families.FAMILIES['d_fine'](points=points, decoder_method=method, decoder_offset_scale=0.8)
    torch.manual_seed(1)
    layer = attentions(model)[0]
    nn.init.normal_(layer.sampling_offsets.weight)
    nn.init.normal_(layer.attention_weights.weight)
    shapes = [(13, 7), (6, 4), (1, 2)]
    arguments = dict(
        hidden_states=torch.randn(2, 50, 32).requires_grad_(),
        encoder_hidden_states=torch.randn(2, 13 * 7 + 24 + 2, 32).requires_grad_(),
        reference_points=torch.randn(2, 50, 1, 4),
        spatial_shapes=torch.tensor(shapes),
        spatial_shapes_list=shapes,
    )

    def run():
        output, weights = layer(**arguments)
        inputs = [arguments['hidden_states'], arguments['encoder_hidden_states']]
        return [output.detach(), weights.detach(), *torch.autograd.grad(output.square().sum(), inputs)]

    expected = run()
    assert msda_plugin.accelerate(layer) == 1
    assert_same(run(), expected)


@pytest.mark.parametrize('training', [False, True])
def test_frozen_batch_norms(model, training):
    norms = [module for module in model.modules() if type(module) is deformable_detr.DeformableDetrFrozenBatchNorm2d]
    assert norms
    norm = norms[0]
    for buffer in norm.buffers():
        nn.init.uniform_(buffer, 0.5, 2)
    x = torch.randn(2, len(norm.weight), 5, 3)
    x_low = x.bfloat16()
    expected, expected_low = norm(x), norm(x_low)
    assert msda_plugin.accelerate(model) == 4
    assert all(isinstance(module, transformers_models.FrozenBatchNorm) for module in norms)
    if training:
        x.requires_grad_()
        norm(x).sum().backward()
        assert x.grad is not None
    assert_same([norm(x)], [expected])
    assert norm(x_low).dtype == expected_low.dtype
    assert torch.equal(norm(x_low), expected_low)
    msda_plugin.restore(model)
    assert all(type(module) is deformable_detr.DeformableDetrFrozenBatchNorm2d for module in norms)


def test_points_are_refused_where_the_stock_layer_takes_boxes_only():
    layer = attentions(families.build('rt_detr_v2')[0])[0]
    msda_plugin.accelerate(layer)
    with pytest.raises(ValueError, match='supports boxes only'):
        layer(
            torch.rand(1, 3, 32),
            encoder_hidden_states=torch.rand(1, 3, 32),
            reference_points=torch.rand(1, 3, 1, 2),
            spatial_shapes=torch.tensor([(1, 1)] * 3),
        )


def test_low_precision():
    model, inputs = families.build('deformable_detr')
    model.eval()
    with torch.no_grad():
        exact = model(**inputs).logits
        assert msda_plugin.accelerate(model) == 4
        with torch.autocast('cpu', torch.bfloat16):
            automatic = model(**inputs).logits
        half = model.bfloat16()(**inputs | dict(pixel_values=inputs['pixel_values'].bfloat16())).logits
    assert half.dtype == torch.bfloat16
    for logits in (automatic, half):
        assert (logits - exact).abs().max() < 0.1 * exact.abs().max()


def test_copies_and_pickles_stay_accelerated(model):
    msda_plugin.accelerate(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert msda_plugin.restore(other) == 4
        assert type(attentions(other)[0]) is deformable_detr.DeformableDetrMultiscaleDeformableAttention
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    assert msda_plugin.restore(model) == 4


def test_checkpoint_folder_loads_into_the_stock_model(model, tmp_path):
    msda_plugin.accelerate(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert type(attentions(loaded)[0]) is deformable_detr.DeformableDetrMultiscaleDeformableAttention
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])


def test_comparison_leaves_no_trace(model, monkeypatch):
    monkeypatch.setattr(transformers_models, '_examined', {})
    convert_model.is_frozen_batch_norm.cache_clear()
    calls = []
    for module in model.modules():
        if 'attn' not in type(module).__name__ and list(module.parameters()):
            module.register_forward_hook(lambda *arguments: calls.append(1))
    state = torch.random.get_rng_state()
    with torch.inference_mode(), torch.device('meta'):
        assert msda_plugin.accelerate(model) == 4
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not calls
    assert len(transformers_models._examined) == 1  # all layers have the same class and sizes


def test_class_with_a_forward_of_its_own_stays(log):
    class OwnAttention(deformable_detr.DeformableDetrMultiscaleDeformableAttention):
        def forward(self, hidden_states, **kwargs):
            return hidden_states, None

    class Inherited(deformable_detr.DeformableDetrMultiscaleDeformableAttention):
        pass

    model = families.build('deformable_detr')[0]
    layers = attentions(model)
    layers[0].__class__, layers[1].__class__ = OwnAttention, Inherited
    layers[2].forward = lambda *arguments, **kwargs: None
    assert msda_plugin.accelerate(model) == 2
    assert type(layers[0]) is OwnAttention and isinstance(layers[1], Inherited) and 'forward' in vars(layers[2])
    level, message = log[-1]
    assert level == 30
    assert 'model.encoder.layers.0.self_attn (OwnAttention has a forward of its own)' in message
    assert 'decoder.layers.0.encoder_attn (DeformableDetrMultiscaleDeformableAttention has a forward' in message


def test_other_version_stays(model, log, monkeypatch):
    stock = deformable_detr.DeformableDetrMultiscaleDeformableAttention
    original = stock.forward

    def other_arithmetic(self, hidden_states, reference_points=None, **kwargs):
        return original(self, hidden_states, reference_points=reference_points + 1e-6, **kwargs)

    def other_gradients(self, hidden_states, encoder_hidden_states=None, **kwargs):
        return original(self, hidden_states, encoder_hidden_states=encoder_hidden_states.detach(), **kwargs)

    def other_argument(self, hidden_states, temperature=1.0, **kwargs):
        return original(self, hidden_states, **kwargs)

    for forward, reason in (
        (other_arithmetic, 'the results of DeformableDetrMultiscaleDeformableAttention.forward differ'),
        (other_gradients, 'the results of DeformableDetrMultiscaleDeformableAttention.forward differ'),
        (other_argument, 'forward takes temperature, which msda_plugin does not know'),
    ):
        forward.__module__ = deformable_detr.__name__
        monkeypatch.setattr(stock, 'forward', forward)
        assert msda_plugin.accelerate(model) == 0
        assert type(attentions(model)[0]) is stock
        assert log[-1][0] == 30 and reason in log[-1][1] and 'model.encoder.layers.0.self_attn' in log[-1][1]
    monkeypatch.setattr(stock, 'forward', original)
    assert msda_plugin.accelerate(model) == 4


def test_layer_of_another_framework_stays(log):
    class MSDeformAttn(nn.Module):
        def __init__(self):
            super().__init__()
            self.sampling_offsets = self.attention_weights = nn.Linear(2, 2)

    assert msda_plugin.accelerate(nn.Sequential(MSDeformAttn())) == 0
    assert log[-1][0] == 30
    assert f'0 (MSDeformAttn is a class of {__name__}, not of mmcv or transformers)' in log[-1][1]


def test_hook_on_a_part_that_would_not_run(model, log):
    attentions(model)[0].attn.register_forward_hook(lambda *arguments: None)
    assert msda_plugin.accelerate(model) == 3
    assert 'a hook on DeformableDetrMultiscaleDeformableAttention.attn would not run' in log[-1][1]


def test_layers_that_cannot_be_compared_stay(log):
    layer = attentions(families.build('d_fine')[0])[0]
    assert msda_plugin.accelerate(copy.deepcopy(layer).to('meta')) == 0
    assert 'DFineMultiscaleDeformableAttention is on the meta device, without values' in log[-1][1]
    layer.sampling_offsets = nn.Sequential(layer.sampling_offsets)
    assert msda_plugin.accelerate(layer) == 0
    assert 'sampling_offsets is a Sequential, not a linear layer' in log[-1][1]


def run_python(code):
    environment = os.environ | {'PYTHONPATH': os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_without_openmmlab_packages():
    code = """
import importlib.abc, logging, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split('.')[0] in ('mmengine', 'mmcv', 'mmdet'):
            raise ImportError(f'{name} is blocked')

sys.meta_path.insert(0, Blocker())
logging.basicConfig(level=logging.INFO)
import msda_plugin
assert 'torch' not in sys.modules
import torch, transformers_families
torch.set_num_threads(1)
model, inputs = transformers_families.build('deformable_detr')
print(msda_plugin.accelerate(model), 'changed')
model(**inputs).logits.sum().backward()
print(msda_plugin.restore(model), 'restored')
"""
    output = run_python(code)
    assert '4 changed' in output and '4 restored' in output
    assert (
        'INFO:msda_plugin:accelerate: 4 MultiScaleDeformableAttention layers of DeformableDetrForObjectDetection'
        in output
    )


def test_imports_only_the_frameworks_of_the_model():
    code = """
import sys, torch
from msda_plugin import accelerate, restore
print(accelerate(torch.nn.Linear(2, 2)), restore(torch.nn.Linear(2, 2)))
print([name for name in ('mmengine', 'mmcv', 'mmdet', 'transformers') if name in sys.modules])
"""
    assert run_python(code).splitlines() == ['0 0', '[]']


@pytest.mark.parametrize('name', families.FAMILIES)
def test_further_steps(name, monkeypatch):
    monkeypatch.setattr(low_precision, 'cpu_has_bfloat16', lambda: True)
    model, inputs = families.build(name)
    model.eval()
    with torch.no_grad():
        expected = outputs(model, inputs)
        msda_plugin.accelerate(model, inference=True)
        assert any(getattr(module, 'channels_last', False) for module in model.modules())
        assert_same(outputs(model, inputs), expected, tolerance=1e-4)
        msda_plugin.accelerate(model, dtype=torch.bfloat16)
        results = outputs(model, inputs)
        assert [(t.shape, t.dtype) for t in results] == [(t.shape, t.dtype) for t in expected]
        assert any(not torch.equal(a, b) for a, b in zip(results, expected, strict=True))
        msda_plugin.restore(model)
        assert_same(outputs(model, inputs), expected, tolerance=0)
