"""Atomic writes."""

import errno
import os

import pytest

from msda_plugin.files import atomic_write, remove_unfinished


def test_a_file_is_replaced_in_one_step(tmp_path):
    path = tmp_path / 'file'
    path.write_text('old')
    with atomic_write(path) as unfinished:
        unfinished.write_text('new')
        assert path.read_text() == 'old' and unfinished.parent == tmp_path
    assert path.read_text() == 'new' and os.listdir(tmp_path) == ['file']


@pytest.mark.parametrize('error', [KeyboardInterrupt(), OSError(errno.ENOSPC, 'No space left on device')])
def test_an_error_keeps_the_old_file(tmp_path, error):
    path = tmp_path / 'file'
    path.write_text('old')
    with pytest.raises(type(error)) as raised, atomic_write(path) as unfinished:
        unfinished.write_text('ne')
        raise error
    assert path.read_text() == 'old' and os.listdir(tmp_path) == ['file']
    assert getattr(raised.value, 'filename', str(path)) == str(path)  # for the message about a full disk


def test_only_unfinished_files_are_removed(tmp_path):
    for name in ('epoch_4.pth', '.hidden', '.epoch_5.pth.123.tmp', '.metrics.json.123.tmp'):
        (tmp_path / name).touch()
    remove_unfinished(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ['.hidden', 'epoch_4.pth']


def test_processes_do_not_share_a_temporary_file(tmp_path):
    with atomic_write(tmp_path / 'file') as unfinished:
        assert str(os.getpid()) in unfinished.name
        unfinished.touch()
