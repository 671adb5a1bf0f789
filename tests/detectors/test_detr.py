"""DETR: equal to MMDetection's in weights, losses and predictions, and its additional options."""

import copy

import detector_cases
import pytest
import torch
from detector_cases import PADDED, WHOLE, assert_same, detr_config, losses_and_gradients, make_images, make_samples
from mmcv.cnn.bricks.transformer import MultiheadAttention
from mmengine.optim import OptimWrapper

from msda_plugin.layers import detr_layers
from msda_plugin.registry import MODELS


def build(**fields):
    return detector_cases.build(detr_config(**fields))


@pytest.mark.parametrize('shapes', [WHOLE, PADDED], ids=['unpadded', 'padded'])
@pytest.mark.parametrize('counts', [(3, 2), (0, 2), (0, 0)], ids=str)
def test_equals_mmdetection(shapes, counts):
    ours, theirs = build(), build(scope='mmdet')
    detector_cases.share_weights(ours, theirs)
    assert_same(ours, theirs, make_samples(shapes, counts))


def test_initial_weights_equal_mmdetections():
    ours, theirs = build().state_dict(), build(scope='mmdet').state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize('counts', [(2, 3), (0, 2), (0, 0)], ids=str)
def test_trains_and_predicts_with_and_without_objects(counts):
    model = build(data_preprocessor=dict(type='mmdet.DetDataPreprocessor', mean=[100] * 3, std=[50] * 3))
    optimizer = OptimWrapper(torch.optim.AdamW(model.parameters(), lr=1e-3))
    unreached = set(dict(model.named_parameters()))
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda gradient, name=name: unreached.discard(name))

    def batch():
        return dict(
            inputs=[torch.randint(256, (3, *shape), dtype=torch.uint8) for shape in PADDED],
            data_samples=make_samples(PADDED, counts),
        )

    log = model.train().train_step(batch(), optimizer)
    assert torch.isfinite(log['loss']) and not unreached
    assert [len(sample.pred_instances) for sample in model.eval().test_step(batch())] == [7, 7]


def test_tensor_mode_in_training_and_without_samples():
    model = build()
    with torch.no_grad():
        expected = model.eval()(make_images(), make_samples(), mode='tensor')
        torch.testing.assert_close(model(make_images(), mode='tensor'), expected)
        torch.testing.assert_close(model.train()(make_images(), make_samples(), mode='tensor'), expected)


def test_without_intermediate_outputs():
    config = detr_config()
    config['decoder']['return_intermediate'] = False
    with torch.no_grad():
        logits, boxes = detector_cases.build(config).eval()(make_images(), make_samples(), mode='tensor')
        expected = build().eval()(make_images(), make_samples(), mode='tensor')
    torch.testing.assert_close(logits, expected[0][-1:])
    torch.testing.assert_close(boxes, expected[1][-1:])


def test_attention_weights_are_not_computed(monkeypatch):
    asked = []
    forward = torch.nn.MultiheadAttention.forward
    monkeypatch.setattr(
        torch.nn.MultiheadAttention,
        'forward',
        lambda self, *args, **kwargs: (asked.append(kwargs['need_weights']), forward(self, *args, **kwargs))[1],
    )
    build().eval()(make_images(), make_samples(PADDED), mode='tensor')
    assert asked == [False] * (2 + 2 * 2)


@pytest.mark.parametrize('dropout', [0.0, 0.1])
def test_checkpointing_recomputes_with_equal_results(dropout, monkeypatch):
    samples = make_samples(PADDED)
    config = detr_config(dropout=dropout)
    parts = {part: config[part] | dict(num_cp=1) for part in ('encoder', 'decoder')}
    plain, model = build(dropout=dropout), build(dropout=dropout, **parts)
    torch.manual_seed(3)
    losses, gradients = losses_and_gradients(plain, samples)
    calls = []
    for part, name in (('encoder', 'DetrTransformerEncoderLayer'), ('decoder', 'DetrTransformerDecoderLayer')):
        layer = getattr(detr_layers, name)
        forward = layer.forward
        monkeypatch.setattr(
            layer,
            'forward',
            lambda self, part=part, forward=forward, **inputs: (calls.append(part), forward(self, **inputs))[1],
        )
    torch.manual_seed(3)
    checkpointed, checkpointed_gradients = losses_and_gradients(model, samples)
    assert sorted(calls) == ['decoder'] * 3 + ['encoder'] * 3  # two layers each, one of which runs twice
    torch.testing.assert_close(checkpointed, losses)
    torch.testing.assert_close(checkpointed_gradients, gradients)


@MODELS.register_module()
class CountingAttention(MultiheadAttention):
    calls = 0

    def forward(self, *args, **kwargs):
        CountingAttention.calls += 1
        return super().forward(*args, **kwargs)


def test_a_config_chooses_the_attention_by_name():
    config = detr_config()
    config['encoder']['layer_cfg']['self_attn_cfg']['type'] = 'msda_plugin.CountingAttention'
    config['encoder'] |= dict(type='msda_plugin.DetrTransformerEncoder')
    chosen, default = detector_cases.build(config), build()
    before = CountingAttention.calls
    with torch.no_grad():
        outputs = chosen.eval()(make_images(), make_samples(PADDED), mode='tensor')
        expected = default.eval()(make_images(), make_samples(PADDED), mode='tensor')
    assert CountingAttention.calls == before + 2
    torch.testing.assert_close(outputs, expected)


def test_a_config_can_be_built_twice():
    config = detr_config()
    before = copy.deepcopy(config)
    MODELS.build(config)
    MODELS.build(config)
    assert config == before


def test_transformer_does_not_synchronize():
    """Tensors on the meta device have no values, so reading one would fail."""
    model = build().to('meta').train()
    outputs = model.forward_transformer(model.extract_feat(make_images().to('meta')), make_samples(PADDED))
    assert outputs['hidden_states'].shape == (2, 2, 9, 32)


@pytest.mark.parametrize(
    'path, value, message',
    [
        ('encoder', None, r"DETR needs a config for each of .*missing: \['encoder'\]"),
        ('test_cfg.max_per_img', 10, 'max_per_img=10 asks for more boxes than .* num_queries=9 x 1 classes = 9'),
        ('positional_encoding.num_feats', 8, r"'encoder': 32.*'positional_encoding \(2 \* num_feats\)': 16"),
        ('neck.num_outs', 2, 'num_outs=2 maps, but DETR takes 1 map'),
        ('neck.out_channels', 64, r"'neck \(out_channels\)': 64"),
        ('neck.in_channels', [64], r'the backbone gives maps of \[32\] channels, but neck.in_channels is \[64\]'),
        ('backbone.num_outs', 2, r'the backbone gives maps of \[16, 32\] channels, but neck.in_channels is \[32\]'),
        ('neck', None, None),
        ('bbox_head.embed_dims', 64, "'bbox_head': 64"),
        ('encoder.num_cp', 3, 'num_cp=3 exceeds num_layers=2'),
        ('decoder.num_cp', 3, 'num_cp=3 exceeds num_layers=2'),
    ],
)
def test_parts_that_do_not_fit_are_refused_at_build_time(path, value, message):
    config = detr_config()
    *parents, name = path.split('.')
    part = config
    for parent in parents:
        part = part[parent]
    part[name] = value
    if message is None:  # the backbone's map is as wide as the transformer
        MODELS.build(config)
        return
    with pytest.raises(ValueError, match=message):
        MODELS.build(config)


def test_channels_of_the_backbone_without_a_neck():
    config = detr_config(dims=64)
    with pytest.raises(ValueError, match=r'the backbone gives maps of \[32\] channels, and there is no neck, but DETR'):
        MODELS.build(config | dict(neck=None))


def test_maps_that_do_not_fit_are_refused():
    model = build()
    (feat,) = model.extract_feat(make_images())
    with pytest.raises(ValueError, match=r'gave 2 maps of \[32, 32\] channels, but DETR takes 1 map of embed_dims=32'):
        model.forward_transformer((feat, feat), make_samples())
