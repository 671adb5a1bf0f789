"""RT-DETR's checkpoints, and RT-DETR against golden numbers of the authors' code: outputs, losses and gradients."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from msda_plugin.convert import convert

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / 'golden'
sys.path[:0] = [str(GOLDEN), str(ROOT / 'detectors')]
import make_rtdetr  # noqa: E402
import rtdetr_cases  # noqa: E402

FAMILY = 'rtdetr'
CASES = [pytest.param(case, marks=pytest.mark.slow if case == 'r50' else ()) for case in make_rtdetr.CASES]
OURS = {'vfl': 'cls', 'bbox': 'bbox', 'giou': 'iou'}


def upstream_state_dict(case):
    shapes = json.loads((GOLDEN / 'rtdetr_state_dict.json').read_text())[case]
    return make_rtdetr.fill({key: torch.zeros(shape) for key, shape in shapes.items()})


def golden_model(case):
    _, depth, expansion, num_layers, fields = make_rtdetr.CASES[case]
    names = dict(num_points='num_points', cross_attn_method='method')
    attention = {names[name]: value for name, value in fields.items()}
    if attention:
        attention['type'] = 'msda_plugin.PointsPerLevelAttention'
        attention['num_levels'] = 3
    return rtdetr_cases.build(
        depth,
        base_channels=64,
        dims=256,
        heads=8,
        num_layers=num_layers,
        num_queries=make_rtdetr.NUM_QUERIES,
        num_classes=make_rtdetr.NUM_CLASSES,
        expansion=expansion,
        ffn=1024,
        frozen=depth >= 50,
        cross_attn=attention,
    )


def our_loss_name(name, num_layers):
    """'loss_vfl_dn_0' -> 'd0.dn_loss_cls'."""
    kind, part, index = re.fullmatch(r'loss_([a-z]+)(?:_(aux|dn|enc)_(\d+))?', name).groups()
    if part is None:
        return f'loss_{OURS[kind]}'
    if part == 'enc' or (part == 'aux' and int(index) == num_layers - 1):
        return f'enc_loss_{OURS[kind]}'
    prefix = 'dn_' if part == 'dn' else ''
    layer = '' if part == 'dn' and int(index) == num_layers - 1 else f'd{index}.'
    return f'{layer}{prefix}loss_{OURS[kind]}'


def assert_close(name, actual, expected):
    expected = torch.from_numpy(expected)
    assert actual.shape == expected.shape, name
    assert (actual - expected).abs().max() <= 1e-5 * max(expected.abs().max(), 1e-3), name


@pytest.mark.parametrize('case', CASES)
def test_golden(case):
    golden = dict(np.load(GOLDEN / f'rtdetr_{case}.npz'))
    upstream = upstream_state_dict(case)
    conversion = convert(upstream, FAMILY)
    assert conversion.taken.keys() | conversion.dropped.keys() == upstream.keys()
    model = golden_model(case)
    model.load_state_dict(conversion.state_dict)
    model.double()

    images, shape = make_rtdetr.images(), (make_rtdetr.SIDE, make_rtdetr.SIDE)
    with torch.no_grad():
        logits, boxes = model.eval()(images, mode='tensor')
    assert_close('logits', logits[-1], golden.pop('logits'))
    assert_close('boxes', boxes[-1], golden.pop('boxes'))

    torch.manual_seed(0)
    losses = model.train().loss(images, rtdetr_cases.samples(make_rtdetr.objects(), shape))
    sum(losses.values()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, expected in golden.items():
        kind, _, name = name.partition('.')
        if kind == 'loss':
            assert_close(name, losses.pop(our_loss_name(name, model.decoder.num_layers)), expected)
        else:
            assert_close(name, make_rtdetr.sample(gradients[name]), expected)
    assert not losses
    assert {name.partition('.')[2] for name in golden if name.startswith('grad.')} == make_rtdetr.GRADIENTS


def test_published_names_of_transformers():
    """Files on the hub have older names than the models of transformers 5."""
    transformers = pytest.importorskip('transformers')
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 32, 64],
        depths=[1, 1, 1, 1],
        layer_type='basic',
        out_features=['stage2', 'stage3', 'stage4'],
    )
    sizes = dict(encoder_in_channels=[16, 32, 64], encoder_hidden_dim=32, d_model=32, decoder_in_channels=[32] * 3)
    config = transformers.RTDetrV2Config(backbone_config=backbone, **sizes, decoder_layers=2, num_queries=10)
    state_dict = transformers.RTDetrV2ForObjectDetection(config).state_dict()
    older = {}
    for key, value in state_dict.items():
        key = re.sub(r'layers\.(\d+)\.mlp\.', r'layers.\1.', key.replace('o_proj', 'out_proj'))
        older[key.replace('encoder.aifi.', 'encoder.encoder.')] = value
    assert len(older.keys() - state_dict.keys()) > 20
    conversion = convert(older, FAMILY)
    assert conversion.taken.keys() | conversion.dropped.keys() == older.keys()
    expected = convert(state_dict, FAMILY).state_dict
    assert conversion.state_dict.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in conversion.state_dict.items())


def test_averaged_weights_and_converted_state_dicts():
    upstream = upstream_state_dict('v2_s')
    upstream |= {'decoder.anchors': torch.zeros(1), 'decoder.valid_mask': torch.zeros(1)}
    training = {'model': {'wrong': torch.zeros(1)}, 'ema': {'module': upstream, 'updates': 1}, 'last_epoch': 1}
    conversion = convert(training, FAMILY)
    assert {key for key in conversion.dropped if 'num_points_scale' not in key} == {
        'decoder.anchors',
        'decoder.valid_mask',
    }
    assert convert(conversion.state_dict, FAMILY).state_dict.keys() == conversion.state_dict.keys()


def test_unsupported_state_dicts_are_refused():
    upstream = upstream_state_dict('v2_s')
    upstream['decoder.extra.weight'] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"unexpected keys \['decoder.extra.weight'\]"):
        convert(upstream, FAMILY)
    del upstream['decoder.extra.weight'], upstream['decoder.decoder.layers.1.norm2.bias']
    with pytest.raises(ValueError, match=r"missing keys, by their new names, \['decoder.layers.1.norms.1.bias'\]"):
        convert(upstream, FAMILY)
    with pytest.raises(ValueError, match="does not fit family 'rtdetr'"):
        convert({'encoder.weight': torch.zeros(1)}, FAMILY)
    upstream = {'model.decoder.class_embed.0.weight': torch.zeros(1), 'model.x.q_proj.weight': torch.zeros(1)}
    with pytest.raises(ValueError, match=r"no \['k', 'v'\] projections"):
        convert(upstream, FAMILY)
