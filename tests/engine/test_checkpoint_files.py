"""Which checkpoints are complete, and which one to resume from."""

import os

import pytest
import torch

from msda_plugin.engine.checkpoint_files import is_complete, last_checkpoint, latest_complete_checkpoint


@pytest.fixture
def work_dir(tmp_path):
    """Three checkpoints, the third of which last_checkpoint names."""
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


def test_damage_is_detected(work_dir):
    path = work_dir / 'epoch_1.pth'
    content = path.read_bytes()
    assert is_complete(path)
    for kept in (0, 1, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:kept])
        assert not is_complete(path)
    middle = len(content) // 2  # of the numbers
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    assert not is_complete(path)
    path.unlink()
    assert not is_complete(path)


def test_the_recorded_checkpoint_is_used(work_dir):
    (work_dir / 'last_checkpoint').write_text(f'{work_dir}/epoch_2.pth')
    assert latest_complete_checkpoint(work_dir, 'epoch_*.pth') == (f'{work_dir}/epoch_2.pth', [])


@pytest.mark.parametrize('kept', [0, None])
def test_damaged_checkpoints_are_skipped(work_dir, kept):
    for epoch in (3, 2):
        damage(work_dir / f'epoch_{epoch}.pth', kept)
    assert latest_complete_checkpoint(work_dir, 'epoch_*.pth') == (
        f'{work_dir}/epoch_1.pth',
        [f'{work_dir}/epoch_3.pth', f'{work_dir}/epoch_2.pth'],
    )
    damage(work_dir / 'epoch_1.pth', kept)
    with pytest.raises(ValueError, match='epoch_1.pth.*start again without --resume'):
        latest_complete_checkpoint(work_dir, 'epoch_*.pth')


def test_an_empty_record_and_a_moved_folder(work_dir):
    (work_dir / 'last_checkpoint').write_text('')
    assert latest_complete_checkpoint(work_dir, 'epoch_*.pth') == (f'{work_dir}/epoch_3.pth', [])
    (work_dir / 'last_checkpoint').write_text('/another/folder/epoch_3.pth')
    assert latest_complete_checkpoint(work_dir, 'epoch_*.pth') == (
        f'{work_dir}/epoch_3.pth',
        ['/another/folder/epoch_3.pth'],
    )
    assert last_checkpoint(work_dir) == '/another/folder/epoch_3.pth'
    (work_dir / 'last_checkpoint').unlink()
    assert last_checkpoint(work_dir) is None
    assert latest_complete_checkpoint(work_dir, 'epoch_*.pth') == (None, [])
