"""Downloads are verified by the hash in their name and run no code; JSON is parsed only if it fits into memory."""

import hashlib
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from mmengine.runner import CheckpointLoader
from torch import nn

from msda_plugin import compat, safe_loading
from msda_plugin.backbones.vision_transformer import VisionTransformer
from msda_plugin.convert import load_checkpoint_file
from msda_plugin.engine.data_check import check_coco
from msda_plugin.registry import MODELS

ARCH = dict(embed_dims=8, depth=1, num_heads=1, mlp_ratio=1)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


class Print:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, 'w')


@pytest.fixture(autouse=True)
def strict_loaders():
    with compat.load_checkpoints_strictly():
        yield


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder served over HTTP, and a function from file names to URLs."""
    folder = tmp_path / 'served'
    folder.mkdir()
    monkeypatch.setenv('no_proxy', '*')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, lambda name: f'http://127.0.0.1:{server.server_address[1]}/{name}'
    server.shutdown()
    server.server_close()
    thread.join()


def kept(tmp_path):
    return sorted(path.name for path in (tmp_path / 'home').rglob('*') if path.is_file())


def named_by_hash(path, digits=8):
    return path.rename(path.with_name(f'{path.stem}-{hashlib.sha256(path.read_bytes()).hexdigest()[:digits]}.pth'))


def load_init_cfg(url):
    VisionTransformer(ARCH, img_size=32, init_cfg=dict(type='Pretrained', checkpoint=url)).init_weights()


def load_stock_init_cfg(url):
    MODELS.build(
        dict(type='mmdet.ResNet', depth=18, base_channels=4, init_cfg=dict(type='Pretrained', checkpoint=url))
    ).init_weights()


READERS = [load_checkpoint_file, CheckpointLoader.load_checkpoint, load_init_cfg, load_stock_init_cfg]


@pytest.mark.parametrize('read', READERS)
def test_a_wrong_hash_is_refused_and_not_kept(read, served, tmp_path):
    folder, url = served
    torch.save(VisionTransformer(ARCH, img_size=32).state_dict(), folder / 'vit-0123abcd.pth')
    with pytest.raises(ValueError, match='the download from .*vit-0123abcd.pth has the SHA-256 .*its name says 0123'):
        read(url('vit-0123abcd.pth'))
    assert kept(tmp_path) == []


@pytest.mark.parametrize('digits', [8, 16, 64])
def test_a_correct_hash_is_read_and_kept(digits, served, tmp_path):
    folder, url = served
    torch.save({'state_dict': {'weight': torch.ones(2)}}, folder / 'model_20210831.pth')
    path = named_by_hash(folder / 'model_20210831.pth', digits)
    for read in (load_checkpoint_file, lambda url: CheckpointLoader.load_checkpoint(url)['state_dict']):
        assert read(url(path.name))['weight'].tolist() == [1, 1]
    assert kept(tmp_path) == [path.name]
    path.unlink()  # it is not asked for again
    assert load_checkpoint_file(url(path.name))['weight'].tolist() == [1, 1]
    (found,) = (tmp_path / 'home').rglob('*.pth')
    found.write_bytes(b'something else')
    for read in (load_checkpoint_file, CheckpointLoader.load_checkpoint):
        with pytest.raises(ValueError, match='was damaged or replaced; delete it to download it again'):
            read(url(path.name))


@pytest.mark.parametrize('name', ['model.pth', 'vit-base-20210831.pth', 'resnet-50.pth', 'detr-r50.pth', 'x-.pth'])
def test_names_without_a_hash(name, served, tmp_path):
    folder, url = served
    torch.save({'weight': torch.ones(2)}, folder / name)
    assert load_checkpoint_file(url(name))['weight'].tolist() == [1, 1]


@pytest.mark.parametrize('read', READERS)
def test_no_code_of_a_download_runs(read, served, tmp_path):
    """MMEngine's own function loads URLs without `weights_only`."""
    folder, url = served
    for legacy in (False, True):
        torch.save(
            {'state_dict': {'weight': Print(tmp_path / 'ran')}},
            folder / 'evil.pth',
            _use_new_zipfile_serialization=not legacy,
        )
        path = named_by_hash(folder / 'evil.pth')
        with pytest.raises(ValueError, match='holds more than tensors: it names .*open'):
            read(url(path.name))
        assert not (tmp_path / 'ran').exists()
    assert len(kept(tmp_path)) == 2


@pytest.mark.parametrize('read', READERS)
def test_missing_urls(read, served, tmp_path):
    _, url = served
    with pytest.raises(OSError, match='404'):
        read(url('none.pth'))
    with pytest.raises(ValueError, match='contains no file name'):
        read(url(''))
    assert kept(tmp_path) == []


def test_named_models_use_the_same_loader(served, monkeypatch):
    """'torchvision://…' and 'open-mmlab://…' are names of URLs."""
    from mmengine.runner import checkpoint

    folder, url = served
    torch.save(nn.Linear(1, 1).state_dict(), folder / 'resnet50-0123abcd.pth')
    monkeypatch.setattr(checkpoint, 'get_external_models', lambda: {'resnet50': url('resnet50-0123abcd.pth')})
    monkeypatch.setattr(checkpoint, 'get_torchvision_models', lambda: {'resnet50': url('resnet50-0123abcd.pth')})
    for scheme in ('open-mmlab', 'torchvision'):
        with pytest.raises(ValueError, match='its name says 0123abcd'):
            CheckpointLoader.load_checkpoint(f'{scheme}://resnet50')


# ---- JSON -----------------------------------------------------------------------------------------------------------
def test_json_larger_than_the_memory_is_refused(tmp_path, monkeypatch):
    path = tmp_path / 'train.json'
    path.touch()
    with path.open('r+b') as file:
        file.truncate(1 << 40)  # a hole: it takes no space on the disk
    with pytest.raises(
        ValueError,
        match=r'train.json. has 1,048,576 MiB, and parsing JSON takes about 8 times that, '
        r'but [\d,]+ MiB of memory are free',
    ):
        check_coco(path, tmp_path)
    path.write_text('[' + '0,' * 1000 + '0]')
    monkeypatch.setattr(safe_loading, 'free_memory', lambda: path.stat().st_size * 8 - 1)
    with pytest.raises(ValueError, match='memory are free'):
        safe_loading.load_json(path)
    monkeypatch.setattr(safe_loading, 'free_memory', lambda: path.stat().st_size * 8)
    assert len(safe_loading.load_json(path)) == 1001


@pytest.mark.parametrize(
    'text',
    ['[' * 200_000, '{"a":' * 200_000, '[' * 200_000 + ']' * 200_000, '9' * 5000, '', '\ufeff[]', '{"images": ['],
)
def test_invalid_json(text, tmp_path):
    (tmp_path / 'train.json').write_text(text, encoding='utf-8')
    with pytest.raises(ValueError, match="train.json' is not JSON .*; a file in COCO format is needed"):
        check_coco(tmp_path / 'train.json', tmp_path)
