"""DeformableDETR: equal to MMDetection's in weights, losses and predictions, and its additional options."""

import copy

import detector_cases
import pytest
import torch
from detector_cases import PADDED, WHOLE, assert_same, losses_and_gradients, make_images, make_samples, share_weights
from detector_cases import deformable_detr_config as make_config
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttention as MMCVLayer
from mmengine.optim import OptimWrapper

from msda_plugin.layers import MultiScaleDeformableAttention, deformable_detr_layers
from msda_plugin.layers import multi_scale_deformable_attention as attention_module
from msda_plugin.registry import MODELS

FORMS = {
    'base': {},
    'refine': dict(with_box_refine=True),
    'two_stage': dict(with_box_refine=True, as_two_stage=True, dims=256),
    'two_stage_shared': dict(as_two_stage=True, dims=256),
    'single_scale': dict(num_feature_levels=1),
}


def build(**fields):
    return detector_cases.build(make_config(**fields))


def build_pair(form):
    """msda_plugin's and MMDetection's detector with the same weights."""
    ours, theirs = build(**FORMS[form]), build(scope='mmdet', **FORMS[form])
    share_weights(ours, theirs)
    return ours, theirs


@pytest.mark.parametrize('shapes', [WHOLE, PADDED], ids=['unpadded', 'padded'])
@pytest.mark.parametrize('form', FORMS)
def test_equals_mmdetection(form, shapes):
    assert_same(*build_pair(form), make_samples(shapes))


@pytest.mark.parametrize('form', FORMS)
def test_initial_weights_equal_mmdetections(form):
    ours, theirs = build(**FORMS[form]).state_dict(), build(scope='mmdet', **FORMS[form]).state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_dropout_draws_the_same_random_numbers():
    losses = []
    for scope in ('msda_plugin', 'mmdet'):
        model = build(scope=scope, dropout=0.1).train()
        torch.manual_seed(4)
        losses.append(sum(loss.sum() for loss in model.loss(make_images(), make_samples()).values()))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('counts', [(2, 3), (0, 2), (0, 0)], ids=str)
@pytest.mark.parametrize('form', FORMS)
def test_trains_and_predicts_with_and_without_objects(form, counts):
    """A training step on images of two sizes. Every parameter gets a gradient, as distributed training requires."""
    model = build(data_preprocessor=dict(type='mmdet.DetDataPreprocessor', mean=[100] * 3, std=[50] * 3), **FORMS[form])
    optimizer = OptimWrapper(torch.optim.AdamW(model.parameters(), lr=1e-3))
    before = copy.deepcopy(model.state_dict())
    gradients = {}
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda gradient, name=name: gradients.__setitem__(name, gradient))

    def batch():
        return dict(
            inputs=[torch.randint(256, (3, *shape), dtype=torch.uint8) for shape in PADDED],
            data_samples=make_samples(PADDED, counts),
        )

    log = model.train().train_step(batch(), optimizer)
    assert torch.isfinite(log['loss']) and gradients.keys() == dict(model.named_parameters()).keys()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    predictions = model.eval().test_step(batch())
    assert [len(sample.pred_instances) for sample in predictions] == [20, 20]
    for sample, (height, width) in zip(predictions, PADDED, strict=True):
        boxes = sample.pred_instances.bboxes
        assert boxes.min() >= 0 and boxes[:, 0::2].max() <= width and boxes[:, 1::2].max() <= height


@pytest.mark.parametrize('dilated', [False, True], ids=['stride 32', 'DC5'])
def test_single_scale_on_a_resnet(dilated):
    """DC5: the last stage is dilated instead of strided, which doubles the size of its map."""
    strides = dict(strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2)) if dilated else {}
    config = make_config(
        num_feature_levels=1,
        backbone=dict(type='mmdet.ResNet', depth=50, stem_channels=4, base_channels=2, out_indices=(3,), **strides),
    )
    config['neck']['in_channels'] = [64]
    model = detector_cases.build(config).train()
    assert [tuple(feat.shape[2:]) for feat in model.extract_feat(make_images())] == [(4, 6) if dilated else (2, 3)]
    optimizer = OptimWrapper(torch.optim.AdamW(model.parameters(), lr=1e-3))
    losses = []
    for _ in range(8):
        loss = sum(model.loss(make_images(), make_samples(PADDED)).values())
        optimizer.update_params(loss)
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert [len(sample.pred_instances) for sample in model.eval()(make_images(), make_samples(PADDED), 'predict')] == [
        20,
        20,
    ]


def test_two_stage_with_64_channels():
    model = build(with_box_refine=True, as_two_stage=True, dims=64)
    sum(model.train().loss(make_images(), make_samples()).values()).backward()
    assert model.pos_trans_fc.weight.grad.abs().sum() > 0


@pytest.mark.parametrize('form', ['base', 'two_stage'])
def test_tensor_mode_in_training_and_without_samples(form):
    model = build(**FORMS[form])
    with torch.no_grad():
        expected = model.eval()(make_images(), make_samples(), mode='tensor')
        torch.testing.assert_close(model(make_images(), mode='tensor'), expected)
        torch.testing.assert_close(model.train()(make_images(), make_samples(), mode='tensor'), expected)


def test_checkpointing_recomputes_with_equal_results(monkeypatch):
    samples = make_samples(PADDED)
    losses, gradients = losses_and_gradients(build(with_box_refine=True), samples)
    config = make_config(with_box_refine=True)
    parts = {part: config[part] | dict(num_cp=1) for part in ('encoder', 'decoder')}
    calls = []
    for part, name in (
        ('encoder', 'DeformableDetrTransformerEncoderLayer'),
        ('decoder', 'DeformableDetrTransformerDecoderLayer'),
    ):
        layer = getattr(deformable_detr_layers, name)
        forward = layer.forward
        monkeypatch.setattr(
            layer,
            'forward',
            lambda self, part=part, forward=forward, **inputs: (calls.append(part), forward(self, **inputs))[1],
        )
    model = build(with_box_refine=True, **parts)
    checkpointed, checkpointed_gradients = losses_and_gradients(model, samples)
    assert sorted(calls) == ['decoder'] * 3 + ['encoder'] * 3  # two layers each, one of which runs twice
    torch.testing.assert_close(checkpointed, losses)
    torch.testing.assert_close(checkpointed_gradients, gradients)


@MODELS.register_module()
class CountingDeformableAttention(MultiScaleDeformableAttention):
    calls = 0

    def forward(self, *args, **kwargs):
        CountingDeformableAttention.calls += 1
        return super().forward(*args, **kwargs)


def test_a_config_chooses_the_attention():
    config = make_config()
    config['encoder']['layer_cfg']['self_attn_cfg']['type'] = 'msda_plugin.CountingDeformableAttention'
    config['decoder']['layer_cfg']['cross_attn_cfg']['type'] = MMCVLayer  # accepts shapes only as tensors
    chosen, default = MODELS.build(config), build()
    chosen.load_state_dict(default.state_dict())
    with torch.no_grad():
        outputs = chosen.eval()(make_images(), make_samples(PADDED), mode='tensor')
        expected = default.eval()(make_images(), make_samples(PADDED), mode='tensor')
    assert CountingDeformableAttention.calls == 2
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)
    kinds = {type(module) for module in default.modules() if isinstance(module, MMCVLayer)}
    assert kinds == {MultiScaleDeformableAttention}


def test_a_config_chooses_encoder_and_positional_encoding_by_name():
    config = make_config(positional_encoding=dict(type='mmdet.SinePositionalEncoding', num_feats=16, normalize=True))
    config['encoder']['type'] = 'msda_plugin.DeformableDetrTransformerEncoder'
    config['encoder']['layer_cfg']['type'] = 'msda_plugin.DeformableDetrTransformerEncoderLayer'
    assert MODELS.build(config).state_dict().keys() == build().state_dict().keys()


def test_a_config_can_be_built_twice():
    config = make_config()
    before = copy.deepcopy(config)
    MODELS.build(config)
    MODELS.build(config)
    assert config == before


def test_num_levels_defaults_to_num_feature_levels():
    config = make_config(num_feature_levels=1)
    for part, name in (('encoder', 'self_attn_cfg'), ('decoder', 'cross_attn_cfg')):
        del config[part]['layer_cfg'][name]['num_levels']
    model = MODELS.build(config)
    assert {module.num_levels for module in model.modules() if isinstance(module, MMCVLayer)} == {1}


@pytest.mark.parametrize('form', FORMS)
def test_transformer_does_not_synchronize(form, monkeypatch):
    """Tensors on the meta device have no values, so reading one would fail."""
    monkeypatch.setattr(
        attention_module,
        'ms_deform_attn_fused',
        lambda value, shapes, starts, points, offsets, logits: offsets.new_empty(
            *offsets.shape[:2], value.shape[2] * value.shape[3]
        ),
    )
    model = build(**FORMS[form]).to('meta').train()
    feats = model.extract_feat(make_images().to('meta'))
    outputs = model.forward_transformer(feats, make_samples(PADDED))
    assert outputs['hidden_states'].shape[:3] == (2, 2, 9)


@pytest.mark.parametrize(
    'changes, message',
    [
        (
            dict(test_cfg=dict(max_per_img=28)),
            'max_per_img=28 asks for more boxes than .* num_queries=9 x 3 classes = 27',
        ),
        (dict(encoder=None), r"missing: \['encoder'\]"),
        (dict(positional_encoding=dict(num_feats=8)), r"'encoder': 32.*'positional_encoding \(2 \* num_feats\)': 16"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


@pytest.mark.parametrize(
    'path, value, message',
    [
        ('neck.num_outs', 3, 'num_outs=3 maps, but num_feature_levels=4'),
        ('neck.num_outs', None, 'num_outs=3 maps, but num_feature_levels=4'),
        ('neck.out_channels', 64, r"'neck \(out_channels\)': 64"),
        (
            'neck.in_channels',
            [8, 16, 64],
            r'the backbone gives maps of \[8, 16, 32\] channels, but neck.in_channels is',
        ),
        (
            'backbone.num_outs',
            2,
            r'the backbone gives maps of \[16, 32\] channels, but neck.in_channels is \[8, 16, 32\]',
        ),
        ('bbox_head.embed_dims', 64, "'bbox_head': 64"),
        ('encoder.layer_cfg.self_attn_cfg.num_levels', 3, 'encoder.layers.0.self_attn has num_levels=3'),
        ('encoder.num_cp', 3, 'num_cp=3 exceeds num_layers=2'),
        ('decoder.num_cp', 3, 'num_cp=3 exceeds num_layers=2'),
        ('decoder.post_norm_cfg', dict(type='LN'), 'no norm after the last layer'),
    ],
)
def test_parts_that_do_not_fit_are_refused_at_build_time(path, value, message):
    config = make_config()
    *parents, name = path.split('.')
    part = config
    for parent in parents:
        part = part[parent]
    part[name] = value
    with pytest.raises(ValueError, match=message):
        MODELS.build(config)


def test_maps_that_do_not_fit_are_refused():
    model = build()
    feats = model.extract_feat(make_images())
    with pytest.raises(ValueError, match='gave 3 maps of .* num_feature_levels=4 maps of embed_dims=32'):
        model.forward_transformer(feats[:3], make_samples())
    with pytest.raises(ValueError, match=r'gave 4 maps of \[16, 32, 32, 32\] channels'):
        model.forward_transformer((feats[0][:, :16], *feats[1:]), make_samples())


def test_more_queries_than_proposals_are_refused():
    model = build(as_two_stage=True, num_queries=131, test_cfg=dict(max_per_img=20))
    with pytest.raises(ValueError, match='num_queries=131 proposals .* only 128 pixels'):
        model(make_images(), make_samples(), mode='tensor')


def test_predicts_without_test_cfg():
    predictions = build(test_cfg=None).eval()(make_images(), make_samples(), mode='predict')
    assert [len(sample.pred_instances) for sample in predictions] == [9, 9]
