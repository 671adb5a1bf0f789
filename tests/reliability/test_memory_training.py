"""Memory, threads and file handles of a training do not grow."""

import json

import numpy as np
import pytest
from small_training import arguments, make_data

pytestmark = pytest.mark.slow

MB = 2**20


def test_memory_threads_and_files_stay_the_same(training_server, small_data, tmp_path, long_run):
    images, epochs = (400, 5) if long_run else (12, 5)
    data = make_data(tmp_path / 'data', train=images) if long_run else small_data
    options = [
        'train_dataloader.batch_size=1',
        f'train_cfg.max_epochs={epochs}',
        'train_cfg.val_interval=1',
        'default_hooks.logger.interval=10',
    ]
    log, measured = tmp_path / 'log', tmp_path / 'measured'
    answer = training_server.run(arguments(data, tmp_path / 'work', *options), log, measure=str(measured))
    assert answer['status'] == 0, log.read_text()[-3000:]
    rows = np.array(json.loads(measured.read_text())[:-1])
    assert len(rows) == images * epochs
    late = rows[len(rows) // 4 :]  # after the first validation
    slope = np.polyfit(late[:, 0], late[:, 1] / MB, 1)[0] * 1000
    print(
        f'\n{len(rows)} iterations, {epochs} validations and checkpoints: memory {late[0, 1] / MB:.1f} MB after '
        f'iteration {late[0, 0]}, {late[-1, 1] / MB:.1f} MB at the end, slope {slope:+.2f} MB per 1000 iterations; '
        f'threads {sorted(set(late[:, 2].tolist()))}, file handles {sorted(set(late[:, 3].tolist()))}'
    )
    assert slope < (10 if long_run else 200)
    assert len(set(late[:, 2])) == 1  # threads
    half = len(late) // 2
    assert late[half:, 3].max() <= late[:half, 3].max()  # file handles; some are open only for a moment


def test_trainings_one_after_another_do_not_leak(training_server, small_data, tmp_path, long_run):
    times = 20 if long_run else 3
    options = ['train_cfg.max_epochs=1', 'train_cfg.val_interval=1']
    log, measured = tmp_path / 'log', tmp_path / 'measured'
    answer = training_server.run(
        [arguments(small_data, tmp_path / str(i), *options) for i in range(times)], log, measure=str(measured)
    )
    assert answer['status'] == 0, log.read_text()[-3000:]
    rows = np.array([row for row in json.loads(measured.read_text()) if row[0] == 0])
    print(
        f'\n{times} trainings in one process: memory {np.round(rows[:, 1] / MB).astype(int).tolist()} MB, threads '
        f'{rows[:, 2].tolist()}, file handles {rows[:, 3].tolist()}'
    )
    assert rows[-1, 2] == rows[0, 2] and rows[-1, 3] == rows[0, 3]
    if long_run:
        assert np.polyfit(range(times - 2), rows[2:, 1] / MB, 1)[0] < 5  # MB for each training
