"""RT-DETR against transformers' models with random weights, and its behavior in MMDetection."""

import copy

import pytest
import torch
from mmdet.structures import DetDataSample
from rtdetr_cases import build, samples
from torch import nn

from msda_plugin import accelerate
from msda_plugin.acceleration.convolutions import FoldedBatchNorm
from msda_plugin.convert import convert
from msda_plugin.heads.class_layers import adapt_class_layers
from msda_plugin.layers.denoising import ContrastiveDenoising
from msda_plugin.visualization import record_attention

SHAPE = (96, 160)
PER_LEVEL = 'msda_plugin.PointsPerLevelAttention'
KINDS = {'bottleneck': 50, 'basic': 18}


def objects(counts, num_classes=5):
    """Labels and boxes (cx, cy, w, h) of each image."""
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randint(0, num_classes, (count,), generator=generator),
            torch.rand(count, 4, generator=generator) * 0.4 + 0.1,
        )
        for count in counts
    ]


def randomize(model):
    """Random parameters, so that neither norms nor branches are close to constants."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            else:
                parameter.uniform_(0.5, 1.5) if name.endswith('weight') else parameter.uniform_(-0.1, 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith('running_var'):
                buffer.uniform_(0.5, 1.5)
            elif name.endswith('running_mean'):
                buffer.uniform_(-0.1, 0.1)
            elif name.startswith('model.backbone') and buffer.is_floating_point():  # of frozen norms
                buffer.uniform_(0.5, 1.5)
    return model


def transformers_model(version, layer_type, **fields):
    transformers = pytest.importorskip('transformers')
    sizes = [8, 16, 32, 64] if layer_type == 'basic' else [32, 64, 128, 256]
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=sizes,
        depths=[2, 2, 2, 2] if layer_type == 'basic' else [3, 4, 6, 3],
        layer_type=layer_type,
        out_features=['stage2', 'stage3', 'stage4'],
    )
    fields = (
        dict(
            backbone_config=backbone,
            encoder_in_channels=sizes[1:],
            encoder_hidden_dim=32,
            encoder_ffn_dim=64,
            encoder_attention_heads=4,
            hidden_expansion=0.5,
            d_model=32,
            decoder_in_channels=[32, 32, 32],
            decoder_ffn_dim=64,
            decoder_layers=2,
            decoder_attention_heads=4,
            num_queries=20,
            num_labels=5,
            num_denoising=8,
            attn_implementation='eager',
        )
        | fields
    )
    name = 'RTDetrV2' if version == 2 else 'RTDetr'
    config = getattr(transformers, f'{name}Config')(**fields)
    return randomize(getattr(transformers, f'{name}ForObjectDetection')(config)).double()


def assert_close(actual, expected, tolerance=1e-5):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * max(1e-3, expected.abs().max())


@pytest.mark.parametrize(
    ('version', 'layer_type', 'fields', 'ours'),
    [
        (1, 'basic', {}, {}),
        (1, 'bottleneck', dict(num_feature_levels=4), dict(num_feature_levels=4, levels=4)),
        (2, 'basic', dict(decoder_n_points=3), dict(num_points=3)),
        (2, 'basic', dict(decoder_method='discrete'), dict(method='discrete')),
    ],
)
def test_equals_transformers(version, layer_type, fields, ours):
    """Outputs, losses and gradients; transformers passes no gradient from a box to the next layer's, unlike authors."""
    stock = transformers_model(version, layer_type, **fields)
    conversion = convert(stock.state_dict(), 'rtdetr')
    assert conversion.taken.keys() | conversion.dropped.keys() == stock.state_dict().keys()
    cross_attn = {}
    if version == 2:
        cross_attn = dict(type=PER_LEVEL, num_levels=3) | ours
    levels = ours.get('levels', 3)
    model = build(KINDS[layer_type], frozen=True, cross_attn=cross_attn, num_feature_levels=levels).double()
    model.load_state_dict(conversion.state_dict)

    images = torch.randn(2, 3, *SHAPE, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        logits, boxes = model.eval()(images, mode='tensor')
        expected = stock.eval()(images)
    assert_close(logits[-1], expected.logits)
    assert_close(boxes[-1], expected.pred_boxes)

    # Norms in eval mode: transformers freezes those of the backbone only.
    targets = objects((3, 1))
    for module in (*model.train().modules(), *stock.train().modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    decode = model.decoder.forward
    model.decoder.forward = lambda **inputs: (lambda out: (out[0], [ref.detach() for ref in out[1]]))(decode(**inputs))
    torch.manual_seed(0)
    losses = model.loss(images, samples(targets, SHAPE))
    torch.manual_seed(0)
    outputs = stock(images, labels=[dict(class_labels=labels, boxes=boxes.double()) for labels, boxes in targets])
    assert_close(sum(losses.values()), outputs.loss.to(torch.float64))
    sum(losses.values()).backward()
    outputs.loss.backward()
    gradients = {name: p.grad for name, p in stock.named_parameters() if p.grad is not None}
    upstream = {}
    for key, name in conversion.taken.items():
        upstream.setdefault(name, []).append(key)
    compared = 0
    for name, parameter in model.named_parameters():
        keys = sorted(upstream[name], key=lambda key: 'qkv'.find(key.split('.')[-2][0]))
        if parameter.grad is not None and all(key in gradients for key in keys):
            assert_close(parameter.grad, torch.cat([gradients[key] for key in keys]), 1e-4)
            compared += 1
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert compared == len(trained)


def train_step(model, counts=(3, 1), shape=SHAPE, sizes=None):
    """Losses of a training step that reaches every trained parameter."""
    torch.manual_seed(0)
    losses = model.train().loss(torch.randn(len(counts), 3, *shape), samples(objects(counts), shape, sizes))
    model.zero_grad()
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    return losses


@pytest.mark.parametrize('counts', [(3, 0), (0, 0), (60, 70)])
def test_any_number_of_objects(counts):
    """No objects in an image or in the batch, more objects than queries, more than denoising queries."""
    losses = train_step(build(), counts)
    boxes = {name: float(loss) for name, loss in losses.items() if name.endswith(('bbox', 'iou'))}
    assert len(boxes) == 10 and all((value > 0) == any(counts) for value in boxes.values())
    assert all(loss > 0 for name, loss in losses.items() if name.endswith('cls'))


def test_sizes_that_no_stride_divides():
    model = build()
    train_step(model, shape=(75, 101))
    logits, boxes = model.eval()(torch.randn(1, 3, 75, 101), mode='tensor')
    assert logits.shape == (2, 1, 20, 5) and boxes.shape == (2, 1, 20, 4)


def test_padding_is_not_selected():
    """Queries come from the image, and boxes are relative to it."""
    model = randomize(build()).eval()
    image = torch.randn(1, 3, *SHAPE)
    image[..., 96:] = 0
    image[:, :, 64:] = 0
    [sample] = samples(objects((1,)), SHAPE, [(64, 96)])
    features = model.extract_feat(image)
    inputs, _ = model.pre_transformer(features, [sample])
    assert inputs['memory_mask'].sum() == sum(h * w for h, w in inputs['spatial_shapes']) - 126
    selected, _ = model.pre_decoder(**inputs)
    inputs['memory'] = inputs['memory'].masked_fill(inputs['memory_mask'][..., None], 1e3)
    assert torch.equal(model.pre_decoder(**inputs)[0]['query'], selected['query'])
    train_step(model, sizes=[(64, 96), SHAPE])
    results = model.eval().predict(image, [sample])
    assert len(results[0].pred_instances) == 20
    assert (results[0].pred_instances.bboxes <= torch.tensor([96, 64, 96, 64])).all()


def test_fuse_keeps_the_results():
    model = randomize(build()).eval()
    image = torch.randn(1, 3, *SHAPE)
    with torch.no_grad():
        expected = model(image, mode='tensor')
        fused = model.fuse()(image, mode='tensor')
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    for actual, other in zip(fused, expected, strict=True):
        assert_close(actual, other, 1e-4)


def test_evaluation_with_fewer_layers():
    model = randomize(build()).eval()
    image, [sample] = torch.randn(1, 3, *SHAPE), samples(objects((1,)), SHAPE)
    logits, boxes = model(image, mode='tensor')
    model.decoder.num_eval_layers = 1
    fewer = model(image, mode='tensor')
    assert torch.equal(fewer[0], logits[:1]) and torch.equal(fewer[1], boxes[:1])
    scores = model.predict(image, [sample])[0].pred_instances.scores
    assert torch.equal(scores, logits[0, 0].sigmoid().flatten().topk(20).values)
    assert 'd0.loss_cls' in train_step(model)  # training runs all layers


def test_learned_queries_and_no_denoising():
    model = build(learn_query_content=True)
    train_step(model)
    model = build()
    model.bbox_head.denoising = None
    assert not any('dn_' in name for name in train_step(model))


def test_non_maximum_suppression():
    model = randomize(build(test_cfg=dict(nms=dict(type='nms', iou_threshold=0.01)))).eval()
    for branch in model.bbox_head.reg_branches:  # equal boxes
        nn.init.zeros_(branch[-1].weight)
    with torch.no_grad():
        [result] = model.predict(torch.zeros(1, 3, *SHAPE), samples(objects((1,)), SHAPE))
    assert len(result.pred_instances) < 20


def test_checkpoint_of_another_number_of_classes():
    trained = build(num_classes=7).state_dict()
    model = build(num_classes=5)
    with pytest.raises(RuntimeError, match='trained with another number of classes'):
        model.load_state_dict(trained)
    state_dict = copy.copy(trained)
    adapted = adapt_class_layers(state_dict, model)
    assert adapted == {
        **{f'bbox_head.cls_branches.{i}': (7, 5) for i in range(3)},
        'bbox_head.denoising.label_embedding': (8, 6),
    }
    model.load_state_dict(state_dict)
    assert torch.equal(model.memory_trans_fc.weight, trained['memory_trans_fc.weight'])


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        (dict(neck=None), r"needs a config for each of .*; missing: \['neck'\]"),
        (dict(num_queries=0), 'num_queries is 0; expected at least 1'),
        (dict(num_feature_levels=2), 'num_feature_levels=2, but the neck gives 3 maps'),
        (dict(cross_attn=dict(num_levels=4)), r'cross_attn has num_levels=4, but num_feature_levels=3'),
        (dict(bbox_head=dict(embed_dims=64)), 'embed_dims are 64 in bbox_head and 32 in decoder'),
        (dict(test_cfg=dict(max_per_img=101)), r'max_per_img=101 asks for more boxes than there are'),
        (dict(neck=dict(in_channels=[16, 32, 65])), 'backbone gives maps of .* but neck.in_channels is'),
        (dict(backbone=dict(depth=20)), r'depth is 20; expected one of \[18, 34, 50, 101, 152\]'),
        (dict(dn_cfg=dict(num_denoising=0)), 'num_denoising=0, .*expected at least 1'),
        (dict(decoder=dict(num_eval_layers=3)), 'num_eval_layers=3; expected 1 to num_layers=2'),
        (dict(bbox_head=dict(loss_cls=dict(type='mmdet.CrossEntropyLoss'))), 'RTDETRHead needs a sigmoid loss'),
        (dict(bbox_head=dict(loss_bbox=dict(type='mmdet.SmoothL1Loss'))), 'RTDETRHead does not support this config'),
        (
            dict(cross_attn=dict(type='msda_plugin.PointsPerLevelAttention', num_points=[4, 4])),
            'expected at least 1 for',
        ),
        (dict(cross_attn=dict(type='msda_plugin.PointsPerLevelAttention', method='nearest')), "method is 'nearest'"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        build(**fields)


def test_labels_that_are_no_class():
    with pytest.raises(ValueError, match='the ground truth has labels from 0 to 4, but with num_classes=2'):
        train_step(build(num_classes=2))


def test_bad_images():
    model = build().eval()
    with pytest.raises(ValueError, match=r'num_queries=20 pixels are needed, but the maps .* have only 6: enlarge'):
        model(torch.zeros(1, 3, 16, 16), mode='tensor')
    with pytest.raises(ValueError, match=r'the neck gave 2 maps of \[32, 32\] channels'):
        model.pre_transformer([torch.zeros(1, 32, 4, 4), torch.zeros(1, 32, 2, 2)])


# ---- denoising ------------------------------------------------------------------------------------------------------
def test_denoising_queries():
    denoising = ContrastiveDenoising(5, 8, num_denoising=7, label_noise_ratio=0)
    labels, boxes = torch.tensor([[1, 3, 4], [2, 0, 0]]), torch.full((2, 3, 4), 0.4)
    queries = denoising(labels, boxes, [3, 1], num_queries=4)
    assert (queries.num_groups, queries.size, len(queries)) == (2, 3, 12)
    # Labels of positive and negative queries, with zero vectors as padding.
    table = denoising.label_embedding.weight
    assert torch.equal(queries.content[0], table[torch.tensor([1, 3, 4] * 4)])
    assert torch.equal(queries.content[1], table[torch.tensor([2, 5, 5] * 4)]) and not table[5].any()
    # A group sees itself and the matching queries, which see no group.
    sees = ~queries.attn_mask
    group = torch.arange(16) // 6
    assert torch.equal(sees[:12], (group[:12, None] == group) | (group == 2))
    assert torch.equal(sees[12:], (group == 2).expand(4, -1))
    predictions, targets = queries.positives([3, 1], 3)
    assert predictions.tolist() == [0, 1, 2, 6, 7, 8, 12, 18] and targets.tolist() == [0, 1, 2, 0, 1, 2, 3, 3]


def test_denoising_moves_corners():
    """Those of positive queries by less than half of the side, those of negative ones by up to twice as much."""
    torch.manual_seed(0)
    denoising = ContrastiveDenoising(5, 8, num_denoising=200, box_noise_scale=0.5)
    queries = denoising(torch.zeros(1, 1, dtype=torch.long), torch.tensor([[[0.5, 0.5, 0.2, 0.2]]]), [1], 1)
    center, size = queries.boxes.sigmoid().view(200, 2, 4).chunk(2, -1)
    shift = (torch.cat([center - size / 2, center + size / 2], -1) - torch.tensor([0.4, 0.4, 0.6, 0.6])).abs()
    positive, negative = shift.unbind(1)
    assert 0.045 < positive.max() < 0.0501 and 0.0499 < negative.min() and 0.095 < negative.max() < 0.1001


def test_denoising_replaces_labels():
    torch.manual_seed(0)
    denoising = ContrastiveDenoising(50, 1, num_denoising=1, label_noise_ratio=0.5, box_noise_scale=0)
    denoising.label_embedding.weight.data[:, 0] = torch.arange(51)
    queries = denoising(torch.full((1, 1000), 7), torch.full((1, 1000, 4), 0.4), [1000], 1)
    assert 0.7 < (queries.content == 7).float().mean() < 0.8  # a quarter is drawn again
    assert torch.allclose(queries.boxes.sigmoid(), torch.tensor(0.4))


@pytest.mark.parametrize('cross_attn', [{}, dict(type=PER_LEVEL, num_points=[2, 1, 3])])
def test_attention_is_recorded(cross_attn):
    """What `visualize` draws: the points that the query of a detection samples."""
    model = randomize(build(cross_attn=cross_attn)).eval()
    with record_attention(model) as recording, torch.no_grad():
        [sample] = model.predict(torch.randn(1, 3, *SHAPE), samples(objects((1,)), SHAPE))
    view = recording.at_detection(0, sample, [str(i) for i in range(5)])
    assert [layer.kind for layer in view.layers] == ['decoder', 'decoder']
    for layer in view.layers:
        assert layer.box is not None and abs(layer.weight.sum() - 4) < 1e-4  # one for each head


def test_accelerate_for_inference_folds_the_batch_norms():
    model = randomize(build()).eval()
    image = torch.randn(1, 3, *SHAPE)
    with torch.no_grad():
        expected = model(image, mode='tensor')
        accelerate(model, inference=True)
        norms = [norm for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)]
        assert norms and all(isinstance(norm, FoldedBatchNorm) for norm in norms)
        for actual, other in zip(model(image, mode='tensor'), expected, strict=True):
            assert_close(actual, other, 1e-4)


def test_works_as_a_head_of_deformable_detr():
    """The neck and the head in another detector."""
    from msda_plugin.registry import MODELS

    attention = dict(embed_dims=32, num_heads=4, dropout=0.0, batch_first=True)
    ffn = dict(embed_dims=32, feedforward_channels=64)
    model = MODELS.build(
        dict(
            type='msda_plugin.DeformableDETR',
            num_queries=20,
            num_feature_levels=3,
            with_box_refine=True,
            as_two_stage=True,
            backbone=dict(type='msda_plugin.ResNetVD', depth=18, base_channels=8, out_indices=(1, 2, 3)),
            neck=dict(type='msda_plugin.HybridEncoder', in_channels=[16, 32, 64], out_channels=32, num_heads=4),
            encoder=dict(num_layers=1, layer_cfg=dict(self_attn_cfg=attention, ffn_cfg=ffn)),
            decoder=dict(num_layers=2, layer_cfg=dict(self_attn_cfg=attention, cross_attn_cfg=attention, ffn_cfg=ffn)),
            positional_encoding=dict(num_feats=16, normalize=True),
            bbox_head=dict(type='msda_plugin.RTDETRHead', num_classes=5, embed_dims=32),
            test_cfg=dict(max_per_img=20),
        )
    )
    assert 'enc_loss_cls' in model.loss(torch.randn(2, 3, *SHAPE), samples(objects((3, 1)), SHAPE))
    results = model.eval().predict(torch.randn(1, 3, *SHAPE), samples(objects((1,)), SHAPE))
    assert isinstance(results[0], DetDataSample) and len(results[0].pred_instances) == 20
