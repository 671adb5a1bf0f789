"""``benchmark detectors``: the training commands and the table."""

import argparse
import json
import sys

import pytest

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
