"""Code in checkpoints is not run, whatever the form of the file and wherever it is loaded."""

import io
import itertools
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.registry import RUNNERS
from mmengine.runner import CheckpointLoader, load_checkpoint
from PIL import Image
from torch import nn

from msda_plugin import Detector, compat
from msda_plugin.__main__ import main
from msda_plugin.backbones.vision_transformer import VisionTransformer
from msda_plugin.convert import FAMILIES, load_checkpoint_file
from msda_plugin.engine.inference import load_detector
from msda_plugin.registry import MODELS
from msda_plugin.tools.shapes import generate

CONFIG = Path(__file__).parents[2] / 'configs/shapes/deformable-detr-two-stage_shunted-nano_1xb4-8e_shapes.py'
WORKERS = [
    f'{split}_dataloader.{field}'
    for split in ('train', 'val', 'test')
    for field in ('num_workers=0', 'persistent_workers=False')
]


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, 'w')


class Evaluate(Touch):
    def __reduce__(self):
        return eval, (f'open({self.path!r}, "w")',)


class Partial(Touch):
    def __reduce__(self):
        return partial(open, self.path), ('w',)


class Attribute(Touch):
    """Calls `getattr`, which the allow-list replaces by a restricted function."""

    def __reduce__(self):
        return getattr, (HistoryBuffer, '__init__')


class Module(nn.Module):
    """A pickled module instead of a state dict."""

    def __init__(self, path):
        super().__init__()
        self.extra = Touch(path)


# ---- what a file holds ----------------------------------------------------------------------------------------------
def nested(payload):
    return {'state_dict': OrderedDict(weight=torch.zeros(2), bias=[{'deep': (payload,)}])}


def hidden_metadata(payload):
    state_dict = OrderedDict(weight=torch.zeros(2))
    state_dict._metadata = {'': {'version': payload}}
    return {'state_dict': state_dict}


def optimizer(payload):
    return {
        'state_dict': {},
        'meta': {'epoch': 1, 'iter': 1},
        'optimizer': {'state': {0: {'exp_avg': payload}}, 'param_groups': [{'lr': 0.1, 'params': [0]}]},
    }


def message_hub(payload):
    buffer = HistoryBuffer([1.0], [1])
    buffer.extra = payload
    return {
        'state_dict': {},
        'meta': {'epoch': 1, 'iter': 1},
        'message_hub': {'log_scalars': {'train/loss': buffer}, 'runtime_info': {}, 'resumed_keys': {}},
    }


def object_array(payload):
    return {'state_dict': {}, 'message_hub': {'runtime_info': {'best': np.array([payload], dtype=object)}}}


PLACES = dict(
    direct=lambda payload: payload,
    nested=nested,
    hidden_metadata=hidden_metadata,
    optimizer=optimizer,
    message_hub=message_hub,
    object_array=object_array,
    meta=lambda payload: {'state_dict': {}, 'meta': {'cfg': payload}},
)


# ---- in what form ---------------------------------------------------------------------------------------------------
def as_tar(content, path):
    """The format before torch 0.2: a tar archive of pickles."""
    with tarfile.open(path, 'w') as archive:
        for name, data in (
            ('storages', pickle.dumps(content, 2)),
            ('tensors', pickle.dumps(content, 2)),
            ('pickle', pickle.dumps(content, 2)),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def as_zip_in_zip(content, path):
    """A zip archive of a checkpoint, which torch.hub unpacks."""
    inner = io.BytesIO()
    torch.save(content, inner, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('model.pth', inner.getvalue())


FORMS = dict(
    zip=torch.save,
    legacy=partial(torch.save, _use_new_zipfile_serialization=False),
    pickle=lambda content, path: path.write_bytes(pickle.dumps(content, 2)),
    protocol_0=lambda content, path: path.write_bytes(pickle.dumps(content, 0)),
    protocol_5=lambda content, path: path.write_bytes(pickle.dumps(content, 5)),
    tar=as_tar,
    zip_in_zip=as_zip_in_zip,
)


# ---- where it is read -----------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'shapes'
    generate(str(folder), train=2, val=1, size=(64, 64))
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / 'image.png')
    return folder


@pytest.fixture(autouse=True)
def clean_process(monkeypatch):
    """Start with MMEngine's own loaders, and without its slow report on the machine."""
    compat.restore()
    monkeypatch.setattr('mmengine.runner.runner.collect_env', dict)
    yield
    compat.restore()


def options(data, tmp_path, *more):
    return ['--work-dir', str(tmp_path / 'work'), '--cfg-options', f'data_root={data}/', *WORKERS, *more]


def run_test(path, data, tmp_path):
    main(['test', str(CONFIG), str(path), *options(data, tmp_path)])


def run_load_from(path, data, tmp_path):
    main(['train', str(CONFIG), *options(data, tmp_path, f'load_from={path}')])


def run_resume(path, data, tmp_path):
    main(['train', str(CONFIG), '--resume', str(path), *options(data, tmp_path)])


def run_init_cfg(path, data, tmp_path):
    main(
        [
            'train',
            str(CONFIG),
            *options(data, tmp_path, 'model.init_cfg.type=Pretrained', f'model.init_cfg.checkpoint={path}'),
        ]
    )


def run_mmengine_resume(path, data, tmp_path):
    cfg = Config.fromfile(str(CONFIG))
    cfg.merge_from_dict(dict(data_root=f'{data}/', work_dir=str(tmp_path / 'work'), runner_type='Runner'))
    cfg.train_dataloader.dataset.data_root = f'{data}/'
    cfg.train_dataloader.update(num_workers=0, persistent_workers=False)
    for field in ('val_dataloader', 'val_cfg', 'val_evaluator', 'test_dataloader', 'test_cfg', 'test_evaluator'):
        cfg[field] = None
    RUNNERS.build(cfg).resume(str(path))


ENTRANCES = {
    'test': run_test,
    'train, load_from': run_load_from,
    'train --resume': run_resume,
    'train, init_cfg': run_init_cfg,
    'plain runner.resume': run_mmengine_resume,
    'demo': lambda path, data, tmp_path: main(
        [
            'demo',
            str(data / 'image.png'),
            '--config',
            str(CONFIG),
            '--checkpoint',
            str(path),
            '--out',
            str(tmp_path / 'out'),
        ]
    ),
    'visualize': lambda path, data, tmp_path: main(
        [
            'visualize',
            str(data / 'image.png'),
            '--config',
            str(CONFIG),
            '--checkpoint',
            str(path),
            '--out',
            str(tmp_path / 'out'),
        ]
    ),
    **{
        f'convert {family}': lambda path, data, tmp_path, family=family: main(
            ['convert', family, str(path), str(tmp_path / 'out.pth')]
        )
        for family in FAMILIES
    },
    'load_checkpoint_file': lambda path, data, tmp_path: load_checkpoint_file(path),
    'load_detector': lambda path, data, tmp_path: load_detector(CONFIG, path),
    'Detector': lambda path, data, tmp_path: Detector(path),
    "mmengine's load_checkpoint": lambda path, data, tmp_path: load_checkpoint(nn.Linear(1, 1), str(path)),
    "mmengine's loader": lambda path, data, tmp_path: CheckpointLoader.load_checkpoint(str(path)),
    'init_cfg of our backbone': lambda path, data, tmp_path: VisionTransformer(
        dict(embed_dims=8, depth=1, num_heads=1, mlp_ratio=1),
        img_size=32,
        init_cfg=dict(type='Pretrained', checkpoint=str(path)),
    ).init_weights(),
    'init_cfg of a stock backbone': lambda path, data, tmp_path: MODELS.build(
        dict(type='mmdet.ResNet', depth=18, base_channels=4, init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    ).init_weights(),
}
# MMEngine's own entrances, which `compat.load_checkpoints_strictly` protects; the others do it themselves.
MMENGINE = (
    'plain runner.resume',
    "mmengine's load_checkpoint",
    "mmengine's loader",
    'init_cfg of our backbone',
    'init_cfg of a stock backbone',
)
QUICK = ("mmengine's loader", 'load_checkpoint_file')
SLOW = ('train, load_from', 'train, init_cfg')  # a runner each; `test` and the backbones take the same ways in CI


def refuse(entrance, path, data, tmp_path, ran):
    with (
        compat.load_checkpoints_strictly() if entrance in MMENGINE else nullcontext(),
        pytest.raises((SystemExit, ValueError, OSError)) as raised,
    ):
        ENTRANCES[entrance](path, data, tmp_path)
    assert not ran.exists(), f'{path.name} ran in {entrance}'
    if isinstance(raised.value, SystemExit):
        assert raised.value.code == 2
    else:
        assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize('entrance', ENTRANCES)
def test_no_code_runs_at_any_entrance(entrance, data, tmp_path, long_run):
    """A call in the optimizer's state; with --long every place in every format."""
    if entrance in SLOW and not long_run:
        pytest.skip('the long form alone')
    ran = tmp_path / 'ran'
    cases = list(itertools.product(PLACES, FORMS)) if long_run or entrance in QUICK else [('optimizer', 'zip')]
    for place, form in cases:
        path = tmp_path / f'{place}-{form}.pth'
        FORMS[form](PLACES[place](Touch(ran)), path)
        refuse(entrance, path, data, tmp_path, ran)
    print(f'{entrance}: {len(cases)} files refused')


@pytest.mark.parametrize('entrance', QUICK)
@pytest.mark.parametrize('payload', [Evaluate, Partial, Attribute, Module])
def test_every_kind_of_call_is_refused(payload, entrance, data, tmp_path):
    for form in ('zip', 'legacy'):
        FORMS[form](nested(payload(tmp_path / 'ran')), tmp_path / f'{form}.pth')
        refuse(entrance, tmp_path / f'{form}.pth', data, tmp_path, tmp_path / 'ran')


@pytest.mark.parametrize('name', ['epoch_1.pth', 'model.pt', 'model.bin', 'weights.safetensors', 'weights'])
def test_the_file_name_does_not_matter(name, data, tmp_path):
    for form in ('zip', 'pickle'):
        FORMS[form](nested(Touch(tmp_path / 'ran')), tmp_path / name)
        for entrance in QUICK:
            refuse(entrance, tmp_path / name, data, tmp_path, tmp_path / 'ran')


@pytest.mark.parametrize('place', PLACES)
def test_the_files_run_code_with_weights_only_false(place, tmp_path):
    """Without this, the tests above would prove nothing."""
    for form in ('zip', 'legacy'):
        ran = tmp_path / f'{place}-{form}'
        FORMS[form](PLACES[place](Touch(ran)), tmp_path / 'file.pth')
        torch.load(tmp_path / 'file.pth', weights_only=False)
        assert ran.exists()


def test_a_torchscript_archive_is_refused(data, tmp_path):
    torch.jit.save(torch.jit.trace(nn.Linear(1, 1), torch.zeros(1, 1)), tmp_path / 'script.pth')
    for entrance in QUICK:
        refuse(entrance, tmp_path / 'script.pth', data, tmp_path, tmp_path / 'ran')


# ---- sizes ----------------------------------------------------------------------------------------------------------
def rewritten(source, target, change, compression=zipfile.ZIP_STORED):
    """Copy an archive and replace the content of each record by ``change(name, content)``."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, 'w', compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target


@pytest.mark.parametrize('entrance', QUICK)
def test_an_archive_that_unpacks_to_more_than_itself_is_refused(entrance, data, tmp_path):
    torch.save({'weight': torch.zeros(4_000_000)}, tmp_path / 'large.pth')
    bomb = rewritten(tmp_path / 'large.pth', tmp_path / 'bomb.pth', lambda name, content: content, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 100_000 and torch.load(bomb, weights_only=True)['weight'].numel() == 4_000_000
    with (
        compat.load_checkpoints_strictly() if entrance in MMENGINE else nullcontext(),
        pytest.raises(ValueError, match=r'bomb.pth has \d+ bytes and unpacks to 160\d+: it is compressed'),
    ):
        ENTRANCES[entrance](bomb, data, tmp_path)


@pytest.mark.parametrize('entrance', QUICK)
def test_a_storage_larger_than_its_record_is_refused(entrance, data, tmp_path):
    """It would read beyond its memory."""
    torch.save({'weight': torch.zeros(4)}, tmp_path / 'small.pth')
    four, many = b'K\x04', b'J' + struct.pack('<i', 1 << 30)
    long = rewritten(
        tmp_path / 'small.pth',
        tmp_path / 'long.pth',
        lambda name, content: content.replace(four, many) if name.endswith('data.pkl') else content,
    )
    refuse(entrance, long, data, tmp_path, tmp_path / 'ran')


@pytest.mark.parametrize('entrance', QUICK)
def test_a_view_beyond_its_storage_is_refused(entrance, data, tmp_path):
    torch.save({'weight': torch.zeros(4)}, tmp_path / 'small.pth')
    shape, longer = b'K\x04\x85', b'K\x7f\x85'  # the tuple of the sizes
    long = rewritten(
        tmp_path / 'small.pth',
        tmp_path / 'long.pth',
        lambda name, content: content.replace(shape, longer) if name.endswith('data.pkl') else content,
    )
    refuse(entrance, long, data, tmp_path, tmp_path / 'ran')
