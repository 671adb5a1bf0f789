"""The visualize command with DAT and Shunted Transformer backbones in different detectors."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from PIL import Image

from msda_plugin.__main__ import main
from msda_plugin.layers import DeformableMultiHeadAttention
from msda_plugin.registry import MODELS

CONFIGS = Path(__file__).parents[2] / 'configs'
WIDTH, HEIGHT = 96, 64
DAT = dict(
    embed_dims=(8, 16, 32, 64),
    num_heads=(1, 2, 4, 8),
    num_groups=(1, 1, 2, 4),
    kernel_sizes=(9, 7, 5, 3),
    blocks=('L', 'L', 'LDLD', 'LD'),
    mlp_ratio=2,
    window_size=4,
    image_size=64,
    drop_path_rate=0.0,
)
SHUNTED = dict(
    embed_dims=(16, 32, 64, 64),
    depths=(1, 1, 2, 1),
    num_heads=(2, 2, 4, 4),
    mlp_ratios=(2, 2, 2, 2),
    sr_ratios=(8, 4, 2, 1),
    stem_convs=1,
)
DETECTORS = {
    'dat': ('dat/retinanet_dat-t_fpn_1x_coco.py', DAT),
    'dat-detr': ('dat/deformable-detr-refine-twostage_dat-t_16xb2-50e_coco.py', DAT),
    'shunted': ('shunted_transformer/retinanet_shunted-t_fpn_1x_coco.py', SHUNTED),
}


def shrink(cfg, arch):
    """Give a config a tiny backbone, small images, and no pretrained checkpoint."""
    cfg.model.backbone.update(arch=arch, init_cfg=None)
    cfg.model.neck.in_channels = list(arch['embed_dims'][-len(cfg.model.neck.in_channels) :])
    if 'encoder' in cfg.model:
        cfg.model.encoder.num_layers = cfg.model.decoder.num_layers = 1
        cfg.model.num_queries = 10
    for step in cfg.test_dataloader.dataset.pipeline:
        if 'Resize' in step['type']:
            step['scale'] = (WIDTH, HEIGHT)


@pytest.fixture(scope='module', params=DETECTORS)
def detector(request, tmp_path_factory):
    """The name of a detector, and a folder with its config, a checkpoint with random weights, and an image."""
    folder = tmp_path_factory.mktemp(request.param)
    path, arch = DETECTORS[request.param]
    cfg = Config.fromfile(CONFIGS / path)
    shrink(cfg, arch)
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()  # some parameters are uninitialized before
    for layer in model.modules():  # moves points visibly
        if isinstance(layer, DeformableMultiHeadAttention):
            torch.nn.init.normal_(layer.offset_proj.weight, std=0.5)
    cfg.dump(folder / 'config.py')
    torch.save(model.state_dict(), folder / 'weights.pth')
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / 'image.png')
    return request.param, folder


@pytest.fixture
def page(detector, tmp_path, monkeypatch):
    """The page data of ``--query 50,20 --layer all``; only the first layer's figure is drawn."""
    from msda_plugin.visualization import attention_figure as drawing

    drawn = []
    monkeypatch.setattr(
        'msda_plugin.visualization.draw_heads',
        lambda image, query, view, title: (
            drawn.append(view.name)
            or (
                drawing.draw_heads(image, query, view, title=title)
                if len(drawn) == 1
                else np.zeros((1, 1, 3), np.uint8)
            )
        ),
    )
    monkeypatch.setattr('msda_plugin.visualization.draw_query', lambda *_, **__: np.zeros((1, 1, 3), np.uint8))
    name, folder = detector
    assert (
        main(
            [
                'visualize',
                str(folder / 'image.png'),
                '--checkpoint',
                str(folder / 'weights.pth'),
                '--device',
                'cpu',
                '--out',
                str(tmp_path),
                '--query',
                '50,20',
                '--layer',
                'all',
            ]
        )
        == 0
    )
    data = re.search(r'id="data">(.*?)</script>', (tmp_path / 'image.html').read_text(), re.S)[1]
    (query,) = json.loads(data)['queries']
    assert [layer['name'] for layer in query['layers']] == drawn
    with Image.open(tmp_path / f'image_point-50-20_{drawn[0]}.png') as figure:
        assert min(figure.size) > 250
    return name, query['layers']


def of_head(layer, head, key):
    return np.array([value for value, its in zip(layer[key], layer['head'], strict=True) if its == head])


def heads_of(layer):
    return max(layer['head']) + 1


def test_shows_the_backbone(page):
    name, layers = page
    if name.startswith('dat'):
        check_dat([layer for layer in layers if layer['kind'] == 'dat'])
        assert {layer['kind'] for layer in layers} == ({'dat', 'encoder'} if name == 'dat-detr' else {'dat'})
    else:
        check_shunted(layers)


def check_dat(layers):
    assert [layer['name'] for layer in layers] == [
        f'backbone.stages.{block}.attn' for block in ('2.blocks.1', '2.blocks.3', '3.blocks.1')
    ]
    for layer, stride, groups in zip(layers, (16, 16, 32), (2, 2, 4), strict=True):
        rows, columns = HEIGHT // stride, WIDTH // stride
        heads = heads_of(layer)
        assert layer['levels'] == [f'points of group {group}' for group in range(groups)]
        for head in range(heads):
            weights, at, origin = (of_head(layer, head, key) for key in ('weight', 'level', 'origin'))
            assert len(weights) == rows * columns and abs(weights.sum() - 1) < 1e-3
            assert set(at) == {head * groups // heads}  # the heads of a group share its points
            # The origins are a regular grid over the image; the points are moved off it.
            x, y = (np.unique(origin[:, axis]) for axis in (0, 1))
            assert (len(x), len(y)) == (columns, rows)
            np.testing.assert_allclose(np.diff(x), np.diff(x).mean(), atol=0.02)
            assert 0 < x[0] < stride and WIDTH - stride < x[-1] < WIDTH
            moved = np.column_stack([of_head(layer, head, 'x'), of_head(layer, head, 'y')]) - origin
            assert 0.3 < np.abs(moved).max() < 2.5 * stride
        # The query is the map pixel that contains the point.
        np.testing.assert_allclose(layer['at'], [(np.floor(place / stride) + 0.5) * stride for place in (50, 20)])
    first, last = (of_head(layers[0], head, 'x') for head in (0, heads_of(layers[0]) - 1))
    assert np.abs(first - last).max() > 0.3  # each group has its own


def check_shunted(layers):
    assert [layer['kind'] for layer in layers] == ['shunted'] * 5
    strides, rates = (4, 8, 16, 16, 32), ((8, 4), (4, 2), (2, 1), (2, 1), (1,))
    for layer, stride, its_rates in zip(layers, strides, rates, strict=True):
        assert len(layer['levels']) == len(layer['cells']) == len(its_rates)
        for level, (cell, rate) in enumerate(zip(layer['cells'], its_rates, strict=True)):
            assert cell == [stride * rate, stride * rate]  # image pixels
            text = f'{rate}×{rate} merged' if rate > 1 else 'not merged'
            assert layer['levels'][level] == f'{text}, {HEIGHT // stride // rate}×{WIDTH // stride // rate}'
        for head in range(heads_of(layer)):
            weights, at = of_head(layer, head, 'weight'), of_head(layer, head, 'level')
            level = head * len(its_rates) // heads_of(layer)  # the first half of the heads attends to the coarse cells
            assert set(at) == {level} and abs(weights.sum() - 1) < 1e-3
            assert len(weights) == (HEIGHT * WIDTH) // (stride * its_rates[level]) ** 2
