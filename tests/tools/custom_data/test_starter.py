"""Starter weights: stored in float16, verified, and used by ``train --data`` unless something else is asked for."""

import hashlib

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import CheckpointLoader

from msda_plugin import starter_weights
from msda_plugin.engine.model_zoo import find_model
from msda_plugin.tools import train
from msda_plugin.tools.custom_data import starter
from msda_plugin.tools.custom_data.config import DEFAULT_MODEL
from msda_plugin.tools.shapes import generate

CLASSES = ('a', 'b', 'c', 'd')  # the shapes have six
CLASS_LAYER = 'bbox_head.cls_branches'
LABEL_EMBEDDING = 'bbox_head.denoising.label_embedding'


@pytest.fixture(scope='module')
def source():
    """A checkpoint's content, as MMEngine saves it."""
    init_default_scope('mmdet')
    cfg = Config.fromfile(find_model(DEFAULT_MODEL).config).model
    cfg.bbox_head.num_classes = len(CLASSES)
    torch.manual_seed(0)
    model = MODELS.build(cfg)
    model.init_weights()
    return dict(state_dict=model.state_dict(), meta=dict(iter=7, dataset_meta=dict(classes=CLASSES)))


@pytest.fixture
def checkpoint(source, tmp_path, monkeypatch):
    monkeypatch.setattr(starter_weights, 'FOLDER', tmp_path / 'weights')
    torch.save(source, tmp_path / 'iter_7.pth')
    return tmp_path / 'iter_7.pth'


@pytest.fixture
def stored(checkpoint):
    return starter.store(checkpoint)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'mine'
    generate(folder, train=12, val=2, size=(64, 64), seed=1)
    return str(folder)


def dry_run(data, tmp_path, *options):
    assert train.main(['--data', data, '--work-dir', str(tmp_path / 'work'), '--dry-run', *options]) == 0
    [config] = (tmp_path / 'work').glob('*.py')
    return Config.fromfile(str(config))


def test_stored_in_float16_with_hash_and_classes(stored, source):
    digest = hashlib.sha256(stored.read_bytes()).hexdigest()
    assert stored.name == f'{DEFAULT_MODEL}-{digest[:16]}.pth' and stored.stat().st_size <= 10_000_000
    content = torch.load(stored, weights_only=True)
    assert content['meta'] == dict(dataset_meta=dict(classes=CLASSES), iterations=7)
    assert content['state_dict'].keys() == source['state_dict'].keys()
    for name, value in content['state_dict'].items():
        full = source['state_dict'][name]
        assert torch.equal(value, full.half() if full.is_floating_point() else full)
        assert value.dtype == (torch.float16 if full.is_floating_point() else full.dtype)
    assert starter_weights.file_of(DEFAULT_MODEL) == stored
    assert starter_weights.file_of('another') is None


def test_other_weights_replace_them(stored, source, checkpoint):
    torch.save({**source, 'meta': {**source['meta'], 'iter': 8}}, checkpoint)
    assert starter.main([str(checkpoint)]) == 0
    [file] = starter_weights.FOLDER.iterdir()
    assert file != stored and starter_weights.file_of(DEFAULT_MODEL) == file


def test_same_weights_same_file(stored, checkpoint):
    assert starter.store(checkpoint) == stored and list(starter_weights.FOLDER.iterdir()) == [stored]


def test_weights_outside_of_float16_are_not_stored(checkpoint, source):
    weights = dict(source['state_dict'])
    name = next(iter(weights))
    weights[name] = torch.full_like(weights[name], 1e6)
    torch.save({**source, 'state_dict': weights}, checkpoint)
    with pytest.raises(ValueError, match=f'{name} of .* is not finite in float16'):
        starter.store(checkpoint)
    assert not starter_weights.FOLDER.exists()


def test_large_weights_are_not_stored(checkpoint, monkeypatch):
    monkeypatch.setattr(starter, 'MAX_BYTES', 1_000_000)
    with pytest.raises(ValueError, match='the weights need 9[0-9]* bytes, at most 1000000 are stored'):
        starter.store(checkpoint)
    assert not starter_weights.FOLDER.exists()


def test_used_by_default(stored, data, tmp_path, capsys):
    assert dry_run(data, tmp_path).load_from == f'msda_plugin://{DEFAULT_MODEL}'
    assert f'weights: {stored.name}, pre-trained on generated scenes' in capsys.readouterr().out


def test_not_used_from_scratch_with_other_weights_or_another_model(stored, checkpoint, data, tmp_path, capsys):
    assert dry_run(data, tmp_path, '--from-scratch').load_from is None
    assert 'weights: random' in capsys.readouterr().out
    assert dry_run(data, tmp_path, '--load-from', str(checkpoint)).load_from == str(checkpoint)
    assert f'weights: {checkpoint}' in capsys.readouterr().out
    other = 'deformable-detr_shunted-nano_1xb4-8e_shapes'
    assert dry_run(data, tmp_path / 'other', '--model', other).load_from is None
    with pytest.raises(SystemExit):
        dry_run(data, tmp_path, '--from-scratch', '--load-from', str(checkpoint))
    assert 'not allowed with argument' in capsys.readouterr().err


def test_not_used_for_a_config_file_of_the_same_name(stored, data, tmp_path, capsys):
    config = tmp_path / f'{DEFAULT_MODEL}.py'
    config.write_text(find_model(DEFAULT_MODEL).config.read_text())
    assert dry_run(data, tmp_path, '--model', str(config)).load_from is None
    assert 'weights: random\n' in capsys.readouterr().out


def test_from_scratch_removes_the_checkpoints_of_a_config(data, tmp_path, capsys):
    config = tmp_path / 'pretrained.py'
    config.write_text(
        find_model(DEFAULT_MODEL).config.read_text()
        + "\nmodel['backbone']['init_cfg'] = dict(type='Pretrained', checkpoint='a.pth')\n"
    )
    cfg = dry_run(data, tmp_path, '--model', str(config))
    assert cfg.model.backbone.init_cfg.checkpoint == 'a.pth'
    assert 'weights: random, except those that the config names' in capsys.readouterr().out
    config.write_text(config.read_text() + "load_from = 'b.pth'\n")
    assert dry_run(data, tmp_path, '--model', str(config)).load_from == 'b.pth'
    cfg = dry_run(data, tmp_path, '--model', str(config), '--from-scratch')
    assert cfg.load_from is None and cfg.model.backbone.init_cfg is None
    assert 'weights: random\n' in capsys.readouterr().out


def test_loaded_by_name_in_any_project(source, stored):
    backbone = dict(init_cfg=dict(type='Pretrained', checkpoint=f'msda_plugin://{DEFAULT_MODEL}', prefix='backbone.'))
    cfg = Config.fromfile(find_model(DEFAULT_MODEL).config).model.backbone
    built = MODELS.build({**cfg, **backbone})
    built.init_weights()
    for name, value in built.state_dict().items():
        expected = source['state_dict'][f'backbone.{name}']
        assert torch.equal(value, expected.half().to(expected.dtype)), name
    with pytest.raises(
        FileNotFoundError, match=f'msda_plugin://other: there are starter weights for {DEFAULT_MODEL} only'
    ):
        CheckpointLoader.load_checkpoint('msda_plugin://other')


@pytest.mark.parametrize('options', [[], ['--from-scratch']])
def test_damaged_file(stored, data, tmp_path, capsys, options):
    content = bytearray(stored.read_bytes())
    content[len(content) // 2] ^= 1
    stored.write_bytes(content)
    if options:
        assert dry_run(data, tmp_path, *options).load_from is None
        return
    with pytest.raises(SystemExit) as stopped:
        dry_run(data, tmp_path)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert f'{stored} has the SHA-256' in error and 'or train without it with --from-scratch' in error


def test_two_files_are_an_error(stored):
    stored.with_name(f'{DEFAULT_MODEL}-{"0" * 16}.pth').write_bytes(b'')
    with pytest.raises(ValueError, match='has several starter weights'):
        starter_weights.file_of(DEFAULT_MODEL)


@pytest.mark.slow
def test_training_starts_from_them_in_float32(stored, source, data, tmp_path):
    DetLocalVisualizer._instance_dict.clear()
    options = ['--epochs', '1', '--lr', '1e-12', '--image-size', '64', '--workers', '0', '--device', 'cpu']
    assert train.main(['--data', data, '--work-dir', str(tmp_path / 'work'), *options]) == 0
    trained = torch.load(tmp_path / 'work/epoch_1.pth', weights_only=False)['state_dict']
    assert trained.keys() == source['state_dict'].keys()
    for name, value in trained.items():
        full = source['state_dict'][name]
        assert value.dtype == full.dtype
        if name.startswith(CLASS_LAYER):
            assert len(value) == 6
        elif name.startswith(LABEL_EMBEDDING):
            assert len(value) == 7  # with the class of noise
        elif '.running_' not in name and full.is_floating_point():  # statistics follow the images
            torch.testing.assert_close(value, full.half().float(), rtol=0, atol=1e-6)
    [log] = (tmp_path / 'work').glob('*/*.log')
    assert 'bbox_head.cls_branches.0 (4 outputs, now 6)' in log.read_text()


@pytest.mark.parametrize('path', sorted(starter_weights.FOLDER.glob('*.pth')), ids=lambda path: path.name)
def test_packaged_file(path):
    model = path.stem.rsplit('-', 1)[0]
    assert starter_weights.file_of(model) == path and path.stat().st_size <= 10_000_000
    content = torch.load(path, weights_only=True)
    cfg = Config.fromfile(str(find_model(model).config)).model
    cfg.bbox_head.num_classes = len(content['meta']['dataset_meta']['classes'])
    init_default_scope('mmdet')
    built = MODELS.build(cfg)
    built.load_state_dict(content['state_dict'])
    for name, value in built.state_dict().items():
        assert value.dtype in (torch.float32, torch.int64) and value.isfinite().all(), name
