"""accelerate changes module classes only, restore undoes it, and unsupported models raise."""

import copy
import importlib
import io
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from mmcv.cnn.bricks.transformer import FFN
from mmcv.ops import MultiScaleDeformableAttention as StockAttention
from mmengine.config import Config, ConfigDict
from mmengine.hub import get_config
from mmengine.logging import MMLogger
from mmengine.model import ExponentialMovingAverage, MMDistributedDataParallel
from mmengine.registry import init_default_scope
from torch import nn

import msda_plugin
from msda_plugin.acceleration import convert_model, low_precision
from msda_plugin.layers import MultiScaleDeformableAttention
from msda_plugin.ops import use_backend
from msda_plugin.registry import MODELS
from msda_plugin.tools.benchmarks.model import SameChoices, make_batch, tensors_in, without_downloads

SHAPES = [(6, 8), (3, 4)]
NUM_KEYS = 60
FIELDS = dict(embed_dims=32, num_heads=4, num_levels=2, num_points=2, batch_first=True)


class RenamedAttention(StockAttention):
    """A subclass that inherits mmcv's forward."""

    def __init__(self, **fields):
        super().__init__(**fields)
        self.extra = nn.Parameter(torch.zeros(1))


class OwnAttention(StockAttention):
    def forward(self, query, **kwargs):
        return query


class Block(nn.Module):
    """An attention layer and a feed-forward network, as in an encoder layer."""

    def __init__(self, attention=StockAttention, dropout=0.1):
        super().__init__()
        self.attention = attention(**FIELDS, dropout=dropout)
        self.ffn = FFN(embed_dims=32, feedforward_channels=64, ffn_drop=dropout)

    def forward(self, query):
        points = torch.linspace(0.1, 0.9, query.shape[1])[None, :, None, None].expand(len(query), -1, 2, 2)
        query = self.attention(
            query, reference_points=points, spatial_shapes=torch.tensor(SHAPES), level_start_index=torch.tensor([0, 48])
        )
        return self.ffn(query)


def make_block(*args, **kwargs):
    torch.manual_seed(0)
    block = Block(*args, **kwargs)
    draw(block)
    return block


def draw(model):
    """Randomize weights that are initially zero, so that samples depend on the queries."""
    for module in model.modules():
        if isinstance(module, StockAttention):
            nn.init.normal_(module.sampling_offsets.weight, std=0.1)
            nn.init.normal_(module.attention_weights.weight, std=0.1)


def queries():
    return torch.rand(2, NUM_KEYS, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.fixture
def log(monkeypatch):
    """Records of MMEngine's loggers above DEBUG, as (level, message)."""
    lines = []

    def append(self, record):
        if record.levelname != 'DEBUG':
            lines.append((record.levelname, record.getMessage()))

    monkeypatch.setattr(MMLogger, 'callHandlers', append)
    return lines


def test_same_results_gradients_and_random_state():
    block = make_block()
    stock = copy.deepcopy(block)
    assert msda_plugin.accelerate(block) == 1
    results = []
    for model in (stock, block):
        torch.manual_seed(2)
        query = queries()
        output = model(query)
        output.square().sum().backward()
        results.append([output.detach(), query.grad, *(p.grad for p in model.parameters()), torch.rand(3)])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(results[0][-1], results[1][-1])  # the same number of random numbers was drawn


def test_accelerate_and_restore_in_place():
    block = make_block().double().eval()
    stock = copy.deepcopy(block)
    modules, parameters = list(block.modules()), list(block.parameters())
    classes, names = [type(module) for module in modules], list(block.state_dict())
    calls = []
    for module in modules:
        module.register_forward_hook(lambda module, args, output: calls.append(module))
    block.attention.register_full_backward_hook(lambda *args: calls.append('backward'))

    assert msda_plugin.accelerate(block) == 1
    assert isinstance(block.attention, MultiScaleDeformableAttention) and isinstance(block.attention, StockAttention)
    assert type(block.attention).__name__ == 'MultiScaleDeformableAttention'
    assert repr(block) == repr(stock)
    assert all(a is b for a, b in zip(block.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(block.parameters(), parameters, strict=True))
    assert list(block.state_dict()) == names and not block.attention.training
    assert block.attention.value_proj.weight.dtype == torch.float64
    output = block.train()(queries().double())
    output.sum().backward()
    assert set(calls) == {*modules, 'backward'}  # each one was called

    assert msda_plugin.restore(block) == 1
    assert [type(module) for module in block.modules()] == classes
    assert type(block.attention) is StockAttention
    torch.testing.assert_close(block.eval()(queries().double()), stock(queries().double()), rtol=0, atol=0)


def test_second_call_changes_nothing(log):
    block = make_block()
    assert msda_plugin.accelerate(block) == 1
    assert msda_plugin.accelerate(block) == 0
    assert 'none of the' in log[-1][1] and '1 already ran it' in log[-1][1]
    assert msda_plugin.restore(block) == 1
    assert msda_plugin.restore(block) == 0


def test_own_layers_stay_unchanged():
    block = make_block(MultiScaleDeformableAttention)
    assert msda_plugin.accelerate(block) == 0
    assert msda_plugin.restore(block) == 0
    assert type(block.attention) is MultiScaleDeformableAttention


def test_subclass_that_inherits_forward_changes_and_stays_an_instance():
    block, stock = make_block(RenamedAttention), make_block(RenamedAttention)
    assert msda_plugin.accelerate(block) == 1
    assert isinstance(block.attention, RenamedAttention) and isinstance(block.attention, MultiScaleDeformableAttention)
    torch.testing.assert_close(block.eval()(queries()), stock.eval()(queries()), rtol=1e-5, atol=1e-5)
    msda_plugin.restore(block)
    assert type(block.attention) is RenamedAttention


def test_overridden_forwards_stay_and_are_logged(log):
    model = nn.ModuleList([Block(OwnAttention), Block(), Block()])
    model[2].attention.forward = lambda query, **kwargs: query
    assert msda_plugin.accelerate(model) == 1
    assert type(model[0].attention) is OwnAttention and type(model[2].attention) is StockAttention
    level, message = log[-1]
    assert level == 'WARNING'
    assert '0.attention (OwnAttention overrides forward)' in message and '2.attention (' in message


def test_log_has_count_backend_and_reason(log):
    msda_plugin.accelerate(nn.ModuleList([Block(), Block()]))
    [(level, message)] = log
    assert level == 'INFO'
    assert '2 MultiScaleDeformableAttention layers of ModuleList' in message
    assert 'backend cpu (compiled kernels for cpu' in message


def test_nothing_to_change(log):
    assert msda_plugin.accelerate(nn.Linear(2, 2)) == 0
    assert log == [
        ('INFO', 'accelerate: Linear has no multi-scale deformable attention of mmcv or transformers; nothing changed.')
    ]


def test_unchanged_without_compiled_kernels(log):
    block = make_block()
    with use_backend('reference'):
        assert msda_plugin.accelerate(block) == 0
    assert type(block.attention) is StockAttention
    assert log[-1][0] == 'WARNING' and 'no compiled kernels: ' in log[-1][1]


def test_unsupported_models_raise_and_stay_unchanged():
    from torch.ao.quantization import MinMaxObserver, QuantStub, quantize_dynamic

    with pytest.raises(TypeError, match='model is a dict; expected a torch.nn.Module'):
        msda_plugin.accelerate({})
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch.ao is deprecated
        dynamic = quantize_dynamic(make_block(), {nn.Linear})
        observed, stub = make_block(), nn.Sequential(QuantStub(), make_block())
        observed.attention.value_proj.add_module('activation_post_process', MinMaxObserver())
        scripted = nn.Sequential(make_block(), torch.jit.script(nn.Linear(2, 2)))
    for model, message in (
        (dynamic, "prepared for quantization .module 'attention.sampling_offsets' is a torch.ao.nn.quantized"),
        (observed, "quantized .* 'attention.value_proj.activation_post_process'"),
        (stub, 'quantized .*QuantStub'),
        (scripted, "scripted or traced .module '1' is a RecursiveScriptModule"),
        (torch.jit.script(nn.Linear(2, 2)), 'the model itself is a RecursiveScriptModule'),
    ):
        classes = [type(module) for module in model.modules()]
        with pytest.raises(ValueError, match=message):
            msda_plugin.accelerate(model)
        assert [type(module) for module in model.modules()] == classes


def test_unsupported_dtypes_raise_and_stay_unchanged():
    model = nn.ModuleList([Block(), Block()])
    model[1].attention.value_proj.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match='torch.int8'):
        msda_plugin.accelerate(model)
    assert type(model[0].attention) is StockAttention


def test_training_continues_with_the_same_optimizer():
    block = make_block(dropout=0.0)
    stock = copy.deepcopy(block)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (stock, block)]
    for step in range(4):
        if step == 2:
            msda_plugin.accelerate(block)
        losses = []
        for model, optimizer in zip((stock, block), optimizers, strict=True):
            loss = model(queries()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize('attention', [StockAttention, RenamedAttention])
def test_copies_and_pickles_run_the_operator(attention):
    block = make_block(attention)
    msda_plugin.accelerate(block)
    # Pickle imports this file by its module name.
    sys.modules.setdefault(__name__, sys.modules[attention.__module__])
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    for twin in (copy.deepcopy(block), torch.load(file, weights_only=False), pickle.loads(pickle.dumps(block))):
        assert type(twin.attention) is type(block.attention)
        assert torch.equal(twin.eval()(queries()), block.eval()(queries()))
        assert msda_plugin.restore(twin) == 1 and type(twin.attention) is attention
        twin(queries())


def test_inside_distributed_and_averaged_models(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        model = MMDistributedDataParallel(make_block(dropout=0.0))
        average = ExponentialMovingAverage(model, momentum=0.5)
        expected = model(queries())
        assert msda_plugin.accelerate(model) == 1 and msda_plugin.accelerate(average) == 1
        output = model(queries())
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        output.sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        average.update_parameters(model)
        torch.testing.assert_close(average(queries()), expected, rtol=1e-5, atol=1e-5)
    finally:
        torch.distributed.destroy_process_group()


def test_shared_layers_count_once():
    block = make_block()
    assert msda_plugin.accelerate(nn.ModuleList([block, block])) == 1


SMALL_RESNET = dict(depth=18, base_channels=8)
SMALL_LAYERS = dict(encoder=dict(num_layers=1), decoder=dict(num_layers=2))
MODELS_OF_MMDET = {
    'deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco.py': (
        3,
        dict(
            backbone=SMALL_RESNET,
            neck=dict(in_channels=[16, 32, 64]),
            num_queries=30,
            **SMALL_LAYERS,
            test_cfg=dict(max_per_img=10),
        ),
    ),
    'dino/dino-4scale_r50_8xb2-12e_coco.py': (
        3,
        dict(
            backbone=SMALL_RESNET,
            neck=dict(in_channels=[16, 32, 64]),
            num_queries=30,
            **SMALL_LAYERS,
            test_cfg=dict(max_per_img=10),
        ),
    ),
    'ddq/ddq-detr-4scale_r50_8xb2-12e_coco.py': (
        3,
        dict(
            backbone=SMALL_RESNET,
            neck=dict(in_channels=[16, 32, 64]),
            num_queries=30,
            dense_topk_ratio=1.5,
            **SMALL_LAYERS,
            test_cfg=dict(max_per_img=10),
        ),
    ),
    'mask2former/mask2former_r50_8xb2-lsj-50e_coco.py': (
        1,
        dict(
            backbone=SMALL_RESNET,
            panoptic_head=dict(
                in_channels=[8, 16, 32, 64],
                num_queries=20,
                transformer_decoder=dict(num_layers=3),
                pixel_decoder=dict(encoder=dict(num_layers=1)),
            ),
        ),
    ),
}


@pytest.mark.parametrize('name', MODELS_OF_MMDET)
def test_models_of_mmdetection(name, monkeypatch):
    monkeypatch.setattr(low_precision, 'cpu_has_bfloat16', lambda: True)
    count, changes = MODELS_OF_MMDET[name]
    cfg = get_config(f'mmdet::{name}')
    init_default_scope('mmdet')
    cfg.merge_from_dict(dict(model=changes))
    torch.manual_seed(0)
    model = MODELS.build(without_downloads(cfg.model))
    model.init_weights()
    draw(model)
    batch = make_batch(model, height=64, width=96, batch=1, training=False)
    with torch.no_grad(), SameChoices() as choices:
        expected = list(tensors_in(model.eval()(**batch, mode='tensor')))
        assert msda_plugin.accelerate(model) == count
        for step in ({}, dict(inference=True)):
            msda_plugin.accelerate(model, **step)
            choices.replay()
            outputs = list(tensors_in(model(**batch, mode='tensor')))
            for output, wanted in zip(outputs, expected, strict=True):
                torch.testing.assert_close(output, wanted, rtol=0, atol=1e-4)
        assert model.backbone.conv1.channels_last and model.backbone.conv1.folded_norm is model.backbone.bn1
        msda_plugin.accelerate(model, dtype=torch.bfloat16)
        choices.replay()
        outputs = list(tensors_in(model(**batch, mode='tensor')))
        assert all(output.dtype == torch.float32 for output in outputs)
        errors = [
            (output - wanted).abs().mean() / wanted.abs().mean()
            for output, wanted in zip(outputs, expected, strict=True)
        ]
        assert 0 < max(errors) and (name.startswith('ddq') or max(errors) < 0.05)  # DDQ suppresses other proposals
    model(**batch, mode='predict')

    batch = make_batch(model, height=64, width=96, batch=1, training=True)
    losses = []
    for change in (msda_plugin.accelerate, msda_plugin.restore):
        change(model)
        torch.manual_seed(3)
        loss, _ = model.parse_losses(model.train()(**batch, mode='loss'))
        loss.backward()
        losses.append(float(loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_grounding_dinos_encoder():
    from mmdet.models.layers.transformer.grounding_dino_layers import GroundingDinoTransformerEncoder

    text = ConfigDict(
        self_attn_cfg=dict(num_heads=2, embed_dims=32, batch_first=True),
        ffn_cfg=dict(embed_dims=32, feedforward_channels=32),
    )
    torch.manual_seed(0)
    encoder = GroundingDinoTransformerEncoder(
        num_layers=2,
        layer_cfg=dict(self_attn_cfg=FIELDS, ffn_cfg=dict(embed_dims=32, feedforward_channels=64)),
        text_layer_cfg=text,
        fusion_layer_cfg=dict(v_dim=32, l_dim=32, embed_dim=32, num_heads=2, init_values=1e-4),
    ).eval()
    draw(encoder)
    features = torch.rand(1, NUM_KEYS, 32)
    inputs = dict(
        query=features,
        query_pos=torch.rand_like(features),
        key_padding_mask=torch.zeros(1, NUM_KEYS).bool(),
        spatial_shapes=torch.tensor(SHAPES),
        level_start_index=torch.tensor([0, 48]),
        valid_ratios=torch.ones(1, 2, 2),
        memory_text=torch.rand(1, 3, 32),
        pos_text=torch.rand(1, 3, 32),
        text_attention_mask=torch.zeros(1, 3).bool(),
        text_self_attention_masks=torch.ones(1, 3, 3).bool(),
    )
    with torch.no_grad():
        expected = encoder(**inputs)
        assert msda_plugin.accelerate(encoder) == 2
        for output, wanted in zip(encoder(**inputs), expected, strict=True):
            torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-5)


def test_same_losses_over_twenty_steps(tiny_stock_config):
    """With dropout, which draws the same random numbers."""
    init_default_scope('mmdet')
    cfg = Config.fromfile(str(tiny_stock_config))
    torch.manual_seed(0)
    stock = MODELS.build(cfg.model)
    stock.init_weights()
    fast = copy.deepcopy(stock)
    assert msda_plugin.accelerate(fast) == 4
    assert any(module.p > 0 for module in fast.modules() if isinstance(module, nn.Dropout))
    curves = []
    for model in (stock, fast):
        batch = make_batch(model, height=64, width=96, batch=2, training=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=1e-4)
        torch.manual_seed(4)
        curves.append([])
        for _ in range(20):
            loss, _ = model.parse_losses(model.train()(**batch, mode='loss'))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            curves[-1].append(float(loss))
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)
    assert curves[0][-1] < curves[0][0]


def test_import_of_the_package_is_cheap():
    code = 'import sys, msda_plugin; sys.exit(any(name in sys.modules for name in ("torch", "mmcv", "mmengine")))'
    assert subprocess.run([sys.executable, '-c', code], timeout=60).returncode == 0
    assert msda_plugin.accelerate is convert_model.accelerate
    assert not hasattr(importlib.import_module('msda_plugin'), 'no_such_name')


@pytest.mark.parametrize('inference', [True, False])
def test_steps_are_separate(inference):
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).eval()
    x = torch.rand(1, 3, 4, 4)
    with torch.no_grad():
        expected = net(x)
        msda_plugin.accelerate(net, inference=inference, channels_last=not inference)
        assert net(x).is_contiguous() == inference
        assert (vars(net[0]).get('folded_norm') is net[1]) == inference
        torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-6)
        msda_plugin.restore(net)
        assert torch.equal(net(x), expected)
