"""User errors end with one sentence and status 2."""

import logging
import os
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from msda_plugin import __version__
from msda_plugin.__main__ import COMMANDS, main
from msda_plugin.tools import train
from msda_plugin.tools.common import launch, mixed_precision

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


# ---- --cfg-options and the arguments of train and test ---------------------------------------------------------------
TRAINABLE = """
data_root = 'nowhere/'
train_dataloader = dict(batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler'), dataset=[1])
train_cfg = dict(by_epoch=True, max_epochs=1)
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1))
"""


@pytest.fixture
def trainable(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = write(tmp_path, 'msda_plugin.MultiScaleDeformableAttention')
    with open(config, 'a') as file:
        file.write(TRAINABLE)
    return config


@pytest.mark.parametrize(
    'option, message',
    [
        ('foo', "--cfg-options takes KEY=VALUE, such as train_cfg.max_epochs=12; got 'foo'"),
        ("model.x=dict(type='nms'", 'cannot read the value of model.x'),
        ('mdoel.backbone.arch=tiny', "'mdoel' is not in the config; did you mean model.backbone.arch?"),
        ('optim_wrapper.optimizer.lr=abc', "optim_wrapper.optimizer.lr must be a number of 0 or more, got 'abc'"),
        ('optim_wrapper.optimizer.type=SGDD', "there is no type 'SGDD' in the registry optimizer; did you mean SGD"),
        ('train_cfg.max_epoch=1', "EpochBasedTrainLoop has no argument 'max_epoch'; did you mean max_epochs?"),
        ('device=cuda:77', 'device is cuda:77, but torch'),
    ],
)
def test_wrong_options_of_train(trainable, option, message, capsys):
    assert message in sentence(['train', trainable, '--work-dir', 'work', '--cfg-options', option], capsys)


@pytest.mark.parametrize('device, wrapper, hooks', [('cpu', None, 1), ('cuda', 'AmpOptimWrapper', 0)])
def test_mixed_precision_of_a_config(trainable, device, wrapper, hooks, monkeypatch):
    class Built(BaseException):
        pass

    def build(cfg, *splits):
        assert cfg.optim_wrapper.get('type') == wrapper
        assert [hook.type for hook in cfg.get('custom_hooks', [])] == ['msda_plugin.AccelerateHook'] * hooks
        raise Built

    monkeypatch.setattr(mixed_precision, 'get_device', lambda: device)
    monkeypatch.setattr(launch, 'build_runner', build)
    with pytest.raises(Built):
        train.main([str(trainable), '--amp'])


def test_wrong_options_of_test(trainable, tmp_path, capsys):
    (tmp_path / 'a.pth').touch()
    message = sentence(['test', trainable, 'a.pth', '--cfg-options', 'mdoel.a=1'], capsys)
    assert "'mdoel' is not in the config; did you mean model.a?" in message


@pytest.mark.parametrize('name', ['annotations.json', 'broken.json', 'settings.yaml', 'empty.py'])
def test_a_file_that_is_no_config(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    texts = {'annotations.json': '{"images": [], "categories": []}', 'settings.yaml': 'a: 1'}
    (tmp_path / name).write_text(texts.get(name, '{' if name == 'broken.json' else ''))
    message = sentence(['train', name], capsys)
    assert f'{name} is not a config with a model; give the path of a Python config file' in message
    assert (f'use --data {name}' in message) == name.endswith('.json')


def test_a_config_that_cannot_be_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'syntax.py').write_text('a = 1\nmodel = dict(\n')
    (tmp_path / 'child.py').write_text("_base_ = 'nowhere.py'\n")
    (tmp_path / 'folder.py').mkdir()
    assert 'syntax.py, or a file in its _base_, is not valid Python: ' in sentence(['train', 'syntax.py'], capsys)
    message = sentence(['train', 'child.py'], capsys)
    assert 'child.py inherits from ' in message and 'nowhere.py, which does not exist; correct _base_' in message
    assert 'folder.py is a folder; give the path of a Python config file' in sentence(['train', 'folder.py'], capsys)


def test_a_work_dir_that_is_a_file(trainable, tmp_path, capsys):
    (tmp_path / 'file').touch()
    for name in ('file', 'file/below'):
        message = sentence(['train', trainable, '--work-dir', name], capsys)
        assert f'--work-dir: {name} cannot be a folder, because file is a file' in message


def test_a_checkpoint_that_is_a_folder(trainable, tmp_path, capsys):
    (tmp_path / 'folder.pth').mkdir()
    assert 'folder.pth is a folder; give' in sentence(['test', trainable, 'folder.pth'], capsys)
    assert '--resume is a folder; give' in sentence(['train', trainable, '--resume', 'folder.pth'], capsys)
    message = sentence(['train', trainable, '--cfg-options', 'load_from=folder.pth'], capsys)
    assert 'folder.pth of load_from is a folder' in message


def test_extend_needs_a_checkpoint(trainable, capsys):
    assert '--extend requires --resume' in sentence(['train', trainable, '--extend'], capsys)
    assert 'the checkpoint none.pth of --resume does not exist' in sentence(
        ['train', trainable, '--extend', '--resume', 'none.pth'], capsys
    )


def test_benchmark_on_a_device_that_is_missing(capsys):
    assert 'benchmark op: --device is cuda:77, but torch' in sentence(
        ['benchmark', 'op', '--device', 'cuda:77'], capsys
    )


@pytest.mark.parametrize('argv', [['--help'], ['train', '--help']])
def test_a_closed_pipe(argv):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write) as pipe:
        done = subprocess.run(
            [sys.executable, '-m', 'msda_plugin', *argv], stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=300
        )
    assert done.stderr == '' and done.returncode in (0, 141)  # argparse ignores an error of a long text
