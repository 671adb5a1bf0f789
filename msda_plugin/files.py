"""Files that are replaced in one step, so that no reader and no crash leaves a partial one."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk full, quota exceeded, file size limit


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path in the same folder, and rename it to ``path`` when the block ends.

    ``path`` keeps its former content until then, and for good if the block raises; the temporary file is removed in
    that case. The data is flushed to disk before the rename, so a power failure leaves either the old or the new file.
    """
    path = Path(path)
    unfinished = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        yield unfinished
        _flush(unfinished)
        unfinished.replace(path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in FULL:
            error.filename = str(path)
        raise
    with suppress(OSError):  # some network file systems cannot flush a folder
        _flush(path.parent)


def remove_unfinished(folder: str | os.PathLike) -> None:
    """Remove the temporary files of `atomic_write` that a killed process left in ``folder``."""
    for path in Path(folder).glob('.*.tmp'):
        path.unlink()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
