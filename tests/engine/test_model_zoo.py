"""Models by name, and their published weights: downloaded once, verified, converted."""

import hashlib
import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from PIL import Image

from msda_plugin import Detector
from msda_plugin.convert import convert
from msda_plugin.engine import model_zoo
from msda_plugin.engine.model_zoo import Model, download_weights, find_model, models
from msda_plugin.registry import MODELS
from msda_plugin.tools import demo
from msda_plugin.tools.custom_data.config import DEFAULT_MODEL

C = 16
VIT = {'patch_embed.proj.weight': (C, 3, 16, 16), 'pos_embed': (1, 17, C), 'cls_token': (1, 1, C)}
for name, size in (('attn.qkv', (3 * C, C)), ('attn.proj', (C, C)), ('mlp.fc1', (4 * C, C)), ('mlp.fc2', (C, 4 * C))):
    VIT |= {f'blocks.0.{name}.weight': size, f'blocks.0.{name}.bias': size[:1]}
for name in ('patch_embed.proj', 'norm', 'blocks.0.norm1', 'blocks.0.norm2'):
    VIT = {f'{name}.weight': (C,), f'{name}.bias': (C,)} | VIT


class Quiet(SimpleHTTPRequestHandler):
    requests = 0

    def log_message(self, *args):
        type(self).requests += 1


@pytest.fixture
def server(tmp_path, monkeypatch):
    """``(folder, url)`` of a folder served over HTTP."""
    folder = tmp_path / 'served'
    folder.mkdir()
    monkeypatch.setenv('no_proxy', '*')
    Quiet.requests = 0
    with ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f'http://127.0.0.1:{server.server_address[1]}'
        server.shutdown()


def publish(folder, content):
    torch.save(content, folder / 'file.pth')
    digest = hashlib.sha256((folder / 'file.pth').read_bytes()).hexdigest()
    return (folder / 'file.pth').rename(folder / f'vit-{digest[:8]}.pth').name


def test_every_name_has_a_config_and_its_weights_a_hash():
    known = models()
    assert all(model.name == name and model.config.is_file() for name, model in known.items())
    published = [model for model in known.values() if model.weights and model.detr_family]
    assert len(published) >= 20
    assert [model.name for model in published if not re.search(r'-[0-9a-f]{8}\.pth$', model.weights)] == []


def test_own_config_gets_the_weights_of_mmdetection():
    model = find_model('deformable-detr-refine-twostage_r50')
    assert 'msda_plugin.DeformableDETR' in model.config.with_name('deformable-detr_r50_16xb2-50e_coco.py').read_text()
    assert model.weights.endswith('-acc8a5ff.pth') and model.box_ap == 47.0 and model.parameters == 40_938_316
    assert find_model('dab-detr_r50').weights and find_model('dab-detr_r50').parameters is None
    assert find_model('detr-500e_r50').converter == 'detr'


def test_default_model():
    model = find_model(DEFAULT_MODEL)
    assert model.weights is None and model.parameters == 4_498_540
    assert find_model(str(model.config)).config == model.config


@pytest.mark.parametrize(
    'name, message',
    [
        ('deformable-detr-refin', r'unknown model .*did you mean .*deformable-detr-refine_r50_16xb2-50e_coco.*\?'),
        ('dino-5scale_swin-l', r"several models match 'dino-5scale_swin-l'; did you mean .*36e_coco"),
        ('dino', r'unknown model .*did you mean dino-4scale_r50_8xb2-12e_coco, .*swin-l_8xb2-36e_coco'),
        ('xyzzy', r"unknown model 'xyzzy'; python -m msda_plugin models lists them"),
    ],
)
def test_unknown_name(name, message):
    with pytest.raises(ValueError, match=message):
        find_model(name)


def test_downloads_once_and_verifies(server, tmp_path):
    folder, url = server
    name = publish(folder, {key: torch.rand(shape) for key, shape in VIT.items()})
    model = Model('vit', Path('vit.py'), weights=f'{url}/{name}')
    path = download_weights(model, tmp_path / 'cache')
    assert path == tmp_path / 'cache' / name == download_weights(model, tmp_path / 'cache')
    assert Quiet.requests == 1
    path.write_bytes(b'damaged')
    with pytest.raises(ValueError, match='damaged or replaced; delete it to download it again'):
        download_weights(model, tmp_path / 'cache')


def test_converts_once(server, tmp_path):
    folder, url = server
    weights = {key: torch.rand(shape) for key, shape in VIT.items()}
    model = Model(
        'vit', Path('vit.py'), weights=f'{url}/{publish(folder, {"model": weights})}', converter='vision_transformer'
    )
    path = download_weights(model, tmp_path / 'cache')
    expected = convert(weights, 'vision_transformer').state_dict
    found = torch.load(path, weights_only=True)['state_dict']
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    written = path.stat().st_mtime_ns
    assert download_weights(model, tmp_path / 'cache') == path and path.stat().st_mtime_ns == written


def test_offline(tmp_path, monkeypatch):
    monkeypatch.setenv('no_proxy', '*')
    url = 'http://127.0.0.1:9/vit-01234567.pth'
    with pytest.raises(OSError, match=rf'{url} cannot be downloaded .* copy the file to {tmp_path}/vit-01234567.pth'):
        download_weights(Model('vit', Path('vit.py'), weights=url), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_weights():
    with pytest.raises(ValueError, match='no weights are published for rtdetr_r18vd-nano'):
        download_weights(find_model(DEFAULT_MODEL))


def test_detector_and_demo_take_a_name(server, tiny_stock_config, tmp_path, monkeypatch, capsys):
    folder, url = server
    cfg = Config.fromfile(tiny_stock_config)
    init_default_scope('mmdet')
    detector = MODELS.build(cfg.model)
    detector.init_weights()
    name = publish(folder, dict(state_dict=detector.state_dict()))
    known = {'tiny_r18_coco': Model('tiny_r18_coco', tiny_stock_config, weights=f'{url}/{name}')}
    monkeypatch.setattr(model_zoo, 'models', lambda: known)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    Image.new('RGB', (64, 48), 'gray').save(tmp_path / 'photo.png')
    argv = [str(tmp_path / 'photo.png'), '--model', 'tiny_r18', '--out', str(tmp_path / 'out')]
    assert demo.main(argv) == 0
    assert (tmp_path / 'out' / 'photo.png').is_file() and Quiet.requests == 1
    assert Detector('tiny_r18').config == str(tiny_stock_config)
    with pytest.raises(SystemExit):
        demo.main([*argv[:2], 'tinny_r18', *argv[3:]])
    assert "unknown model 'tinny_r18'; did you mean tiny_r18_coco?" in capsys.readouterr().err
    with pytest.raises(ValueError, match='has its own config and weights'):
        Detector('tiny_r18', config=tiny_stock_config)
