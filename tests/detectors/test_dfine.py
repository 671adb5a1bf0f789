"""D-FINE against the authors' code and transformers' model, and as a detector of MMDetection."""

import copy
import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from msda_plugin import accelerate
from msda_plugin.convert import convert
from msda_plugin.heads.box_ops import box_cxcywh_to_xyxy
from msda_plugin.heads.class_layers import adapt_class_layers
from msda_plugin.heads.dfine_head import move_edges

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / 'tests' / 'golden'
sys.path.insert(0, str(GOLDEN))
import make_dfine  # noqa: E402
import recipe  # noqa: E402

CONFIGS = {path.stem.split('-')[1].split('_')[0]: path for path in (ROOT / 'configs' / 'dfine').glob('*.py')}
STATE_DICTS = json.loads(gzip.decompress((GOLDEN / 'dfine_state_dicts.json.gz').read_bytes()))
CLASSES, QUERIES, SIDE = make_dfine.NUM_CLASSES, make_dfine.NUM_QUERIES, make_dfine.IMAGE


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmdet')


def config(size, num_classes=CLASSES, num_queries=QUERIES, **changes):
    cfg = Config.fromfile(str(CONFIGS[size])).model.to_dict()
    del cfg['backbone']['init_cfg']
    cfg['bbox_head']['num_classes'] = num_classes
    cfg['data_preprocessor']['batch_augments'] = None
    return cfg | dict(num_queries=num_queries, test_cfg=dict(max_per_img=num_queries)) | changes


def small(num_levels=3, **changes):
    """A D-FINE of 0.2 M parameters."""
    cfg = config('n')
    cfg['backbone'] |= dict(
        arch=dict(stem=(4, 4), inner=(4, 4, 8, 8), channels=(8, 16, 24, 32), blocks=(1, 1, 1, 1), layers=2),
        out_indices=(1, 2, 3)[-num_levels:],
    )
    cfg['neck'] |= dict(in_channels=(16, 24, 32)[-num_levels:], out_channels=32, num_heads=4, feedforward_channels=32)
    cfg['decoder'] |= dict(embed_dims=32, num_heads=4, feedforward_channels=32, num_points=(3, 6, 3)[-num_levels:])
    cfg['bbox_head'] |= dict(embed_dims=32)
    return cfg | changes


def build(cfg):
    torch.manual_seed(0)
    model = MODELS.build(cfg)
    model.init_weights()
    return model


def with_authors_weights(size, **changes):
    """A model with the weights of the golden file, and the conversion."""
    upstream = {}
    for key, shape in STATE_DICTS[size].items():
        # The golden models have fewer classes.
        if key.endswith(('score_head.weight', 'score_head.bias')) or '.dec_score_head.' in key:
            shape = [CLASSES, *shape[1:]]
        if key.endswith('denoising_class_embed.weight'):
            shape = [CLASSES + 1, *shape[1:]]
        value = torch.zeros(shape, dtype=torch.long if key.endswith('num_batches_tracked') else None)
        if key.endswith(('.up', 'reg_scale')):
            value += 0.5 if key.endswith('.up') else 4.0
        upstream[key] = value if make_dfine.kept(key) else recipe.parameter(key, value)
    conversion = convert(upstream, 'dfine')
    model = build(config(size, **changes))
    missing, unexpected = model.load_state_dict(conversion.state_dict, strict=False)
    assert not [key for key in missing if not key.endswith('num_batches_tracked')]
    # Without denoising queries, their embedding has no place.
    assert not [key for key in unexpected if 'denoising' not in key]
    return model, conversion


def samples(shapes=((SIDE, SIDE), (SIDE, SIDE)), num_objects=(5, 3), batch_shape=None):
    batch_shape = batch_shape or tuple(max(sides) for sides in zip(*shapes, strict=True))
    out = []
    for shape, target, count in zip(shapes, make_dfine.targets(), num_objects, strict=True):
        scale = torch.tensor([shape[1], shape[0]] * 2)
        meta = dict(img_shape=shape, ori_shape=shape, batch_input_shape=batch_shape, scale_factor=(1.0, 1.0))
        objects = InstanceData(
            bboxes=box_cxcywh_to_xyxy(target['boxes'][:count]) * scale, labels=target['labels'][:count]
        )
        out.append(DetDataSample(metainfo=meta, gt_instances=objects))
    return out


@pytest.mark.parametrize('size', ['n', 's', pytest.param('l', marks=pytest.mark.slow)])
def test_outputs_are_those_of_the_authors(size):
    golden = np.load(GOLDEN / 'dfine.npz')
    model, _ = with_authors_weights(size)
    with torch.no_grad():
        logits, boxes = model.eval().double()(recipe.tensor('image', (2, 3, SIDE, SIDE)).double(), mode='tensor')
    for out, name in ((logits, 'logits'), (boxes, 'boxes')):
        expected = torch.from_numpy(golden[f'{size}_{name}'])
        assert (out[-1] - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_training_step_is_that_of_the_authors():
    golden = np.load(GOLDEN / 'dfine.npz')
    model, conversion = with_authors_weights('n', dn_cfg=None)
    losses = model.train()(recipe.tensor('image', (2, 3, SIDE, SIDE)), samples(), mode='loss')
    assert sum(losses.values()).item() == pytest.approx(
        sum(float(golden[key]) for key in golden if key.startswith('step_loss_')), rel=1e-5
    )
    sum(losses.values()).backward()
    gradients = {name: p.grad.abs().sum() for name, p in model.named_parameters()}
    upstream = sorted(key for key, new in conversion.taken.items() if new in gradients)
    ours = torch.stack([gradients[conversion.taken[key]] for key in upstream])
    expected = torch.from_numpy(golden['step_gradients'])
    assert ours.shape == expected.shape
    assert ((ours - expected).abs() <= 1e-4 * expected + 1e-6 * expected.max()).all()


@pytest.mark.parametrize('padded', [False, True])
def test_trains_and_predicts(padded):
    shapes = ((96, 128), (70, 100)) if padded else ((96, 128), (96, 128))
    model = build(small()).train()
    losses = model(torch.rand(2, 3, 96, 128), samples(shapes), mode='loss')
    assert {name.rpartition('loss_')[2] for name in losses} == {'cls', 'bbox', 'iou', 'fgl', 'ddf'}
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    for result, (height, width) in zip(
        model.eval().predict(torch.rand(2, 3, 96, 128), samples(shapes)), shapes, strict=True
    ):
        boxes = result.pred_instances.bboxes
        assert boxes.shape == (QUERIES, 4) and boxes.min() >= 0
        assert boxes[:, 0::2].max() <= width and boxes[:, 1::2].max() <= height


@pytest.mark.parametrize('counts', [(0, 0), (3, 0), (60, 120)])
def test_any_number_of_objects(counts):
    """No objects in an image or in the batch; more than queries, and than denoising queries."""
    model = build(small()).train()
    objects = []
    for sample, count in zip(samples(((64, 96),) * 2), counts, strict=True):
        corners = torch.rand(count, 2, 2).sort(1).values.flatten(1) * torch.tensor([96, 64, 96, 64])
        sample.gt_instances = InstanceData(bboxes=corners, labels=torch.arange(count) % CLASSES)
        objects.append(sample)
    losses = model(torch.rand(2, 3, 64, 96), objects, mode='loss')
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_any_size_of_images():
    model = build(small(num_queries=5, test_cfg=dict(max_per_img=5))).eval()
    with torch.no_grad():
        logits, boxes = model(torch.rand(1, 3, 75, 101), mode='tensor')
    assert logits.shape == (1, 1, 5, CLASSES) and boxes.shape == (1, 1, 5, 4)


def test_fused_model_predicts_the_same_with_less():
    model, _ = with_authors_weights('n')
    model.eval()
    image = recipe.tensor('image', (2, 3, SIDE, SIDE))
    with torch.no_grad():
        expected = model(image, mode='tensor')
        before = sum(p.numel() for p in model.parameters())
        outs = model.fuse()(image, mode='tensor')
    for out, wanted in zip(outs, expected, strict=True):
        assert (out - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert sum(p.numel() for p in model.parameters()) < before
    assert not [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]


def test_layers_after_the_evaluated_one_are_auxiliary():
    cfg = small()
    cfg['decoder']['eval_layer'] = 1
    model = build(cfg).eval()
    with torch.no_grad():
        expected = model(torch.rand(1, 3, 64, 96), mode='tensor')
        calls = []
        model.decoder.layers[2].register_forward_hook(lambda *_: calls.append(1))
        torch.manual_seed(0)
        fused = copy.deepcopy(model).fuse()
    assert not calls and len(expected[0]) == 1
    assert len(fused.decoder.layers) == 2
    losses = model.train()(torch.rand(2, 3, 64, 96), samples(((64, 96),) * 2), mode='loss')
    assert calls and 'd1.loss_fgl' in losses


@pytest.mark.parametrize('size, millions', [('n', 3.78), ('s', 10.32), ('m', 19.59), ('l', 31.29), ('x', 62.72)])
def test_sizes_are_the_published_ones(size, millions):
    with torch.device('meta'):
        model = MODELS.build(config(size, 80, 300))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda cfg: cfg['decoder'].update(num_points=(4, 4)), 'num_points of the decoder has 2 values, but the neck'),
        (lambda cfg: cfg['decoder'].update(num_points=4), 'num_points=4; expected a list with one value per level'),
        (lambda cfg: cfg['bbox_head'].update(embed_dims=16), 'embed_dims are 16 in bbox_head and 32 in decoder'),
        (lambda cfg: cfg['decoder'].update(num_layers=0), 'decoder.num_layers is 0; expected at least 1'),
        (lambda cfg: cfg['decoder'].update(num_heads=5), 'embed_dims=32 is not a multiple of num_heads=5'),
        (lambda cfg: cfg['decoder'].update(eval_layer=3), 'eval_layer=3 is out of range for num_layers=3'),
        (lambda cfg: cfg['neck'].update(in_channels=(16, 24, 30)), 'neck.in_channels is'),
        (lambda cfg: cfg.pop('neck'), 'DFINE needs a config for each of'),
        (lambda cfg: cfg['backbone'].update(arch='B9'), "unknown arch 'B9'"),
        (lambda cfg: cfg.update(test_cfg=dict(max_per_img=QUERIES * CLASSES + 1)), 'max_per_img'),
    ],
)
def test_parts_that_do_not_fit_are_one_clear_error(change, message):
    cfg = small()
    change(cfg)
    with pytest.raises(ValueError, match=message):
        build(cfg)


def test_levels_beyond_those_of_the_neck():
    cfg = small()
    cfg['decoder'].update(num_points=(3, 6, 3, 2))
    model = build(cfg).train()
    losses = model(torch.rand(2, 3, 96, 128), samples(((96, 128),) * 2), mode='loss')
    sum(losses.values()).backward()
    assert model.input_proj[3].conv.weight.grad.abs().sum() > 0


def test_too_few_pixels_for_the_queries():
    model = build(small(num_levels=2)).eval()
    with pytest.raises(ValueError, match='num_queries=20 pixels are needed'):
        model(torch.rand(1, 3, 32, 32), mode='tensor')


def test_fine_tuning_on_another_number_of_classes():
    source = build(small())
    cfg = small()
    cfg['bbox_head']['num_classes'] = 3
    cfg['test_cfg'] = dict(max_per_img=10)
    model = build(cfg)
    checkpoint = source.state_dict()
    with pytest.raises(RuntimeError, match='another number of classes'):
        model.load_state_dict(checkpoint)
    adapted = adapt_class_layers(checkpoint, model)
    layers = [f'bbox_head.cls_branches.{i}' for i in range(4)]
    assert {name: adapted[name] for name in layers} == dict.fromkeys(layers, (CLASSES, 3))
    model.load_state_dict(checkpoint)
    assert torch.equal(model.bbox_head.reg_branches[0][0].weight, source.bbox_head.reg_branches[0][0].weight)


def test_labels_that_are_no_class_are_one_clear_error():
    cfg = small()
    cfg['bbox_head']['num_classes'] = 3
    with pytest.raises(ValueError, match='the ground truth has labels from 0 to 6, but with num_classes=3'):
        build(cfg).train()(torch.rand(2, 3, 64, 96), samples(((64, 96),) * 2), mode='loss')


def test_accelerate_keeps_the_results():
    model = build(small()).eval()
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(image, mode='tensor')
        accelerate(model)
        outs = model(image, mode='tensor')
    assert all(torch.allclose(out, wanted, atol=1e-5) for out, wanted in zip(outs, expected, strict=True))


def test_boxes_keep_their_precision_under_autocast():
    model = build(small()).eval()
    # Distances of a quarter of the box, which bfloat16 would round by up to 0.4 %.
    boxes = torch.rand(1, 5, 4) / 4 + 0.3
    hidden = torch.randn(1, 5, 32)
    torch.nn.init.normal_(model.bbox_head.reg_branches[0][-1].bias)
    with torch.no_grad():
        with torch.autocast('cpu', torch.bfloat16):
            refined, logits = model.bbox_head.refine(0, hidden, boxes, 0.0)
        distances = (logits.float().unflatten(-1, (4, -1)).softmax(-1) * model.bbox_head.bin_values).sum(-1)
    assert refined.dtype == torch.float32
    assert torch.allclose(refined, move_edges(boxes, distances, model.bbox_head.reg_scale), atol=1e-6)
