"""Files of a training that are whole or not there, whatever ends the process that writes them."""

import errno
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch.serialization import get_crc32_options

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of the disk, the quota, and the size that a file may have


class DiskFullError(OSError):
    """A training ended because nothing more can be written; the message says what is kept, and the remedy."""


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Gives the path of a temporary file in the same folder, which becomes `path` when the block ends.

    Until then the former file stays as it was; after an error the temporary one is removed. It is flushed to the disk
    before it is renamed, so that a machine that loses its power leaves either of the two as well.
    """
    path = Path(path)
    unfinished = path.with_name(f'.{path.name}.tmp')
    try:
        yield unfinished
        _flush(unfinished)
        unfinished.replace(path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in FULL:
            error.filename = str(path)
        raise
    with suppress(OSError):  # not every network file system flushes a folder
        _flush(path.parent)


def remove_unfinished_checkpoints(folder: str | os.PathLike) -> None:
    """Remove the temporary files that a killed training left in `folder`."""
    for path in Path(folder).glob('.*.pth.tmp'):
        path.unlink()


def is_whole(path: str | os.PathLike) -> bool:
    """Whether a checkpoint is there to its end and undamaged, by the checksums that torch writes into it.

    Only the file is read, nothing in it is interpreted.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return not get_crc32_options() or archive.testzip() is None
    except (FileNotFoundError, zipfile.BadZipFile, EOFError, zlib.error):
        return False


def latest_whole_checkpoint(work_dir: str | os.PathLike, pattern: str) -> tuple[str | None, list[str]]:
    """The checkpoint to go on from.

    That is the one that ``last_checkpoint`` in `work_dir` names; where this one is not whole or not there, the newest
    whole one of those that match `pattern`, which lie beside it or, when the folder was moved, in `work_dir`.

    Args:
        work_dir: Folder of the training.
        pattern: Of the names of checkpoints, such as ``epoch_*.pth``.

    Returns:
        Its path, None where no checkpoint was ever finished; and the paths of newer ones that are not whole.

    Raises:
        ValueError: There are checkpoints, and none of them is whole.
    """
    record = Path(work_dir, 'last_checkpoint')
    named = record.read_text().strip() if record.is_file() else None
    if named is None:
        return None, []
    folder = Path(named).parent if named and Path(named).parent.is_dir() else Path(work_dir)
    others = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True)
    candidates = list(dict.fromkeys([named] * bool(named) + [str(path) for path in others]))
    for index, path in enumerate(candidates):
        if is_whole(path):
            return path, candidates[:index]
    raise ValueError(
        f'no checkpoint in {folder} is whole ({", ".join(candidates) or "there is none"}); name another '
        'one to go on from, or start anew without resuming'
    )


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
