"""Checkpoint files of a training: which are complete, and which one to resume from."""

import os
import textwrap
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from mmengine.runner import Runner
from torch.serialization import get_crc32_options

from msda_plugin import compat


class TrainingStopped(Exception):
    """A training stopped for a reason that a user can fix; the message is one sentence with the remedy."""


class DiskFullError(TrainingStopped, OSError):
    """The training stopped because the disk is full; the message names the last checkpoint and how to resume."""


def no_file(path: str | os.PathLike) -> str:
    """The verb of a sentence about a path that is not a file: 'is a folder', otherwise 'does not exist'."""
    return 'is a folder' if Path(path).is_dir() else 'does not exist'


def is_complete(path: str | os.PathLike) -> bool:
    """Whether a checkpoint file exists, has its full length and matches the checksums that torch wrote into it.

    The file is not unpickled.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return not get_crc32_options() or archive.testzip() is None
    except (FileNotFoundError, zipfile.BadZipFile, EOFError, zlib.error):
        return False


def last_checkpoint(work_dir: str | os.PathLike) -> str | None:
    """The path that the file ``last_checkpoint`` in ``work_dir`` names; '' if it is empty, None if there is no file."""
    record = Path(work_dir, 'last_checkpoint')
    return record.read_text().strip() if record.is_file() else None


def last_checkpoint_of(runner: Runner) -> str | None:
    """The last checkpoint of this training, or of the one that it resumed; None if nothing was saved yet."""
    known = runner.message_hub.runtime_info.get('last_ckpt')  # else the file is that of an earlier training
    return (last_checkpoint(runner.work_dir) if known else None) or None


def latest_complete_checkpoint(work_dir: str | os.PathLike, pattern: str) -> tuple[str | None, list[str]]:
    """The checkpoint to resume from.

    This is the file that ``last_checkpoint`` names. If that file is missing or damaged, it is the newest complete file
    that matches ``pattern``, in the same folder or, if the folder was moved, in ``work_dir``.

    Args:
        work_dir: Folder of the training.
        pattern: Glob pattern of checkpoint names, such as ``epoch_*.pth``.

    Returns:
        Its path, or None if no checkpoint was ever written; and the paths of newer files that are incomplete.

    Raises:
        ValueError: If there are checkpoints, but none of them is complete.
    """
    named = last_checkpoint(work_dir)
    if named is None:
        return None, []
    folder = Path(named).parent if named and Path(named).parent.is_dir() else Path(work_dir)
    others = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True)
    candidates = list(dict.fromkeys([named] * bool(named) + [str(path) for path in others]))
    for index, path in enumerate(candidates):
        if is_complete(path):
            return path, candidates[:index]
    raise ValueError(
        f'no checkpoint in {folder} is complete (found: {", ".join(candidates) or "none"}); name another one to resume '
        'from, or start again without --resume'
    )


def checkpoint_to_resume(runner: Runner, pattern: str) -> str | None:
    """The checkpoint that ``runner`` resumes: ``load_from``, else the latest complete one of its work dir.

    Raises:
        ValueError: If the named checkpoint is incomplete, or all checkpoints in the work dir are.
    """
    named = runner._load_from
    if named is None:
        found, incomplete = latest_complete_checkpoint(runner.work_dir, pattern)
        if incomplete:
            runner.logger.warning(
                f'cannot resume from {", ".join(incomplete)} (missing or damaged); resuming from {found} instead'
            )
        return found
    if Path(named).is_file() and not is_complete(named):
        raise ValueError(f'the checkpoint {named} is incomplete or damaged; resume from another one')
    return named


def check_classes(path: str | os.PathLike, classes: Sequence[str] | None) -> None:
    """Check that a checkpoint to resume was trained on these classes; it passes if either is unknown.

    Raises:
        ValueError: If it has other classes, or the file is not a checkpoint of a training.
    """
    compat.allow_checkpoint_types()
    loaded = compat.load_from_local(str(path), 'cpu')
    meta = loaded.get('meta') if isinstance(loaded, dict) else None
    if not isinstance(meta, dict) or 'epoch' not in meta:
        raise ValueError(
            f'{path} is not the checkpoint of a training, so that it cannot be resumed; to start from its weights, use '
            '--load-from with --data, or --cfg-options load_from=FILE with a config'
        )
    before = (meta.get('dataset_meta') or {}).get('classes')
    if before is None or classes is None or tuple(before) == tuple(classes):
        return
    was, now = (
        f'{len(names)} ({textwrap.shorten(", ".join(map(str, names)), 200, placeholder=" …")})'
        for names in (before, classes)
    )
    raise ValueError(
        f'cannot resume {path}: it has other classes than the training data: {was}, and the data have {now}; resume '
        'with its data, or start a new training from its weights in another --work-dir, with --load-from (--data) or '
        '--cfg-options load_from=FILE (a config)'
    )


def disk_full_error(runner: Runner, error: OSError) -> DiskFullError:
    """The error to raise for ``error``, which occurred while ``runner`` was training."""
    last = last_checkpoint_of(runner)
    remedy = (
        f'the last checkpoint, {last}, is complete: free some space and resume from it with --resume'
        if last
        else 'there is no checkpoint yet: free some space, or choose another folder with --work-dir'
    )
    return DiskFullError(f'cannot write {error.filename or runner.work_dir} ({error.strerror}); {remedy}')
