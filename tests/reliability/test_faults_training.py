"""A training that was killed or ran out of disk resumes, and ends with the same weights."""

import json
import random
import re
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
from small_training import EPOCHS, arguments, broken_checkpoints, differences, files_of, processes_of

FIXED_FAULTS = (  # one after another, in one training
    dict(fault=['hook', 5, 'after_train_iter']),  # in the second epoch
    dict(fault=['write', 2, 0.4]),  # of checkpoints: after the first validation
    dict(fault=['hook', 3, 'after_val_iter']),  # in the last validation
    dict(fault=['rename', 1, 'metrics.json', True]),  # when it is repeated, before the report is written
)


def draw(generator, seconds):
    """A random fault in a training that takes this number of seconds."""
    some = [
        dict(kill_after=generator.uniform(0, seconds)),
        dict(fault=['hook', generator.randint(1, 9), 'after_train_iter']),
        dict(fault=['hook', generator.randint(1, 3), 'after_val_iter']),
        dict(fault=['hook', 1, 'after_val_epoch']),
        dict(fault=['write', generator.randint(1, 4), generator.random()]),
        dict(fault=['rename', generator.randint(1, 4), '.pth', generator.random() < 0.5]),
        dict(fault=['rename', generator.randint(1, 3), 'last_checkpoint', generator.random() < 0.5]),
        dict(fault=['rename', 1, 'metrics.json', True]),
        dict(fault=['remove', 1]),
    ]
    return generator.choice(some)


def ends_like(work_dir, undisturbed):
    """Whether files and checkpoints equal those of an uninterrupted training."""
    ours, theirs = files_of(work_dir), files_of(undisturbed)
    assert [name for name in ours if name.endswith('.pth')] == [name for name in theirs if name.endswith('.pth')]
    assert set(theirs) <= set(ours) and not [name for name in ours if name.endswith('.tmp')]
    for name in theirs:
        if name.endswith('.pth'):
            assert differences(work_dir / name, undisturbed / name) == []
    histories = [
        [(entry['iter'], entry['bbox_mAP']) for entry in json.loads((folder / 'metrics.json').read_text())['history']]
        for folder in (work_dir, undisturbed)
    ]
    assert histories[0] == histories[1]
    return True


def train_through(faults, server, data, work_dir):
    """Train to the end, resuming after each fault. Returns the kinds of faults that killed the training."""
    log, record, kills = work_dir.with_suffix('.log'), work_dir / 'last_checkpoint', []
    for fault in (*faults, {}):  # the last run has no fault
        known = Path(record.read_text()).stem.removeprefix('epoch_') if record.exists() else None
        start = log.stat().st_size if log.exists() else 0
        status = server.run(arguments(data, work_dir) + ['--resume'] * bool(kills), log, **fault)['status']
        said = log.read_bytes()[start:].decode()
        assert status in (0, -9), said[-3000:]
        assert not work_dir.exists() or broken_checkpoints(work_dir) == []
        if status == 0:
            assert re.findall(r'resumed epoch: (\d+)', said) == ([known] if known else [])
            return kills
        kills.append(fault['fault'][0] if 'fault' in fault else 'at any moment')


def test_killed_trainings_end_like_an_uninterrupted_one(small_data, training_server, undisturbed, tmp_path, long_run):
    reference, seconds = undisturbed
    generator, kills, trainings = random.Random(0), Counter(), 0
    while kills.total() < (50 if long_run else len(FIXED_FAULTS)):
        trainings += 1
        work_dir = tmp_path / str(trainings)
        faults = [draw(generator, seconds) for _ in range(8)] if long_run else FIXED_FAULTS
        kills.update(train_through(faults, training_server, small_data, work_dir))
        assert ends_like(work_dir, reference)
    print(
        f'\n{kills.total()} kills in {trainings} trainings, {dict(kills)}: every training ended with the weights of '
        'one without a break, bit for bit'
    )
    end = time.monotonic() + 20
    while processes_of(training_server.sessions) and time.monotonic() < end:
        time.sleep(0.2)
    assert processes_of(training_server.sessions) == []  # data-loading processes end by themselves


@pytest.mark.parametrize('damage', ['half', 'empty'])
def test_a_damaged_checkpoint_is_skipped(damage, small_data, training_server, undisturbed, tmp_path, long_run):
    if damage == 'empty' and not long_run:
        pytest.skip('only with --long')
    work_dir = tmp_path / 'work'
    shutil.copytree(undisturbed[0], work_dir)
    last = work_dir / f'epoch_{EPOCHS}.pth'
    (work_dir / 'last_checkpoint').write_text(str(last))
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2 if damage == 'half' else 0])
    log = tmp_path / 'log'
    answer = training_server.run([*arguments(small_data, work_dir), '--resume'], log)
    said = log.read_text()
    assert answer['status'] == 0 and f'resumed epoch: {EPOCHS - 1}' in said, said[-3000:]
    assert len(re.findall(f'WARNING.*cannot resume from {last} .*resuming from .*epoch_{EPOCHS - 1}.pth', said)) == 1
    assert differences(last, undisturbed[0] / last.name) == []


def one_sentence(log):
    """The one line that a failed training printed to standard error."""
    said = log.read_text()
    assert 'Traceback' not in said and said.count('msda_plugin train: ') == 1, said[-3000:]
    return said.rpartition('msda_plugin train: ')[2]


def test_files_that_cannot_grow(small_data, training_server, tmp_path):
    work_dir, log = tmp_path / 'work', tmp_path / 'log'
    answer = training_server.run(arguments(small_data, work_dir), log, max_file_size=100_000)
    assert answer['status'] == 1
    sentence = one_sentence(log)
    assert sentence.startswith(f'cannot write {work_dir}/epoch_1.pth (File too large); there is no checkpoint yet')
    assert [name for name in files_of(work_dir) if 'epoch' in name or 'last' in name] == []


def test_a_full_disk(small_data, training_server, undisturbed, tmp_path):
    work_dir, log = tmp_path / 'work', tmp_path / 'log'
    work_dir.mkdir()
    size = (undisturbed[0] / f'epoch_{EPOCHS}.pth').stat().st_size
    answer = training_server.run(arguments(small_data, work_dir), log, disk=[str(work_dir), int(3.3 * size)])
    if 'unshare failed' in log.read_text():
        pytest.skip('no disk of its own: the system grants no namespaces')
    assert answer['status'] == 1, log.read_text()[-3000:]
    last = Path((work_dir / 'last_checkpoint').read_text())
    sentence = one_sentence(log)
    assert 'cannot write ' in sentence and '(No space left on device)' in sentence
    assert f'the last checkpoint, {last}, is complete' in sentence and '--resume' in sentence
    assert broken_checkpoints(work_dir) == []
    answer = training_server.run([*arguments(small_data, work_dir), '--resume'], log)
    assert answer['status'] == 0, log.read_text()[-3000:]
    assert f'resumed epoch: {last.stem.removeprefix("epoch_")}' in log.read_text()
    assert ends_like(work_dir, undisturbed[0])
