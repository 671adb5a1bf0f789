"""``benchmark own_data``: the training commands and the table."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from msda_plugin.tools.benchmarks import own_data
from msda_plugin.tools.train import _parser


def arguments(*argv):
    parser = argparse.ArgumentParser()
    own_data.add_parser(parser.add_subparsers())
    return parser.parse_args(['own_data', *map(str, argv)])


@pytest.fixture
def trainings(monkeypatch):
    """The arguments of each training, which takes no time and reaches an AP of a tenth of its seed."""
    started = []

    def run(command, stdout, stderr, env):
        assert command[:3] == [sys.executable, '-c', own_data.TRAIN] and env['OMP_NUM_THREADS'] == '1'
        args = _parser().parse_args(command[3:])
        started.append(args)
        work_dir = Path(args.work_dir)
        assert [path.name for path in work_dir.iterdir()] == ['output.txt']  # train refuses the folder of another
        (work_dir / 'config.py').write_text('train_dataloader = dict(batch_size=2)\n')
        final = dict(iter=100, bbox_mAP=args.seed / 10, bbox_mAP_50=args.seed / 5, train_bbox_mAP=None)
        (work_dir / 'metrics.json').write_text(json.dumps(dict(final=final)))
        return argparse.Namespace(returncode=3 if args.data == 'bad' else 0)

    monkeypatch.setattr(own_data.subprocess, 'run', run)
    return started


def test_a_row_per_model_and_data(trainings, tmp_path, capsys):
    assert own_data.run(arguments('a', 'b', '--minutes', 1.5, '--models', 'm.py', '--work-dir', tmp_path)) == 0
    assert [(args.data, args.seed) for args in trainings] == [(data, seed) for data in 'ab' for seed in range(3)]
    for args in trainings:
        assert (args.minutes, args.workers, args.device, args.model) == (1.5, 0, 'cpu', 'm.py')
        assert args.skip_bad_images and not args.from_scratch
    assert len({args.work_dir for args in trainings}) == 6
    values = '200 | 0.100 (0.000 to 0.200) | 0.200 (0.000 to 0.400) | 0.000 (0.000 to 0.000) |'
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert rows == [f'| a | m | {values}', f'| b | m | {values}']


def test_stops_after_a_failed_training(trainings, tmp_path, capsys):
    options = ('--seeds', 1, '--work-dir', tmp_path, '--options', '--from-scratch', '--augment', 'strong')
    assert own_data.run(arguments('bad', 'a', *options)) == 3
    assert len(trainings) == 1 and trainings[0].from_scratch and trainings[0].augment == 'strong'
    assert 'on bad ended with status 3; see' in capsys.readouterr().err


def test_finished_trainings_are_not_repeated(trainings, tmp_path, capsys):
    options = ('--models', 'm.py', '--work-dir', tmp_path)
    assert own_data.run(arguments('a', *options, '--seeds', 2)) == 0
    assert own_data.run(arguments('a', *options, '--seeds', 3)) == 0
    assert [args.seed for args in trainings] == [0, 1, 2]
    assert '0.100 (0.000 to 0.200)' in capsys.readouterr().out.splitlines()[-1]


def test_trainings_with_other_options_are_kept(trainings, tmp_path):
    options = ('--models', 'm.py', '--work-dir', tmp_path, '--seeds', 1)
    assert own_data.run(arguments('a', *options)) == 0
    with pytest.raises(ValueError, match='a_m_0 contains a training with other options: .* --minutes 40 .*--work-dir'):
        own_data.run(arguments('a', *options, '--minutes', 2))
    assert len(trainings) == 1 and (tmp_path / 'a_m_0/finished.txt').exists()


def test_an_unfinished_training_starts_anew(trainings, tmp_path):
    for _ in range(2):
        assert own_data.run(arguments('bad', '--seeds', 1, '--models', 'm.py', '--work-dir', tmp_path)) == 3
    assert len(trainings) == 2


def test_trainings_count_cpu_time():
    code = own_data.TRAIN.split('from msda_plugin')[0] + 'time.sleep(1); print(time.monotonic(), time.perf_counter())'
    output = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert all(float(value) < 0.9 for value in output.split())
