"""``benchmark detectors``: the training commands and the table."""

import argparse
import json
import sys

import pytest
from mmengine.config import Config, DictAction

from msda_plugin.tools.benchmarks import detectors


def arguments(*argv):
    parser = argparse.ArgumentParser()
    detectors.add_parser(parser.add_subparsers())
    return parser.parse_args(['detectors', *argv])


def fake_training(status=0):
    def run(command, stdout, stderr):
        work_dir = command[command.index('--work-dir') + 1]
        assert command[:4] == [sys.executable, '-m', 'msda_plugin', 'train']
        assert command[-3:] == ['train_cfg.max_epochs=2', 'train_cfg.val_interval=2', 'data_root=mine/']
        scalars = detectors.Path(work_dir, '20260101_000000', 'vis_data', 'scalars.json')
        scalars.parent.mkdir(parents=True)
        scalars.write_text(
            '\n'.join(
                json.dumps(entry)
                for entry in (dict(loss=12.34, iter=50), dict(loss=5.04, iter=100), {'coco/bbox_mAP': 0.4})
            )
        )
        detectors.Path(work_dir, 'metrics.json').write_text(
            json.dumps(
                dict(num_trainable_params=3_517_086, train_seconds=150.0, final=dict(bbox_mAP=0.4, bbox_mAP_50=0.6))
            )
        )
        return argparse.Namespace(returncode=status)

    return run


def test_one_row_per_config(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(detectors.subprocess, 'run', fake_training())
    options = ('--epochs', '2', '--data-root', 'mine', '--work-dir', str(tmp_path))
    assert detectors.run(arguments('configs/a.py', 'b.py', *options)) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(('| a', '| b'))]
    assert rows == [f'| {name} | 3.52 | 2.5 | 12.3 -> 5.0 | 0.400 | 0.600 |' for name in 'ab']


def test_stops_after_failed_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(detectors.subprocess, 'run', fake_training(status=2))
    options = ('--epochs', '2', '--data-root', 'mine/', '--work-dir', str(tmp_path))
    assert detectors.run(arguments('a.py', 'b.py', *options)) == 2
    assert f'the training of a.py ended with status 2; see {tmp_path}/a/output.txt' in capsys.readouterr().err
    assert not (tmp_path / 'b').exists()


@pytest.mark.parametrize('epochs', ['0', '-1'])
def test_invalid_epochs(epochs, capsys):
    assert detectors.run(arguments('a.py', '--epochs', epochs)) == 2
    assert 'at least 1 is needed' in capsys.readouterr().err


SCHEDULE = """
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=8)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=150),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=4, end=8, T_max=4),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=0, T_max=8),
    dict(type='MultiStepLR', milestones=[4, 6], by_epoch=True)]
"""


@pytest.mark.parametrize(
    'epochs, cosine, milestones',
    [
        (16, dict(begin=8, end=16, T_max=8), [8, 12]),
        (2, dict(begin=1, end=2, T_max=1), [1, 2]),
        (1, dict(begin=0, end=1, T_max=1), [1, 1]),
    ],
)
def test_schedules_are_scaled_to_the_training(epochs, cosine, milestones, tmp_path):
    (tmp_path / 'config.py').write_text(SCHEDULE)
    options = detectors.schedule_options(str(tmp_path / 'config.py'), epochs)
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    cfg = Config.fromfile(str(tmp_path / 'config.py'))
    cfg.merge_from_dict(parser.parse_args(['--cfg-options', *options]).cfg_options)
    warm_up, late, full, steps = cfg.param_scheduler
    assert warm_up.end == 150 and {key: late[key] for key in cosine} == cosine
    assert full.T_max == epochs and steps.milestones == milestones
