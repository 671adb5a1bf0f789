"""``benchmark realtime``: the models of transformers have the sizes and results of ours; the table."""

import argparse
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip('mmdet')

from msda_plugin.__main__ import main
from msda_plugin.convert import convert_state_dict
from msda_plugin.registry import MODELS
from msda_plugin.tools.benchmarks import realtime

CONFIGS = Path(__file__).resolve().parents[3] / 'configs'
TINY_DFINE = """
_base_ = {base!r}
arch = dict(_delete_=True, stem=(4, 4), inner=(4, 4, 8, 8), channels=(8, 16, 24, 32), blocks=(1, 1, 2, 1), layers=2)
model = dict(
    num_queries=20,
    backbone=dict(arch=arch),
    neck=dict(in_channels=[24, 32], out_channels=32, num_heads=4, feedforward_channels=48),
    decoder=dict(embed_dims=32, num_heads=4, feedforward_channels=48, num_layers=2),
    bbox_head=dict(embed_dims=32, num_classes=5),
    test_cfg=dict(max_per_img=20),
)
"""
TINY_RTDETR = """
_base_ = {base!r}
attention = dict(embed_dims=32, num_heads=4{cross})
model = dict(
    num_queries=20,
    backbone=dict(base_channels=8),
    neck=dict(in_channels=[16, 32, 64], out_channels=32, num_heads=4, feedforward_channels=48),
    decoder=dict(
        num_layers=2,
        layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=32, num_heads=4),
            cross_attn_cfg=attention,
            ffn_cfg=dict(embed_dims=32, feedforward_channels=48),
        ),
    ),
    bbox_head=dict(embed_dims=32, num_classes=5),
    test_cfg=dict(max_per_img=20),
)
"""
TINY = {
    'dfine': (TINY_DFINE, 'dfine/dfine_hgnetv2-n_8xb16-160e_coco.py', ''),
    'rtdetr': (TINY_RTDETR, 'rtdetr/rtdetr_r18vd_4xb4-72e_coco.py', ''),
    'rtdetrv2': (
        TINY_RTDETR,
        'rtdetr/rtdetrv2-s_r18vd_4xb4-120e_coco.py',
        ", type='msda_plugin.PointsPerLevelAttention', num_levels=3, num_points=2",
    ),
}


@pytest.fixture
def config(tmp_path):
    def write(name):
        text, base, cross = TINY[name]
        (tmp_path / 'tiny.py').write_text(text.format(base=str(CONFIGS / base), cross=cross))
        return str(tmp_path / 'tiny.py')

    return write


def arguments(*argv):
    parser = argparse.ArgumentParser()
    realtime.add_parser(parser.add_subparsers())
    return parser.parse_args(['realtime', *argv, *'--height 96 --width 96 --repeats 1 --threads 1'.split()])


@pytest.mark.parametrize('name', TINY)
def test_both_sides_have_the_same_results(config, name, capsys):
    pytest.importorskip('transformers')
    args = arguments(config(name))
    assert realtime.run(args) == 0
    _, _, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [' '.join(row[:-4]) for row in rows] == ['as built', 'deployed']
    for *_, theirs, ours, ratio, difference in rows:
        assert float(theirs) > 0 and float(ours) > 0 and ratio.endswith('x')
        assert 0 < float(difference) < 1e-4


@pytest.mark.parametrize(
    'config',
    [
        'dfine/dfine_hgnetv2-l_8xb4-80e_coco.py',
        'dfine/dfine_hgnetv2-s_8xb4-132e_coco.py',
        'rtdetr/rtdetr_r50vd_4xb4-72e_coco.py',
    ],
    ids=['l', 's', 'r50'],
)
def test_published_configs_have_the_sizes_of_their_models_in_transformers(config):
    pytest.importorskip('transformers')
    model = realtime.load_model_config(str(CONFIGS / config))
    with torch.device('meta'):
        stock, ours = realtime.transformers_model(model), MODELS.build(model)
    converted = convert_state_dict(stock.state_dict(), realtime.FAMILIES[model.type])
    shapes, expected = (
        {key: value.shape for key, value in state_dict.items() if not key.endswith('num_batches_tracked')}
        for state_dict in (ours.state_dict(), converted)
    )
    assert shapes == expected


def test_images_change_the_boxes(config):
    pytest.importorskip('transformers')
    stock, _ = realtime.build(config('dfine'))
    with torch.no_grad():
        first, second = (stock(torch.randn(1, 3, 96, 96)).pred_boxes for _ in range(2))
    assert (first - second).abs().max() > 0.01


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        ('missing.py', 'the config missing.py does not exist'),
        (
            str(CONFIGS / '_base_/models/deformable-detr-two-stage_shunted-nano.py'),
            'expected one of msda_plugin.RTDETR, msda_plugin.DFINE',
        ),
        (str(CONFIGS / 'deim/deim-dfine_hgnetv2-n_8xb16-160e_coco.py'), 'has activations of type SiLU'),
    ],
)
def test_errors(config, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(['benchmark', 'realtime', config])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_needs_transformers(config, monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    with pytest.raises(ImportError, match='benchmark realtime needs transformers'):
        realtime.build(config('dfine'))
