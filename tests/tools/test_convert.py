"""The ``convert`` command: complete outputs with a record of every key, clear errors, and no code of a file runs."""

import argparse
import json
import os
import pickle
import resource
from pathlib import Path

import pytest
import torch
from mmengine.runner import load_checkpoint

from msda_plugin.__main__ import main
from msda_plugin.backbones.vision_transformer import VisionTransformer
from msda_plugin.convert import FAMILIES
from msda_plugin.tools import convert as tool

ARCH = dict(embed_dims=32, depth=2, num_heads=2, mlp_ratio=2)


@pytest.fixture
def published(tmp_path):
    """A checkpoint as training scripts publish it; msda_plugin's ViT uses timm's names."""
    torch.manual_seed(0)
    model = VisionTransformer(ARCH, img_size=32)
    model.init_weights()
    path = tmp_path / 'in.pth'
    torch.save(
        dict(model=model.state_dict() | {'head.weight': torch.zeros(3, 32)}, epoch=7, args=argparse.Namespace(lr=1e-3)),
        path,
    )
    return path, model


def refused(argv, capsys):
    """The error message of a call that exits with status 2 and changes no file."""
    folder = Path(argv[1]).parent
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(SystemExit) as stopped:
        main(['convert', *map(str, argv)])
    assert stopped.value.code == 2
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    out, err = capsys.readouterr()
    assert (
        out == '' and 'Traceback' not in err and err.count('\n') == 2
    )  # the second line explains how to see the traceback
    return err


def test_result_loads_and_every_key_is_recorded(published, tmp_path, capsys):
    source, model = published
    out, account = tmp_path / 'out.pth', tmp_path / 'account.json'
    assert main(['convert', 'vision_transformer', str(source), str(out), '--json', str(account)]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = list(model.state_dict())
    assert lines == [
        *(f'taken    {name} -> {name}' for name in names),
        'dropped  head.weight: classification layer, not part of a backbone',
        f'{len(names)} keys taken, 1 dropped, none missing; {len(names)} entries in the result',
        f'wrote {out}',
    ]
    assert json.loads(account.read_text()) == dict(
        family='vision_transformer',
        source=str(source),
        taken=dict(zip(names, names, strict=True)),
        dropped={'head.weight': 'classification layer, not part of a backbone'},
    )
    loaded = VisionTransformer(ARCH, img_size=32)
    load_checkpoint(loaded, str(out), map_location='cpu', strict=True)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    again = VisionTransformer(ARCH, img_size=32, init_cfg=dict(type='Pretrained', checkpoint=str(out)))
    again.init_weights()
    assert torch.equal(again.pos_embed, model.pos_embed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['account.json', 'in.pth', 'out.pth']
    assert out.stat().st_mode == source.stat().st_mode


def test_prefix(published, tmp_path, capsys):
    _, model = published
    torch.save({f'student.{key}': value for key, value in model.state_dict().items()}, tmp_path / 'student.pth')
    argv = ['vision_transformer', tmp_path / 'student.pth', tmp_path / 'out.pth']
    assert 'no key of' in refused([*argv, '--prefix', 'teacher'], capsys)
    assert main(['convert', *map(str, argv), '--prefix', 'student']) == 0
    assert torch.load(tmp_path / 'out.pth', weights_only=True)['state_dict'].keys() == model.state_dict().keys()


@pytest.mark.parametrize('family', FAMILIES)
def test_every_family_refuses_unexpected_keys(family, tmp_path, capsys):
    torch.save({'model': {'stray.weight': torch.zeros(1)}}, tmp_path / 'in.pth')
    message = refused([family, tmp_path / 'in.pth', tmp_path / 'out.pth'], capsys)
    assert 'stray.weight' in message and len(message) < 10_000


def test_unknown_family_lists_the_known_ones(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(['convert', 'resnet', str(tmp_path / 'in.pth'), str(tmp_path / 'out.pth')])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert 'resnet' in message and all(family in message for family in FAMILIES)


class Touch:
    """Creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize('form', ['zip', 'legacy', 'pickle'])
def test_no_code_in_a_file_runs(form, published, tmp_path, capsys):
    _, model = published
    content = dict(args=Touch(tmp_path / 'ran'), model=model.state_dict())
    path = tmp_path / 'evil.pth'
    if form == 'pickle':
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == 'zip')
    message = refused(['vision_transformer', path, tmp_path / 'out.pth'], capsys)
    assert 'posix.mkdir' in message and 'no code was run' in message
    assert not (tmp_path / 'ran').exists()
    torch.load(path, weights_only=False) if form != 'pickle' else pickle.loads(path.read_bytes())
    assert (tmp_path / 'ran').exists()  # the payload works if pickle is allowed to run it


@pytest.mark.parametrize(
    'content',
    [b'', b'hello', b'<html>404</html>', b'PK\x03\x04 no zip', b'\x80\x02}.', bytes(99), pickle.dumps(1)],
    ids=repr,
)
def test_files_that_are_not_checkpoints(content, tmp_path, capsys):
    (tmp_path / 'in.pth').write_bytes(content)
    message = refused(['vision_transformer', tmp_path / 'in.pth', tmp_path / 'out.pth'], capsys)
    assert 'in.pth cannot be read as a checkpoint' in message or 'holds no state dict' in message


@pytest.mark.parametrize('part', [0.01, 0.5, 0.99])
def test_truncated_file(part, published, tmp_path, capsys):
    source, _ = published
    content = source.read_bytes()
    source.write_bytes(content[: int(len(content) * part)])
    assert 'truncated' in refused(['vision_transformer', source, tmp_path / 'out.pth'], capsys)


def test_failed_write_leaves_no_file(published, tmp_path, capsys):
    """A file size limit makes the write fail halfway."""
    source, _ = published
    (tmp_path / 'there.pth').write_bytes(b'what was there')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (source.stat().st_size // 2, limits[1]))
    try:
        for out in ('out.pth', 'there.pth'):
            message = refused(['vision_transformer', source, tmp_path / out, '--force'], capsys)
            assert f'{out} could not be written' in message
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_interrupted_write_leaves_no_file(tmp_path):
    def write(file):
        file.write(b'half')
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tool.write_complete(tmp_path / 'out.pth', write)
    assert list(tmp_path.iterdir()) == []


def test_existing_files_are_kept_without_force(published, tmp_path, capsys):
    source, model = published
    out, account = tmp_path / 'out.pth', tmp_path / 'account.json'
    out.write_text('mine')
    argv = ['vision_transformer', source, out]
    assert 'out.pth exists; pass --force' in refused(argv, capsys)
    assert main(['convert', *map(str, argv), '--force']) == 0
    assert torch.load(out, weights_only=True)['state_dict'].keys() == model.state_dict().keys()
    account.write_text('mine')
    capsys.readouterr()
    assert 'account.json exists' in refused(
        ['vision_transformer', source, tmp_path / 'new.pth', '--json', account], capsys
    )


def test_in_place(published):
    source, model = published
    assert main(['convert', 'vision_transformer', str(source), str(source), '--force']) == 0
    assert torch.load(source, weights_only=True)['state_dict'].keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    'out, options, message',
    [
        ('none/out.pth', [], 'none of out.pth does not exist'),
        ('', [], 'is a folder'),
        ('out.pth', ['--json', 'none/account.json'], 'none of account.json does not exist'),
        ('out.pth', ['--json', 'out.pth'], 'give different files'),
    ],
)
def test_invalid_output_paths(out, options, message, published, tmp_path, monkeypatch, capsys):
    source, _ = published
    monkeypatch.chdir(tmp_path)
    assert message in refused(['vision_transformer', source, tmp_path / out, *options], capsys)


def test_missing_input(tmp_path, capsys):
    argv = ['vision_transformer', tmp_path / 'none.pth', tmp_path / 'out.pth']
    assert 'none.pth does not exist' in refused(argv, capsys)
