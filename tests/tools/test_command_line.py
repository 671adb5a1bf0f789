"""User errors end with one sentence and status 2."""

import logging
import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from msda_plugin import __version__
from msda_plugin.__main__ import COMMANDS, main

ROOT = Path(__file__).parents[2]

BASE = """
runner_type = 'msda_plugin.DetectionRunner'
default_scope = 'mmdet'
model = dict(type={model!r}, **{fields!r})
"""


def write(tmp_path, model, **fields):
    path = tmp_path / 'config.py'
    path.write_text(BASE.format(model=model, fields=fields))
    return str(path)


@pytest.fixture(autouse=True)
def quiet_logging(monkeypatch):
    """MMEngine's loggers keep the stream that pytest replaced for an earlier test."""
    monkeypatch.setattr(logging, 'raiseExceptions', False)


def sentence(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert 'Traceback' not in message
    return message


def test_unknown_command(capsys):
    assert main(['trian']) == 2
    assert "unknown command 'trian'" in capsys.readouterr().err


@pytest.mark.parametrize('argv', [[], ['--help']])
def test_usage_lists_every_command(argv, capsys):
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)


def test_version(capsys):
    assert main(['--version']) == 0
    assert capsys.readouterr().out == f'msda_plugin {__version__}\n'


def test_executable(capsys, monkeypatch):
    """The entry point of pyproject.toml, called as its script does."""
    scripts = re.search(r'^\[project.scripts\]\n(\S+) = "(\S+)"', (ROOT / 'pyproject.toml').read_text(), re.MULTILINE)
    assert scripts[1] == 'msda-plugin'
    monkeypatch.setattr(sys, 'argv', ['msda-plugin', '--version'])
    assert EntryPoint(scripts[1], scripts[2], 'console_scripts').load()() == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize('command', COMMANDS)
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, '--help'])
    assert stopped.value.code == 0
    assert f'python -m msda_plugin {command}' in capsys.readouterr().out


def test_missing_config(tmp_path, capsys):
    assert 'does not exist' in sentence(['train', str(tmp_path / 'none.py')], capsys)


def test_unknown_type_suggests_similar_name(tmp_path, capsys):
    config = write(tmp_path, 'msda_plugin.ShuntedTransfomer')
    message = sentence(['train', config, '--work-dir', str(tmp_path)], capsys)
    assert 'msda_plugin.ShuntedTransfomer' in message and 'did you mean msda_plugin.ShuntedTransformer' in message


def test_unknown_arch_lists_known_ones(tmp_path, capsys):
    config = write(tmp_path, 'msda_plugin.ShuntedTransformer', arch='giant')
    message = sentence(['train', config, '--work-dir', str(tmp_path)], capsys)
    assert 'giant' in message and all(arch in message for arch in ('tiny', 'small', 'base'))


def test_missing_checkpoint(tmp_path, capsys):
    config = write(tmp_path, 'msda_plugin.ShuntedTransformer', arch='tiny')
    message = sentence(['test', config, str(tmp_path / 'none.pth')], capsys)
    assert 'checkpoint' in message and 'does not exist' in message


@pytest.mark.parametrize(
    'where, lines',
    [
        ('load_from', "load_from = 'none.pth'"),
        ('model.init_cfg.checkpoint', "model['init_cfg'] = dict(type='Pretrained', checkpoint='none.pth')"),
    ],
)
def test_missing_weights(where, lines, tmp_path, capsys):
    config = write(tmp_path, 'msda_plugin.ShuntedTransformer', arch='tiny')
    with open(config, 'a') as file:
        file.write(lines + '\n')
    message = sentence(['train', config, '--work-dir', str(tmp_path)], capsys)
    assert f'none.pth of {where} does not exist' in message


def write_with_data(tmp_path, annotations=None, dataset='CocoDataset'):
    config = write(tmp_path, 'msda_plugin.MultiScaleDeformableAttention')
    if annotations is not None:
        (tmp_path / 'train.json').write_text(annotations)
    with open(config, 'a') as file:
        file.write(f"""
train_dataloader = dict(batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler'), dataset=dict(
    type={dataset!r}, data_root={str(tmp_path if annotations else tmp_path / 'nowhere')!r},
    ann_file='train.json', data_prefix=dict(img='')))
train_cfg = dict(by_epoch=True, max_epochs=1)
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1))
""")
    return config


def test_missing_data_root(tmp_path, capsys):
    message = sentence(['train', write_with_data(tmp_path), '--work-dir', str(tmp_path)], capsys)
    assert 'nowhere' in message and 'does not exist' in message


@pytest.mark.parametrize('annotations', ['not json', '[1, 2]', '{"images": []}'])
def test_annotations_not_in_coco_format(annotations, tmp_path, capsys):
    message = sentence(['train', write_with_data(tmp_path, annotations), '--work-dir', str(tmp_path)], capsys)
    assert 'train.json' in message and 'COCO' in message


def test_unknown_dataset_type(tmp_path, capsys):
    config = write_with_data(tmp_path, '{}', dataset='CocoDatset')
    message = sentence(['train', config, '--work-dir', str(tmp_path)], capsys)
    assert 'CocoDatset' in message and 'did you mean' in message and 'CocoDataset' in message


def test_broken_config_file(tmp_path, capsys):
    (tmp_path / 'config.py').write_text('model = dict(type=undefined_name)\n')
    assert 'undefined_name' in sentence(['train', str(tmp_path / 'config.py')], capsys)


def test_config_without_test_data(tmp_path, capsys):
    config = write(tmp_path, 'msda_plugin.ShuntedTransformer', arch='tiny')
    (tmp_path / 'a.pth').touch()
    assert 'has no test data; add test_dataloader' in sentence(['test', config, str(tmp_path / 'a.pth')], capsys)
