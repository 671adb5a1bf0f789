"""Files that are whole or not there, and the newest whole checkpoint among damaged ones."""

import errno
import os

import pytest
import torch

from msda_plugin.engine.checkpoint_files import (
    atomic_write,
    is_whole,
    latest_whole_checkpoint,
    remove_unfinished_checkpoints,
)


@pytest.fixture
def work_dir(tmp_path):
    """Three checkpoints, of which last_checkpoint names the third; a newer file is none."""
    for epoch in (1, 2, 3):
        path = tmp_path / f'epoch_{epoch}.pth'
        torch.save(dict(state_dict=dict(weight=torch.full((999,), epoch))), path)
        os.utime(path, (epoch, epoch))
    (tmp_path / 'last_checkpoint').write_text(str(path))
    (tmp_path / 'best_coco_bbox_mAP_epoch_3.pth').write_bytes(path.read_bytes())
    return tmp_path


def damage(path, kept=None):
    time = path.stat().st_mtime
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2 if kept is None else kept])
    os.utime(path, (time, time))


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / 'file'
    path.write_text('old')
    with atomic_write(path) as unfinished:
        unfinished.write_text('new')
        assert path.read_text() == 'old' and unfinished.parent == tmp_path
    assert path.read_text() == 'new' and os.listdir(tmp_path) == ['file']


@pytest.mark.parametrize('error', [KeyboardInterrupt(), OSError(errno.ENOSPC, 'No space left on device')])
def test_after_an_error_the_old_file_is_there(tmp_path, error):
    path = tmp_path / 'file'
    path.write_text('old')
    with pytest.raises(type(error)) as raised, atomic_write(path) as unfinished:
        unfinished.write_text('ne')
        raise error
    assert path.read_text() == 'old' and os.listdir(tmp_path) == ['file']
    assert getattr(raised.value, 'filename', str(path)) == str(path)  # of a full disk: what could not be written


def test_only_unfinished_checkpoints_are_removed(work_dir):
    before = sorted(os.listdir(work_dir))
    (work_dir / '.epoch_4.pth.tmp').write_text('half')
    remove_unfinished_checkpoints(work_dir)
    assert sorted(os.listdir(work_dir)) == before


def test_every_damage_is_seen(work_dir):
    path = work_dir / 'epoch_1.pth'
    content = path.read_bytes()
    assert is_whole(path)
    for kept in (0, 1, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:kept])
        assert not is_whole(path)
    middle = len(content) // 2  # of the numbers
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    assert not is_whole(path)
    path.unlink()
    assert not is_whole(path)


def test_the_recorded_one_is_taken(work_dir):
    (work_dir / 'last_checkpoint').write_text(f'{work_dir}/epoch_2.pth')
    assert latest_whole_checkpoint(work_dir, 'epoch_*.pth') == (f'{work_dir}/epoch_2.pth', [])


@pytest.mark.parametrize('kept', [0, None])
def test_damaged_ones_are_passed_over(work_dir, kept):
    for epoch in (3, 2):
        damage(work_dir / f'epoch_{epoch}.pth', kept)
    assert latest_whole_checkpoint(work_dir, 'epoch_*.pth') == (
        f'{work_dir}/epoch_1.pth',
        [f'{work_dir}/epoch_3.pth', f'{work_dir}/epoch_2.pth'],
    )
    damage(work_dir / 'epoch_1.pth', kept)
    with pytest.raises(ValueError, match='epoch_1.pth.*start anew'):
        latest_whole_checkpoint(work_dir, 'epoch_*.pth')


def test_a_record_that_says_nothing_and_a_folder_that_was_moved(work_dir):
    (work_dir / 'last_checkpoint').write_text('')
    assert latest_whole_checkpoint(work_dir, 'epoch_*.pth') == (f'{work_dir}/epoch_3.pth', [])
    (work_dir / 'last_checkpoint').write_text('/another/folder/epoch_3.pth')
    assert latest_whole_checkpoint(work_dir, 'epoch_*.pth') == (
        f'{work_dir}/epoch_3.pth',
        ['/another/folder/epoch_3.pth'],
    )
    (work_dir / 'last_checkpoint').unlink()
    assert latest_whole_checkpoint(work_dir, 'epoch_*.pth') == (None, [])
