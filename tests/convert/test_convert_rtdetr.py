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
