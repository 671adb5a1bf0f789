"""Files that others made: no code of theirs runs, and what they claim is checked before memory is given to it.

Every checkpoint and every annotation file that this package reads goes through here, and every checkpoint that MMEngine
reads once `msda_plugin.registry` is imported (`msda_plugin.compat.load_checkpoints_strictly`).
"""

import errno
import hashlib
import json
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import BinaryIO
from urllib.parse import urlparse

import torch

# Python objects take about so many times the bytes of the JSON text that they are read from (COCO files: 5 to 7).
JSON_EXPANSION = 8


def load_checkpoint(
    file: str | os.PathLike | BinaryIO,
    map_location: str | torch.device | Callable | None = None,
    *,
    allow: Sequence[type] = (),
) -> object:
    """What a file of ``torch.save`` holds: tensors, plain containers, and what torch's allow-list names.

    Args:
        file: Path, or a file that is open for reading in binary form.
        map_location: As of ``torch.load``.
        allow: More types that the file may hold.

    Raises:
        OSError: The file cannot be opened or read.
        ValueError: It is no whole checkpoint, names more than is allowed, or claims to hold more than it does.
        torch.OutOfMemoryError, RuntimeError: The device of ``map_location`` is full, or not there.
    """
    name = file if isinstance(file, (str, os.PathLike)) else getattr(file, 'name', 'the checkpoint')
    try:
        _check_archive(file)
        with torch.serialization.safe_globals(list(allow)), warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'Detected pickle protocol')  # what it leads to is said below
            return torch.load(file, map_location=map_location, weights_only=True)
    except Exception as error:  # bytes that are no checkpoint fail in every way there is
        reason = str(error)
        # A damaged archive sends torch to a place before the file's beginning, which is an invalid argument.
        of_the_file = isinstance(error, OSError) and error.errno != errno.EINVAL
        of_the_device = isinstance(error, torch.OutOfMemoryError) or 'deserialize object on' in reason
        if of_the_file or of_the_device:
            raise
        named = re.search(r'GLOBAL (\S+)', reason) if isinstance(error, UnpicklingError) else None
        if named:
            raise ValueError(
                f'{name} holds more than tensors: it names {named[1]}, and reading that could run code; '
                'nothing of it was run. Where the file is trusted, save its state dict alone, by '
                "torch.save(checkpoint['model'], …), and take that"
            ) from error
        if isinstance(error, _Oversized):
            raise ValueError(f'{name} {error}') from None
        raise ValueError(
            f'{name} cannot be read as a checkpoint: it is cut short, or no file of torch.save; '
            'download it again, or name another'
        ) from error


class _Oversized(ValueError):
    """An archive that claims to hold more than its own size; the message goes on after its name."""


def _check_archive(file: str | os.PathLike | BinaryIO) -> None:
    """Raise _Oversized where the records of an archive are larger than itself: it would grow while it is read.

    torch.save compresses nothing, and torch itself compares each storage with its record.
    """
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        declared = sum(entry.file_size for entry in archive.infolist())
    if hasattr(file, 'seek'):
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
    else:
        size = os.path.getsize(file)
    if declared > size:
        raise _Oversized(
            f'has {size} bytes and unpacks to {declared}: it is compressed, as no file of torch.save is, '
            'and was not read; unpack it, or download it again'
        )


def fetch(url: str, folder: str | os.PathLike | None = None, *, progress: bool = False) -> Path:
    """The file of an http(s) URL, downloaded once; compared with the hash that its name carries, each time.

    Args:
        url: ``…/NAME-HASH.EXT``, where HASH are the first eight or more hexadecimal digits of the file's SHA-256, as
            MMDetection's and torch's published files are named; without them nothing is compared. Eight digits that
            are a date, such as 20210831, are none.
        folder: Where it is kept; None: where ``torch.hub`` keeps checkpoints.
        progress: Show a bar.

    Raises:
        OSError: It cannot be downloaded or written.
        ValueError: The file is not the one that its name says, or the URL names no file.
    """
    name = os.path.basename(urlparse(url).path)
    if name in ('', '.', '..'):
        raise ValueError(f'{url} names no file; give the URL of a .pth file')
    folder = Path(folder or Path(torch.hub.get_dir(), 'checkpoints'))
    folder.mkdir(parents=True, exist_ok=True)
    path, expected = folder / name, _hash_of(name)
    if not path.exists():
        part = path.with_name(f'.{name}.{os.getpid()}.part')
        try:
            torch.hub.download_url_to_file(url, str(part), progress=progress)
            _check_hash(
                part, expected, f'what came from {url}', 'it was damaged or replaced on its way, and is not kept'
            )
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    else:
        _check_hash(path, expected, str(path), 'it was damaged or replaced; delete it, and it is downloaded again')
    return path


def _hash_of(name: str) -> str | None:
    match = re.search(r'-([0-9a-f]{8,64})\.', name)
    is_date = match and re.fullmatch(r'(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])', match[1])
    return match[1] if match and not is_date else None


def _check_hash(path: Path, expected: str | None, what: str, remedy: str) -> None:
    if expected is None:
        return
    with path.open('rb') as file:
        found = (
            hashlib.file_digest(file, 'sha256').hexdigest()
            if hasattr(hashlib, 'file_digest')
            else hashlib.sha256(file.read()).hexdigest()
        )  # Python 3.10
    if not found.startswith(expected):
        raise ValueError(f'{what} has the SHA-256 {found[: len(expected)]}…, but its name says {expected}: {remedy}')


def load_json(path: str | os.PathLike, kind: str = 'JSON') -> object:
    """What a JSON file holds; ``kind`` is the format that is needed, for the error.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not JSON, or too large for the memory that is free.
    """
    size, free = os.path.getsize(path), free_memory()
    if free is not None and size * JSON_EXPANSION > free:
        raise ValueError(
            f"'{path}' has {_mib(size)} MiB, and reading JSON takes about {JSON_EXPANSION} times that, "
            f'but {_mib(free)} MiB of memory are free; split it, or free memory'
        )
    try:
        return json.loads(Path(path).read_text('utf-8'))
    except (ValueError, RecursionError) as error:
        why = 'nested too deeply' if isinstance(error, RecursionError) else error
        raise ValueError(f"'{path}' is not JSON ({why}); a file in {kind} format is needed") from None


def free_memory() -> int | None:
    """Bytes of memory that can be had without swapping; None where the system does not say."""
    try:
        found = re.search(r'^MemAvailable:\s*(\d+) kB', Path('/proc/meminfo').read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _mib(size: int) -> str:
    return f'{size / 2**20:,.0f}'
