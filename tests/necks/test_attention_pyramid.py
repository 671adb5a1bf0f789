"""PVTNeck and SwinNeck: equal to ChannelMapper at first, at any size, and in detectors of several kinds."""

from pathlib import Path

import mmdet
import numpy as np
import pytest
import torch
from mmdet.models.necks import ChannelMapper
from mmdet.registry import MODELS as MMDET_MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import OptimWrapper
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from torch.nn import functional as F

from msda_plugin.necks import PVTNeck, SwinNeck
from msda_plugin.registry import MODELS

ROOT = Path(__file__).parents[2]
NECKS = ['PVTNeck', 'SwinNeck']
FUSIONS = [None, 'add', 'cross_attention']
CHANNELS = [24, 40, 64]
SIZES = [(19, 13), (10, 7), (5, 4)]
MAPPER = dict(
    in_channels=CHANNELS,
    kernel_size=1,
    out_channels=32,
    act_cfg=None,
    norm_cfg=dict(type='GN', num_groups=8),
    num_outs=5,
)


@pytest.fixture(autouse=True)
def _no_log_of_every_parameter():
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel('ERROR')
    yield
    logger.setLevel(level)


def build(kind, **fields):
    """A neck with its default initialization."""
    torch.manual_seed(0)
    neck = MODELS.build(dict(MAPPER, type=f'msda_plugin.{kind}', num_heads=4) | fields)
    neck.init_weights()
    return neck


def build_nonzero(kind, **fields):
    """A neck in float64 with nonzero layer scales and biases, so that every parameter affects the output."""
    neck = build(kind, layer_scale_init_value=0.5, **fields).double()
    for name, parameter in neck.named_parameters():
        if name.endswith(('bias', 'bias_table')):
            torch.nn.init.normal_(parameter, std=0.5)
    return neck


def make_maps(sizes=SIZES, batch=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(batch, channels, *size, dtype=dtype, generator=generator).requires_grad_()
        for channels, size in zip(CHANNELS, sizes, strict=True)
    ]


def gradients(outs, leaves):
    return torch.autograd.grad(sum((out.float() ** 3).mean() for out in outs), leaves)


@pytest.mark.parametrize('bias', [True, 'auto'])
@pytest.mark.parametrize('kind', NECKS)
def test_without_attention_equals_channel_mapper(kind, bias):
    neck, mapper = build(kind, depth=0, fusion=None, bias=bias), ChannelMapper(**MAPPER, bias=bias)
    assert list(neck.state_dict()) == list(mapper.state_dict())
    mapper.load_state_dict(neck.state_dict())
    for sizes in (SIZES, [(1, 1)] * 3):
        inputs = make_maps(sizes, dtype=torch.float32)
        for out, expected in zip(neck(inputs), mapper(inputs), strict=True):
            assert torch.equal(out, expected) and out.stride() == expected.stride()


@pytest.mark.parametrize('fusion', FUSIONS)
@pytest.mark.parametrize('kind', NECKS)
def test_new_neck_equals_its_channel_mapper(kind, fusion):
    neck, mapper = build(kind, fusion=fusion), ChannelMapper(**MAPPER, bias=True)
    missing, unexpected = mapper.load_state_dict(neck.state_dict(), strict=False)
    assert not missing and all(name.startswith(('blocks.', 'fusions.')) for name in unexpected)
    inputs = make_maps(dtype=torch.float32)
    outs, expected = neck(inputs), mapper(inputs)
    assert len(outs) == 5 and all(torch.equal(*pair) for pair in zip(outs, expected, strict=True))
    # The layer scales have gradients from the first step.
    scales = {name: parameter for name, parameter in neck.named_parameters() if 'scale' in name}
    assert all(gradient.abs().sum() > 0 for gradient in gradients(outs, list(scales.values())))


def test_defaults():
    for neck in (PVTNeck([256, 512]), SwinNeck([256, 512])):
        convs = [conv.conv for conv in neck.convs]
        assert all(conv.kernel_size == (1, 1) and conv.out_channels == 256 and conv.bias is not None for conv in convs)
        assert all(conv.gn.num_groups == 32 and not conv.with_activation for conv in neck.convs)
        assert (
            neck.extra_convs is None
            and not neck.input_norms
            and not any(parameter.any() for name, parameter in neck.named_parameters() if 'scale' in name)
        )


@pytest.mark.parametrize('kind', NECKS)
def test_information_flows_from_coarse_to_fine(kind):
    """Map i depends on input i and coarser ones, extra levels only on the last input."""
    for fusion in FUSIONS:
        neck, inputs = build_nonzero(kind, fusion=fusion), make_maps()
        for i, out in enumerate(neck(inputs)):
            seen = torch.autograd.grad(out.pow(3).sum(), inputs, allow_unused=True, retain_graph=True)
            expected = range(i, 3 if fusion else i + 1) if i < 3 else [2]
            assert [level for level, gradient in enumerate(seen) if gradient is not None] == list(expected)


@pytest.mark.parametrize('kind', NECKS)
def test_add_upsamples_by_nearest_neighbor(kind):
    neck, inputs = build_nonzero(kind, depth=0, fusion='add'), make_maps()
    plain = ChannelMapper(**MAPPER, bias=True).double()
    plain.load_state_dict(neck.state_dict(), strict=False)
    fine, middle, coarse, *extra = plain(inputs)
    middle = middle + 0.5 * F.interpolate(coarse, size=middle.shape[2:], mode='nearest')
    fine = fine + 0.5 * F.interpolate(middle, size=fine.shape[2:], mode='nearest')
    torch.testing.assert_close(neck(inputs), (fine, middle, coarse, *extra), rtol=0, atol=1e-12)


@pytest.mark.parametrize('batch', [1, 2])
@pytest.mark.parametrize('sizes', [SIZES, [(1, 1)] * 3, [(7, 1), (4, 1), (2, 1)], [(9, 9), (3, 2), (6, 6)]], ids=str)
@pytest.mark.parametrize('fusion', ['add', 'cross_attention'])
@pytest.mark.parametrize('kind', NECKS)
def test_every_parameter_gets_a_gradient_at_any_size(kind, fusion, sizes, batch):
    neck, inputs = build_nonzero(kind, fusion=fusion, input_norm=True), make_maps(sizes, batch)
    outs = neck(inputs)
    extra = [tuple((side + 1) // 2 for side in sizes[-1])]
    extra.append(tuple((side + 1) // 2 for side in extra[0]))
    assert [out.shape for out in outs] == [(batch, 32, *size) for size in [*sizes, *extra]]
    names, parameters = zip(*neck.named_parameters(), strict=True)
    for name, gradient in zip(names, gradients(outs, parameters), strict=True):
        assert gradient.isfinite().all(), name
        # Attention to a single pixel depends neither on the query nor on the position.
        assert gradient.abs().sum() > 0 or (min(sizes)[0] == 1 and ('query_norm' in name or 'table' in name)), name


@pytest.mark.parametrize('kind', NECKS)
def test_batch_and_memory_layout_do_not_matter(kind):
    neck, inputs = build_nonzero(kind, fusion='cross_attention'), make_maps()
    expected = neck(inputs)
    strided = neck([torch.stack([x] * 2, -1)[..., 0] for x in inputs])
    channels_last = neck([x.contiguous(memory_format=torch.channels_last) for x in inputs])
    single = neck([x[1:] for x in inputs])
    for e, s, c, one in zip(expected, strided, channels_last, single, strict=True):
        torch.testing.assert_close(s, e, rtol=0, atol=1e-10)
        torch.testing.assert_close(c, e, rtol=0, atol=1e-10)
        torch.testing.assert_close(one, e[1:], rtol=0, atol=1e-10)


@pytest.mark.parametrize('kind', NECKS)
def test_input_norm(kind):
    neck, plain, inputs = build_nonzero(kind, input_norm=True), build_nonzero(kind), make_maps()
    plain.load_state_dict(neck.state_dict(), strict=False)
    normed = [
        F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), norm.weight, norm.bias, 1e-6).permute(0, 3, 1, 2)
        for x, norm in zip(inputs, neck.input_norms, strict=True)
    ]
    torch.testing.assert_close(neck(inputs), plain(normed), rtol=0, atol=1e-12)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('kind', NECKS)
def test_autocast(kind, dtype):
    neck = build_nonzero(kind, fusion='cross_attention').float()
    inputs = make_maps(dtype=torch.float32)
    exact = neck(inputs)
    with torch.autocast('cpu', dtype):
        outs = neck(inputs)
    assert all(gradient.isfinite().all() for gradient in gradients(outs, [*inputs, *neck.parameters()]))
    for out, expected in zip(outs, exact, strict=True):
        assert (out - expected).abs().mean() < 0.02 * expected.abs().mean()


@pytest.mark.parametrize('kind', NECKS)
def test_checkpointing_recomputes_with_equal_results(kind, monkeypatch):
    inputs = make_maps()
    plain = build_nonzero(kind).train()
    expected = gradients(plain(inputs), list(plain.parameters()))
    neck = build_nonzero(kind, with_cp=True).train()
    calls = []
    neck.blocks[0][0].register_forward_pre_hook(lambda *args: calls.append(args))
    torch.testing.assert_close(gradients(neck(inputs), list(neck.parameters())), expected, rtol=0, atol=1e-12)
    assert len(calls) == 2
    neck.eval()(inputs)
    assert len(calls) == 3


@pytest.mark.parametrize('kind', NECKS)
def test_compiles_to_one_graph(kind):
    neck = build_nonzero(kind, in_channels=CHANNELS[:2], num_outs=3, fusion='cross_attention').float()
    inputs = make_maps(dtype=torch.float32)[:2]
    expected = neck(inputs)
    outs = torch.compile(neck, fullgraph=True, backend='aot_eager')(inputs)
    torch.testing.assert_close(outs, expected, rtol=1e-4, atol=1e-4)
    leaves = [*inputs, *neck.parameters()]
    torch.testing.assert_close(gradients(outs, leaves), gradients(expected, leaves), rtol=1e-3, atol=1e-4)


def detector(kind, neck):
    """Config of a detector with a ResNet-18: a base config with another backbone and neck."""
    backbone = dict(type='mmdet.ResNet', depth=18, norm_cfg=dict(type='BN'))
    if kind == 'DeformableDETR':
        cfg = Config.fromfile(ROOT / 'configs/_base_/models/deformable-detr-two-stage_shunted-nano.py').model
        cfg.backbone = dict(backbone, out_indices=(1, 2, 3))
        cfg.neck.update(type=f'msda_plugin.{neck}', in_channels=[128, 256, 512], fusion='cross_attention')
        return cfg
    cfg = Config.fromfile(
        Path(mmdet.__file__).parent
        / '.mim/configs/_base_/models'
        / {'RetinaNet': 'retinanet_r50_fpn.py', 'MaskRCNN': 'mask-rcnn_r50_fpn.py'}[kind]
    ).model
    stages = (1, 2, 3) if kind == 'RetinaNet' else (0, 1, 2, 3)
    cfg.backbone = dict(backbone, out_indices=stages)
    cfg.neck = dict(type=f'msda_plugin.{neck}', in_channels=[64 * 2**i for i in stages], out_channels=256, num_outs=5)
    return cfg


@pytest.mark.parametrize('kind', ['RetinaNet', 'MaskRCNN', 'DeformableDETR'])
@pytest.mark.parametrize('neck', NECKS)
def test_detector_trains_and_predicts(neck, kind):
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MMDET_MODELS.build(detector(kind, neck))
    assert type(model.neck).__name__ == neck
    model.init_weights()
    meta = dict(img_shape=(64, 96), ori_shape=(64, 96), scale_factor=(1.0, 1.0))
    objects = InstanceData(
        bboxes=torch.tensor([[8.0, 12.0, 40.0, 60.0]]),
        labels=torch.tensor([1]),
        masks=BitmapMasks([np.ones((64, 96), np.uint8)], 64, 96),
    )
    batch = dict(
        inputs=[torch.randint(256, (3, 64, 96), dtype=torch.uint8)],
        data_samples=[DetDataSample(metainfo=meta, gt_instances=objects)],
    )
    reached = set()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in trained.items():
        parameter.register_hook(lambda gradient, name=name: reached.add(name) if gradient.isfinite().all() else None)
    log = model.train().train_step(batch, OptimWrapper(torch.optim.AdamW(model.parameters(), lr=1e-4)))
    assert log['loss'].isfinite()
    assert reached == trained.keys()
    with torch.inference_mode():
        found = model.eval().test_step(batch)[0].pred_instances
    assert found.bboxes.shape[1] == 4 and found.bboxes.isfinite().all()


@pytest.mark.parametrize('kind', NECKS)
@pytest.mark.parametrize(
    'fields, message',
    [
        (dict(in_channels=64), r'in_channels=64; expected the channels of each map of the backbone'),
        (dict(in_channels=[]), r'in_channels=\[\]; expected the channels'),
        (dict(num_outs=2), r'num_outs=2, but there are 3 in_channels \[24, 40, 64\]'),
        (dict(depth=-2), r'depth=-2; expected 0 \(no attention\) or more'),
        (dict(num_heads=5), 'out_channels=32, which is not a multiple of num_heads=5'),
        (
            dict(norm_cfg=dict(type='GN', num_groups=12)),
            'out_channels=32, .* not a multiple of the 12 groups of norm_cfg',
        ),
        (dict(fusion='sum'), "fusion='sum'; expected 'add', 'cross_attention' or None"),
        (dict(sr_ratios=[2, 1]), r'2 sr_ratios \[2, 1\]; expected one for each of the 3 in_channels'),
    ],
)
def test_bad_configs(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build(dict(MAPPER, type=f'msda_plugin.{kind}') | fields)


@pytest.mark.parametrize('kind', NECKS)
def test_maps_with_wrong_channels(kind):
    neck, inputs = build(kind), make_maps(dtype=torch.float32)
    with pytest.raises(ValueError, match=kind + r' got 2 maps of \(24, 40\) channels; expected 3 maps of in_channels='):
        neck(inputs[:2])
    with pytest.raises(ValueError, match=r'got 3 maps of \(24, 24, 64\) channels'):
        neck([inputs[0], *inputs[:1], inputs[2]])
