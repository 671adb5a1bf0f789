"""bfloat16: what runs in it, what stays float32, and what is refused."""

import copy
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from torch import nn

import msda_plugin
from msda_plugin import compat
from msda_plugin.acceleration import low_precision

SHAPES = Path(__file__).parents[2] / 'configs/shapes'
Outputs = namedtuple('Outputs', 'scores features')


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Conv2d(3, 16, 3, 2)
        self.layer = nn.Linear(16, 16)
        self.bbox_head = nn.ModuleDict(dict(cls_branches=nn.Linear(16, 4)))
        self.seen = {}

    def forward(self, x):
        x = self.backbone(x)
        self.seen['backbone'] = x.dtype
        x = self.layer(x.flatten(2).mT)
        self.seen['layer'] = x.dtype
        scores = self.bbox_head['cls_branches'](x)
        self.seen['scores'] = scores.dtype
        return Outputs(scores, {'last': [x], 'shape': (4, 5), 3: None})


@pytest.fixture(autouse=True)
def has_bfloat16(monkeypatch):
    monkeypatch.setattr(low_precision, 'cpu_has_bfloat16', lambda: True)


def make():
    torch.manual_seed(0)
    return Detector().eval()


def images():
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_bfloat16_inference_with_float32_predictors_and_outputs():
    model = make()
    stock, parameters = copy.deepcopy(model), list(model.parameters())
    expected = stock(images())
    assert msda_plugin.accelerate(model, dtype=torch.bfloat16) == 0
    outputs = model(images())
    assert model.seen == dict(backbone=torch.bfloat16, layer=torch.bfloat16, scores=torch.float32)
    assert type(outputs) is Outputs and outputs.features['shape'] == (4, 5)
    assert outputs.features['last'][0].dtype == outputs.scores.dtype == torch.float32
    difference = (outputs.scores - expected.scores).abs().max()
    assert 0 < difference < 0.02
    assert all(a is b and a.dtype == torch.float32 for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == list(stock.state_dict()) and repr(model) == repr(stock)

    model.train()(images()).scores.sum().backward()
    assert set(model.seen.values()) == {torch.float32}
    msda_plugin.restore(model)
    assert torch.equal(model.eval()(images()).scores, expected.scores)
    assert vars(model).keys() == vars(stock).keys()


def test_bfloat16_training_with_float32_predictors_and_gradients():
    model = make()
    stock = copy.deepcopy(model)
    expected = stock.train()(images()).scores.sum()
    expected.backward()
    assert msda_plugin.accelerate(model, training_dtype=torch.bfloat16) == 0
    scores = model.train()(images()).scores
    assert model.seen == dict(backbone=torch.bfloat16, layer=torch.bfloat16, scores=torch.float32)
    scores.sum().backward()
    differences = []
    for ours, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        assert ours.dtype == ours.grad.dtype == torch.float32
        differences.append(((ours.grad - theirs.grad).abs().max() / theirs.grad.abs().max()).item())
    assert 0 < max(differences) < 0.02
    model.eval()(images())
    assert set(model.seen.values()) == {torch.float32}

    msda_plugin.accelerate(model, dtype=torch.bfloat16)
    for mode in (True, False):
        model.train(mode)(images())
        assert model.seen['layer'] == torch.bfloat16
    msda_plugin.restore(model)
    assert torch.equal(model.eval()(images()).scores, stock.eval()(images()).scores)
    assert vars(model).keys() == vars(stock).keys()


def test_all_steps_at_once_and_copies():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Detector()).eval()
    model[2].backbone = nn.Conv2d(8, 16, 3, 2)
    with torch.no_grad():
        expected = model(images()).scores
        msda_plugin.accelerate(model, inference=True, dtype=torch.bfloat16)
        twin = copy.deepcopy(model)
        outputs = model(images()).scores
        assert 0 < (outputs - expected).abs().max() < 0.02
        assert torch.equal(twin(images()).scores, outputs)
        msda_plugin.restore(model)
        assert torch.equal(model(images()).scores, expected)


def test_wrapper_runs_its_module_in_bfloat16():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = Wrapper(make()).eval()
    msda_plugin.accelerate(model, dtype=torch.bfloat16)
    model.module(images())
    assert model.module.seen['layer'] == torch.bfloat16


@pytest.mark.parametrize(
    ('model', 'dtype', 'bfloat16', 'message'),
    [
        (make(), torch.float16, True, r'dtype is torch.float16; expected torch.bfloat16 on cpu'),
        (make(), torch.int8, True, r'dtype is torch.int8; expected torch.bfloat16 on cpu'),
        (make().double(), torch.bfloat16, True, r'needs a float32 model, but its weights are torch.float64'),
        (make(), torch.bfloat16, False, r'this CPU has no bfloat16 instructions'),
    ],
)
def test_refused_and_unchanged(model, dtype, bfloat16, message, monkeypatch):
    monkeypatch.setattr(low_precision, 'cpu_has_bfloat16', lambda: bfloat16)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        msda_plugin.accelerate(model, inference=True, dtype=dtype)
    with pytest.raises(ValueError, match=f'training_{message}' if 'expected' in message else message):
        msda_plugin.accelerate(model, inference=True, training_dtype=dtype)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize(
    'name',
    [
        'rtdetr_r18vd-nano_1xb4-7e',
        'dfine_hgnetv2-n_1xb4-8e',
        'deformable-detr-two-stage_shunted-nano_1xb4-8e',
        'mmdet-deformable-detr-two-stage_r18_1xb4-4e',
    ],
)
def test_detectors_train_in_bfloat16(name):
    compat.import_mmdet()
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(Config.fromfile(str(SHAPES / f'{name}_shapes.py')).model).train()
    model.init_weights()  # MMDetection leaves embeddings uninitialized until then
    objects = InstanceData(bboxes=torch.tensor([[10.0, 10, 60, 70], [50, 30, 120, 100]]), labels=torch.tensor([0, 1]))
    samples = []
    for found in (objects, objects[:0]):
        samples.append(DetDataSample(metainfo=dict(img_shape=(128, 160), ori_shape=(128, 160), scale_factor=(1, 1))))
        samples[-1].gt_instances = found
    data = model.data_preprocessor(dict(inputs=[torch.full((3, 128, 160), 99)] * 2, data_samples=samples), True)

    def loss():
        torch.manual_seed(1)
        return model.parse_losses(model(**copy.deepcopy(data), mode='loss'))[0]

    expected = loss().item()
    msda_plugin.accelerate(model, channels_last=True, training_dtype=torch.bfloat16)
    found = loss()
    assert found.dtype == torch.float32
    assert found.item() != expected and found.item() == pytest.approx(expected, rel=0.1)
    found.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
