"""Recordings reproduce the layers' results, do not change them, and have the right locations in the image."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttention as MMCVLayer
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope

from msda_plugin.layers import DeformableDetrTransformerEncoder, MultiScaleDeformableAttention, ShuntedSelfAttention
from msda_plugin.layers.deformable_attention import DeformableAttention
from msda_plugin.layers.deformable_multi_head_attention import DeformableMultiHeadAttention
from msda_plugin.ops import ms_deform_attn_reference
from msda_plugin.registry import MODELS
from msda_plugin.visualization import record_attention
from msda_plugin.visualization.attention import ImageFrame, choose_layers

CONFIGS = Path(__file__).parents[2] / 'configs' / 'shapes'
OURS, STOCK = (
    CONFIGS / name
    for name in (
        'deformable-detr-two-stage_shunted-nano_1xb4-8e_shapes.py',
        'mmdet-deformable-detr-two-stage_r18_1xb4-4e_shapes.py',
    )
)
SHAPES = [(6, 9), (3, 5)]
NUM_KEYS = 54 + 15


def randomize(module, std=0.3):
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(std=std, generator=generator)
    return module.eval()


def make_sample(image=(80, 96), resized=(160, 192), padded=(192, 256), **fields):
    """Sizes are (h, w)."""
    scale = (resized[1] / image[1], resized[0] / image[0])
    return DetDataSample(
        metainfo=dict(ori_shape=image, img_shape=resized, batch_input_shape=padded, scale_factor=scale, **fields)
    )


# ---- recorded locations and weights reproduce the layer ------------------------------------------------------------
@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('batch_first', [False, True])
@pytest.mark.parametrize('coordinates', [2, 4])
@pytest.mark.parametrize('kind', [MultiScaleDeformableAttention, MMCVLayer])
def test_sampled_attention_reproduces_the_layer(kind, coordinates, batch_first, masked):
    layer = randomize(kind(32, num_heads=4, num_levels=2, num_points=3, batch_first=batch_first))
    torch.manual_seed(1)
    query, query_pos, value = torch.randn(2, 11, 32), torch.randn(2, 11, 32), torch.randn(2, NUM_KEYS, 32)
    mask = torch.rand(2, NUM_KEYS) < 0.2 if masked else None
    tensors = dict(query=query, query_pos=query_pos, value=value)
    if not batch_first:
        tensors = {name: tensor.transpose(0, 1) for name, tensor in tensors.items()}
    with record_attention(layer) as recording, torch.no_grad():
        output = layer(
            **tensors,
            key_padding_mask=mask,
            reference_points=torch.rand(2, 11, 2, coordinates),
            spatial_shapes=torch.tensor(SHAPES),
            level_start_index=torch.tensor([0, 54]),
        )
    (record,) = recording.records
    projected = layer.value_proj(value)
    if masked:
        projected = projected.masked_fill(mask[..., None], 0)
    sampled = ms_deform_attn_reference(projected.unflatten(-1, (4, -1)), SHAPES, None, record.locations, record.weights)
    expected = layer.output_proj(sampled) + query
    torch.testing.assert_close(output if batch_first else output.transpose(0, 1), expected, rtol=1e-5, atol=1e-5)
    assert not record.within_keys and record.spatial_shapes == tuple(SHAPES)


@pytest.mark.parametrize('references', ['default', 'given'])
def test_attention_on_one_scale_reproduces_the_layer(references):
    layer = randomize(DeformableAttention(32, num_heads=4, num_points=3))
    torch.manual_seed(1)
    x = torch.randn(2, 32, 6, 9)
    given = dict(reference_points=torch.rand(2, 54, 2)) if references == 'given' else {}
    with record_attention(layer) as recording, torch.no_grad():
        output = layer(x, **given)
    (record,) = recording.records
    tokens = x.flatten(2).transpose(1, 2)
    value = layer.value_proj(tokens).unflatten(-1, (4, -1))
    sampled = ms_deform_attn_reference(value, [(6, 9)], None, record.locations, record.weights)
    expected = (layer.output_proj(sampled) + tokens).transpose(1, 2).view_as(x)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert record.within_keys


@pytest.mark.parametrize('sr_ratio', [1, 2, 4])
def test_shunted_attention_reproduces_the_layer(sr_ratio):
    layer = randomize(ShuntedSelfAttention(32, num_heads=4, sr_ratio=sr_ratio), std=0.2)
    torch.manual_seed(1)
    x = torch.randn(2, 9 * 10, 32)
    with record_attention(layer) as recording, torch.no_grad():
        output = layer(x, (9, 10))
    (record,) = recording.records
    feature_map = x.transpose(1, 2).unflatten(2, (9, 10))
    if sr_ratio > 1:
        values = [branch(feature_map)[1] for branch in layer.branches]
    else:
        values = [layer.kv(x).chunk(2, -1)[1]]
        local = layer.local_enhancement(values[0].transpose(1, 2).unflatten(2, (9, 10))).flatten(2)
    for image, query in ((0, 0), (1, 57), (1, 89)):
        heads = [
            torch.einsum('hk,khd->hd', weights, value[image].unflatten(1, (len(weights), -1))).flatten()
            for weights, value in zip(record.attention(query, image), values, strict=True)
        ]
        attended = torch.cat(heads) + (local[image, :, query] if sr_ratio == 1 else 0)
        torch.testing.assert_close(layer.proj(attended), output[image, query], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('positional', ['none', 'rpe_table', 'log_cpb', 'fixed_pe'])
@pytest.mark.parametrize('version', ['v1', 'v2'])
def test_deformed_attention_reproduces_the_layer(version, positional):
    layer = randomize(
        DeformableMultiHeadAttention(
            32,
            num_heads=4,
            num_groups=2,
            map_size=(8, 10),
            kernel_size=3,
            stride=2,
            positional=positional,
            version=version,
        )
    )
    torch.manual_seed(1)
    x = torch.randn(2, 32, 8, 10)
    with record_attention(layer) as recording, torch.no_grad():
        output, points = layer(x, return_points=True)
    (record,) = recording.records
    torch.testing.assert_close(record.inputs.points.positions, points.positions)
    # The sampled values, by hand: bilinear, -1 and 1 at the centers of the border pixels.
    grid = points.positions.flatten(0, 1).flip(-1)
    sampled = torch.nn.functional.grid_sample(x.reshape(4, 16, 8, 10), grid, align_corners=True).reshape(2, 32, -1)
    value = layer.value(sampled.transpose(1, 2)).unflatten(2, (4, 8))
    for image, query in ((0, 0), (1, 47)):
        attended = torch.einsum('hk,khd->hd', record.attention(query, image), value[image]).flatten()
        torch.testing.assert_close(layer.proj(attended), output[image].flatten(1)[:, query], rtol=1e-4, atol=1e-5)


# ---- locations -------------------------------------------------------------------------------------------------------
def make_encoder():
    """One encoder layer, two levels of strides 8 and 16, one head; offsets and weights are the same for every query."""
    encoder = DeformableDetrTransformerEncoder(
        num_layers=1,
        layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=32, num_heads=1, num_levels=2, num_points=2, dropout=0.0, batch_first=True),
            ffn_cfg=dict(embed_dims=32, feedforward_channels=32),
        ),
    ).eval()
    attention = encoder.layers[0].self_attn
    # (x, y) in pixels of the level: level 0 (0, 0) and (3, -1), level 1 (0, 0) and (-2, 1.5)
    attention.sampling_offsets.weight.data.zero_()
    attention.sampling_offsets.bias.data = torch.tensor([0.0, 0, 3, -1, 0, 0, -2, 1.5])
    attention.attention_weights.weight.data.zero_()
    attention.attention_weights.bias.data = torch.tensor([0.4, 0.1, 0.2, 0.3]).log()
    return encoder


def run_encoder(encoder, valid_ratios):
    shapes, keys = ((24, 32), (12, 16)), 24 * 32 + 12 * 16
    with record_attention(encoder) as recording, torch.no_grad():
        encoder(torch.rand(1, keys, 32), torch.rand(1, keys, 32), None, shapes, torch.tensor([0, 768]), valid_ratios)
    return recording


def test_locations_of_known_offsets_in_a_resized_and_padded_image():
    recording = run_encoder(make_encoder(), torch.tensor([[192 / 256, 160 / 192]] * 2)[None])
    query = recording.at_point((34.9, 21), make_sample())
    (view,) = query.layers
    # The network sees twice the size: (69.8, 42) lies in column 8, row 5 of level 0, whose center is 68, 44 there.
    assert view.query == 'encoder query 168: level 0, row 5, column 8'
    np.testing.assert_allclose(view.at, (34, 22), atol=1e-4)
    # Offsets of 3, -1 pixels of stride 8, and of -2, 1.5 pixels of stride 16, halved.
    np.testing.assert_allclose(view.xy, [(34, 22), (46, 18), (34, 22), (18, 34)], atol=1e-4)
    np.testing.assert_allclose(view.weight, (0.4, 0.1, 0.2, 0.3), atol=1e-6)
    np.testing.assert_array_equal(view.level, (0, 0, 1, 1))
    assert view.level_names == ('level 0, 24×32', 'level 1, 12×16')


def test_points_outside_the_image_and_the_last_pixel():
    recording = run_encoder(make_encoder(), torch.tensor([[192 / 256, 160 / 192]] * 2)[None])
    (view,) = recording.at_point((95.9, 79.9), make_sample()).layers
    np.testing.assert_allclose(view.at, (94, 78), atol=1e-4)  # the last pixel that is not padding
    np.testing.assert_allclose(view.xy[1], (106, 74), atol=1e-4)


def test_without_valid_ratios_those_of_the_sample_are_used():
    layer = make_encoder().layers[0].self_attn
    reference_points = torch.tensor([0.25, 0.5]).expand(1, 1, 2, 2)
    with record_attention(layer) as recording, torch.no_grad():
        layer(
            torch.rand(1, 1, 32),
            value=torch.rand(1, 960, 32),
            reference_points=reference_points,
            spatial_shapes=((24, 32), (12, 16)),
        )
    view = recording.records[0].view(0, 0, ImageFrame.from_sample(make_sample()))
    np.testing.assert_allclose(view.at, (256 * 0.25 / 2, 192 * 0.5 / 2), atol=1e-4)
    np.testing.assert_allclose(view.xy[3], (32 - 2 * 16 / 2, 48 + 1.5 * 16 / 2), atol=1e-4)


def test_reference_boxes_in_pixels():
    layer = make_encoder().layers[0].self_attn
    ratios = torch.tensor([[192 / 256, 160 / 192]] * 2)[None]
    box = torch.tensor([0.5, 0.5, 0.25, 0.1])  # of the image
    with record_attention(layer) as recording, torch.no_grad():
        layer(
            torch.rand(1, 1, 32),
            value=torch.rand(1, 960, 32),
            valid_ratios=ratios,
            reference_points=(box * ratios.repeat(1, 1, 2))[:, None],
            spatial_shapes=((24, 32), (12, 16)),
        )
    view = recording.records[0].view(0, 0, ImageFrame.from_sample(make_sample()))
    np.testing.assert_allclose(view.box, (48 - 12, 40 - 4, 48 + 12, 40 + 4), atol=1e-4)
    # offset / num_points * wh / 2: 3, -1 -> 3 / 2 * 24 / 2, -1 / 2 * 8 / 2
    np.testing.assert_allclose(view.xy[1], (48 + 18, 40 - 2), atol=1e-4)


def test_cells_of_shunted_attention():
    layer = randomize(ShuntedSelfAttention(32, num_heads=4, sr_ratio=4))
    with record_attention(layer) as recording, torch.no_grad():
        layer(torch.rand(1, 24 * 32, 32), (24, 32))
    (view,) = recording.at_point((34.9, 21), make_sample()).layers  # tokens of 8x8 in the input, 4x4 in the image
    assert view.query == 'token 168: row 5, column 8 of 24×32'
    np.testing.assert_allclose(view.at, (34, 22))
    np.testing.assert_allclose(view.cells, [(16, 16), (8, 8)])
    assert view.level_names == ('4×4 merged, 6×8', '2×2 merged, 12×16')
    for head in range(4):
        of_head = view.head == head
        assert set(view.level[of_head]) == {head // 2}
        assert of_head.sum() == (6 * 8, 12 * 16)[head // 2]
        np.testing.assert_allclose(view.weight[of_head].sum(), 1, atol=1e-5)
    np.testing.assert_allclose(view.xy[:2], [(8, 8), (24, 8)])
    np.testing.assert_allclose(view.xy[-1], (31.5 * 4 - 2, 23.5 * 4 - 2))


def test_locations_of_deformed_points():
    layer = randomize(DeformableMultiHeadAttention(32, num_heads=4, num_groups=2, kernel_size=3, positional='none'))
    torch.nn.init.zeros_(layer.offset_proj.weight)  # points stay on the grid
    with record_attention(layer) as recording, torch.no_grad():
        layer(torch.rand(1, 32, 24, 32))
    (view,) = recording.at_point((34.9, 21), make_sample()).layers
    np.testing.assert_allclose(view.at, (34, 22))
    assert len(view.xy) == 4 * 24 * 32 and set(view.level[view.head == 2]) == {1}
    np.testing.assert_allclose(view.xy, view.origin)
    # The reference of v1 in column i is (2i + 1) / 32 - 1, and -1 and 1 are the centers 0.5 and 31.5 of 32 pixels.
    column, row = 5, 7
    expected = (((2 * column + 1) / 64 * 31 + 0.5) * 4, ((2 * row + 1) / 48 * 23 + 0.5) * 4)
    np.testing.assert_allclose(view.xy[row * 32 + column], expected, atol=1e-4)


def test_merging_averages_heads_with_the_same_location():
    layer = randomize(ShuntedSelfAttention(32, num_heads=4, sr_ratio=4))
    with record_attention(layer) as recording, torch.no_grad():
        layer(torch.rand(1, 24 * 32, 32), (24, 32))
    (view,) = recording.at_point((3, 3), make_sample()).layers
    merged = view.merged()
    assert len(merged.weight) == 6 * 8 + 12 * 16
    order = np.lexsort(merged.xy[merged.level == 0].T)
    expected = (view.weight[view.head == 0] + view.weight[view.head == 1]) / 2
    np.testing.assert_allclose(merged.weight[merged.level == 0][order], expected)


# ---- detectors -------------------------------------------------------------------------------------------------------
def build_detector(path):
    cfg = Config.fromfile(path)
    init_default_scope('mmdet')
    torch.manual_seed(1)
    model = MODELS.build(cfg.model)
    model.init_weights()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # so that all queries differ
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope='module', params=[OURS, STOCK], ids=['ours', 'mmdet'])
def run(request):
    """A model, its recording, its results with and without recording for a padded batch, and the decoder references."""
    model = build_detector(request.param)
    images = [
        torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(h))
        for h, w in ((96, 128), (64, 96))
    ]
    samples = [make_sample((h // 2, w // 2), (h, w), (96, 128)) for h, w in ((96, 128), (64, 96))]
    seen = {}
    handle = model.decoder.register_forward_hook(
        lambda module, args, kwargs, output: seen.update(start=kwargs['reference_points'], after=output[1]),
        with_kwargs=True,
    )

    def predict():
        with torch.no_grad():
            return model.test_step(dict(inputs=list(images), data_samples=[sample.clone() for sample in samples]))

    expected = predict()
    with record_attention(model) as recording:
        answers = predict()
    handle.remove()
    return model, recording, answers, expected, [seen['start'], *seen['after']]


def test_recording_changes_no_result_and_removes_its_hooks(run):
    model, _, answers, expected, _ = run
    for answer, other in zip(answers, expected, strict=True):
        assert torch.equal(answer.pred_instances.bboxes, other.pred_instances.bboxes)
        assert torch.equal(answer.pred_instances.scores, other.pred_instances.scores)
    assert not any(module._forward_hooks for module in model.modules())


def test_every_layer_is_recorded_in_order(run):
    model, recording, *_ = run
    names = [record.name for record in recording.records if record.name.split('.')[0] != 'backbone']
    assert names == [
        'encoder.layers.0.self_attn',
        'encoder.layers.1.self_attn',
        'decoder.layers.0.cross_attn',
        'decoder.layers.1.cross_attn',
    ]
    backbone = [record for record in recording.records if record.name.startswith('backbone.')]
    assert len(backbone) == (7 if hasattr(model.backbone, 'stages') else 0)
    assert not any(record.weights.requires_grad for record in recording.records if hasattr(record, 'weights'))


def test_query_of_a_detection(run):
    model, recording, answers, *_ = run
    for image, answer in enumerate(answers):
        boxes, size = recording.boxes[image].double(), torch.tensor([64.0, 48] if image == 0 else [48.0, 32]).repeat(2)
        found = set()
        for number in range(20):
            query = recording.query_of(number, answer, image)
            center, extent = boxes[query, :2], boxes[query, 2:]
            expected = torch.cat([center - extent / 2, center + extent / 2]).clamp(0, 1) * size
            torch.testing.assert_close(answer.pred_instances.bboxes[number].double(), expected, atol=1e-3, rtol=0)
            found.add(query)
        assert len(found) > 10


def test_decoder_views_have_the_refined_references(run):
    _, recording, answers, _, references = run
    for image, answer in enumerate(answers):
        view = recording.at_detection(0, answer, 'abcdef', image=image)
        query = recording.query_of(0, answer, image)
        decoder = [layer for layer in view.layers if layer.kind == 'decoder']
        size = np.array([(64, 48), (48, 32)][image])
        for layer, reference in zip(decoder, references[:2], strict=True):
            center, extent = np.split(reference[image, query].double().numpy(), 2)
            expected = np.concatenate([(center - extent / 2) * size, (center + extent / 2) * size])
            np.testing.assert_allclose(layer.box, expected, atol=1e-3)
            assert layer.query == f'decoder query {query}'
        np.testing.assert_allclose(view.box, answer.pred_instances.bboxes[0])


def test_backbone_and_encoder_use_the_center_of_a_detection(run):
    _, recording, answers, *_ = run
    view = recording.at_detection(1, answers[1], 'abcdef', image=1)
    center = (view.box[:2] + view.box[2:]) / 2
    for layer in view.layers:
        if layer.kind == 'encoder':  # the finest level has pixels of 4 in the original image
            assert np.abs(layer.at - center).max() <= 2 + 1e-6
    assert view.label.startswith('detection 1: ')


def test_bad_arguments_raise(run):
    model, recording, answers, *_ = run
    with pytest.raises(ValueError, match='64,10 is outside the image, which is 64x48'):
        recording.at_point((64, 10), answers[0])
    with pytest.raises(ValueError, match=r'detection 100 does not exist; expected 0 \(highest score\) to 99'):
        recording.at_detection(100, answers[0], 'abcdef')
    with pytest.raises(ValueError, match='no layer matches decoder.layers.7; the layers are .*decoder.layers.1'):
        recording.at_detection(0, answers[0], 'abcdef', ['decoder.layers.7'])
    with pytest.raises(ValueError, match='none of the chosen layers is in the backbone'):
        recording.at_point((1, 1), answers[0], ['decoder'])
    flipped = make_sample(flip=True, flip_direction='horizontal')
    with pytest.raises(ValueError, match='flipped the image .horizontal.*without RandomFlip'):
        recording.at_point((1, 1), flipped)
    with pytest.raises(ValueError, match='Linear has no attention layer that can be recorded; supported are Multi'):
        with record_attention(torch.nn.Linear(1, 1)):
            pass


def test_detections_need_a_decoder():
    recording = run_encoder(make_encoder(), torch.ones(1, 2, 2))
    with pytest.raises(ValueError, match='no decoder queries to show'):
        recording.query_of(0, make_sample())


def test_hooks_are_removed_when_the_model_fails():
    layer = MultiScaleDeformableAttention(32, num_heads=4)
    with pytest.raises(ValueError, match='reference_points is None'), record_attention(layer):
        layer(torch.rand(1, 1, 32))
    assert not layer._forward_hooks


def test_choose_layers_by_parts_of_their_names():
    names = [
        'backbone.stages.0.blocks.0.attn',
        'backbone.stages.0.blocks.1.attn',
        'backbone.stages.1.blocks.0.attn',
        'encoder.layers.0.self_attn',
        'encoder.layers.1.self_attn',
    ]
    assert choose_layers(names) == names[1:]
    assert choose_layers(names, ['all']) == names
    assert choose_layers(names, ['encoder', 'stages.1']) == names[2:]
    assert choose_layers(names, ['stages.*.blocks.0']) == [names[0], names[2]]
