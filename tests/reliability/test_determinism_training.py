"""The same seed gives the same weights, bit for bit, in another process and with any number of workers."""

import os
import subprocess
import sys

import pytest
from small_training import EPOCHS, arguments, differences

pytestmark = pytest.mark.slow


def workers(number):
    persistent = bool(number)
    return [
        f'{split}_dataloader.{field}'
        for split in ('train', 'val')
        for field in (f'num_workers={number}', f'persistent_workers={persistent}')
    ]


def test_other_processes_and_numbers_of_workers(small_data, undisturbed, tmp_path, long_run):
    """In a new process, in which Python hashes strings differently."""
    for number in (1, 0, 2, 3) if long_run else (2,):
        work_dir = tmp_path / str(number)
        done = subprocess.run(
            [sys.executable, '-m', 'msda_plugin', 'train', *arguments(small_data, work_dir, *workers(number))],
            env=dict(os.environ, OMP_NUM_THREADS='1', PYTHONHASHSEED=str(number)),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
        for name in (f'epoch_{EPOCHS}.pth', f'epoch_{EPOCHS - 1}.pth'):
            assert differences(work_dir / name, undisturbed[0] / name) == []
        print(f'\n{number} workers in a process of its own: the same weights, averaged weights and optimizer')


def test_another_seed_gives_other_weights(small_data, training_server, undisturbed, tmp_path):
    """The comparison can fail."""
    options = ['randomness.seed=1', 'train_cfg.max_epochs=1', 'train_dataloader.persistent_workers=False']
    log = tmp_path / 'log'
    answer = training_server.run(arguments(small_data, tmp_path / 'work', *options), log)
    assert answer['status'] == 0, log.read_text()[-3000:]
    assert len(differences(tmp_path / 'work/epoch_1.pth', undisturbed[0] / f'epoch_{EPOCHS}.pth')) > 50
