"""Files and error messages of the visualize command."""

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
from msda_plugin.registry import MODELS
from msda_plugin.tools.visualize import slug

CONFIG = Path(__file__).parents[2] / 'configs' / 'shapes' / 'deformable-detr-two-stage_shunted-nano_1xb4-8e_shapes.py'


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A folder with a checkpoint, its config and an image."""
    folder = tmp_path_factory.mktemp('trained')
    cfg = Config.fromfile(CONFIG)
    init_default_scope('mmdet')
    torch.manual_seed(1)
    model = MODELS.build(cfg.model)
    model.init_weights()
    for parameter in model.parameters():  # makes scores and boxes differ
        parameter.data += 0.02 * torch.randn(parameter.shape)
    cfg.dump(folder / 'config.py')
    torch.save(dict(state_dict=model.state_dict(), meta={}), folder / 'last.pth')
    pixels = np.random.default_rng(0).integers(0, 256, (96, 160, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / 'image.png')
    return folder


@pytest.fixture
def no_drawing(monkeypatch):
    for name in ('draw_query', 'draw_heads'):
        monkeypatch.setattr(f'msda_plugin.visualization.{name}', lambda *_, **__: np.zeros((1, 1, 3), np.uint8))


def visualize(trained, out, *options):
    return main(
        [
            'visualize',
            str(trained / 'image.png'),
            '--checkpoint',
            str(trained / 'last.pth'),
            '--out',
            str(out),
            '--device',
            'cpu',
            *options,
        ]
    )


def page_data(path):
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(), re.S)[1])


def test_writes_figures_and_a_page(trained, tmp_path, capsys):
    assert visualize(trained, tmp_path, '--detection', '0', '--query', '20,30.5') == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {'image.html', 'image_detection-0.png', 'image_point-20-30.5.png'}
    out = capsys.readouterr().out
    assert all(str(tmp_path / name) in out for name in names)
    data = page_data(tmp_path / 'image.html')
    assert (data['width'], data['height']) == (160, 96)
    detection, place = data['queries']
    assert place['label'] == 'point (20, 30.5)' and place['at'] == [20, 30.5]
    assert [layer['kind'] for layer in detection['layers']] == ['shunted'] * 4 + ['encoder'] * 2 + ['decoder'] * 2
    assert [layer['kind'] for layer in place['layers']] == ['shunted'] * 4 + ['encoder'] * 2
    with Image.open(tmp_path / 'image_detection-0.png') as figure:
        assert min(figure.size) > 300


def test_default_is_the_highest_scoring_detections_of_different_queries(trained, tmp_path, no_drawing):
    assert visualize(trained, tmp_path, '--score-thr', '0') == 0
    labels = [query['label'] for query in page_data(tmp_path / 'image.html')['queries']]
    assert len(labels) == 3 and labels[0].startswith('detection 0: ')
    boxes = {tuple(query['box']) for query in page_data(tmp_path / 'image.html')['queries']}
    assert len(boxes) == 3


def test_default_is_the_center_if_nothing_is_detected(trained, tmp_path, no_drawing, capsys):
    assert visualize(trained, tmp_path, '--score-thr', '1') == 0
    out = capsys.readouterr().out
    assert re.search(r'no score ≥ 1, highest 0\.\d+: the query is the center of the image', out)
    assert re.search(r': 1 query, \d+ attention layers', out)
    (query,) = page_data(tmp_path / 'image.html')['queries']
    assert query['at'] == [80, 48] and query['box'] is None


def test_draws_chosen_layers_head_by_head(trained, tmp_path, no_drawing):
    assert visualize(trained, tmp_path, '--detection', '2', '--layer', 'decoder.layers.1', 'stages.0.blocks.0') == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        'image.html',
        'image_detection-2.png',
        'image_detection-2_decoder.layers.1.cross_attn.png',
        'image_detection-2_backbone.stages.0.blocks.0.attn.png',
    }


@pytest.mark.parametrize(
    'options, message',
    [
        (['--query', '160,3'], 'the point 160,3 is outside the image, which is 160x96'),
        (['--detection', '100'], 'detection 100 does not exist; expected 0'),
        (
            ['--layer', 'decoder.layers.9'],
            'no layer matches decoder.layers.9; the layers are backbone.stages.0.blocks.0.attn',
        ),
        (['--score-thr', '2'], '--score-thr is 2.0; expected a number from 0 to 1'),
        (['--config', 'none.py'], 'the config none.py does not exist'),
        (['--device', 'tpu'], "--device must be cpu, cuda or cuda:N, got 'tpu'"),
        (['--query', 'a,b'], "'a,b' is not a point; expected X,Y in image pixels"),
    ],
)
def test_bad_options_exit_with_a_message(trained, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        visualize(trained, tmp_path / 'out', *options)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and 'Traceback' not in error
    assert not (tmp_path / 'out').exists()


def test_a_missing_image(trained, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(['visualize', str(tmp_path / 'none.png'), '--checkpoint', str(trained / 'last.pth')])
    assert 'none.png does not exist; give the path of an image file' in capsys.readouterr().err


def test_file_names():
    assert slug('detection 0: a/b 0.66') == 'detection-0'
    assert slug('point (64, 32.5)') == 'point-64-32.5'
