"""Loads checkpoints, downloads and JSON files from untrusted sources: runs no code and checks declared sizes first.

msda_plugin reads all its checkpoints and annotation files with these functions; MMEngine reads its checkpoints with
them while `msda_plugin.compat.load_checkpoints_strictly` is in effect.
"""

import errno
import hashlib
import json
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from typing import BinaryIO
from urllib.error import URLError
from urllib.parse import urlparse

import torch

from msda_plugin.files import atomic_write

# Memory of the parsed objects, as a multiple of the size of the JSON text (COCO files: 5 to 7).
JSON_EXPANSION = 8


def load_checkpoint(
    file: str | os.PathLike | BinaryIO,
    map_location: str | torch.device | Callable | None = None,
    *,
    allow: Sequence[type] = (),
) -> object:
    """Load a file written by ``torch.save``: tensors, plain containers and types of torch's allow-list.

    Args:
        file: Path, or a file opened in binary mode.
        map_location: As in ``torch.load``.
        allow: Further types that the file may contain.

    Raises:
        OSError: If the file cannot be opened or read.
        ValueError: If the file is not a complete checkpoint, contains other types, or is compressed.
        torch.OutOfMemoryError, RuntimeError: If the device of ``map_location`` is full or missing.
    """
    name = file if isinstance(file, (str, os.PathLike)) else getattr(file, 'name', 'the checkpoint')
    try:
        _check_archive(file)
        with torch.serialization.safe_globals(list(allow)), warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'Detected pickle protocol')  # the error below covers it
            return torch.load(file, map_location=map_location, weights_only=True)
    except Exception as error:  # damaged files raise errors of many types
        reason = str(error)
        # In a damaged archive torch seeks to a negative position, which is EINVAL.
        of_the_file = isinstance(error, OSError) and error.errno != errno.EINVAL
        of_the_device = isinstance(error, torch.OutOfMemoryError) or 'deserialize object on' in reason
        if of_the_file or of_the_device:
            raise
        named = re.search(r'GLOBAL (\S+)', reason) if isinstance(error, UnpicklingError) else None
        if named:
            raise ValueError(
                f'{name} holds more than tensors: it names {named[1]}, and loading that could run code; '
                'no code was run. If you trust the file, save its state dict alone with '
                "torch.save(checkpoint['model'], …), and load that"
            ) from error
        if isinstance(error, _Oversized):
            raise ValueError(f'{name} {error}') from None
        raise ValueError(
            f'{name} cannot be read as a checkpoint: it is truncated, or was not written by torch.save; '
            'download it again, or choose another file'
        ) from error


class _Oversized(ValueError):
    """An archive that declares more data than its own size; the message follows the file name."""


def _check_archive(file: str | os.PathLike | BinaryIO) -> None:
    """Raise _Oversized if the archive is compressed and would unpack to more than its size (a zip bomb).

    torch.save does not compress, and torch compares each storage with its record.
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
            f'has {size} bytes and unpacks to {declared}: it is compressed, unlike files from torch.save, '
            'and was not read; unpack it, or download it again'
        )


def fetch(url: str, folder: str | os.PathLike | None = None, *, progress: bool = False) -> Path:
    """Download the file of an http(s) URL once; verify it against the hash in its name, each time.

    Args:
        url: ``…/NAME-HASH.EXT``, where HASH is the first eight or more hexadecimal digits of the file's SHA-256, as in
            MMDetection's and torch's published files. A name without a hash is not verified; eight digits that are a
            date, such as 20210831, are not a hash.
        folder: Where the file is stored; None: torch.hub's folder of checkpoints.
        progress: Show a progress bar.

    Returns:
        Path of the file.

    Raises:
        OSError: If the file cannot be downloaded or written.
        ValueError: If its hash is not the one in its name, or the URL contains no file name.
    """
    name = os.path.basename(urlparse(url).path)
    if name in ('', '.', '..'):
        raise ValueError(f'{url} contains no file name; give the URL of a .pth file')
    folder = Path(folder or Path(torch.hub.get_dir(), 'checkpoints'))
    folder.mkdir(parents=True, exist_ok=True)
    path, expected = folder / name, _hash_of(name)
    if path.exists():
        _check_hash(path, expected, str(path), 'it was damaged or replaced; delete it to download it again')
        return path
    with atomic_write(path) as part:
        try:
            torch.hub.download_url_to_file(url, str(part), progress=progress)
        except (URLError, HTTPException, ConnectionError, TimeoutError) as error:
            raise OSError(
                f'{url} cannot be downloaded ({error}); without a network, copy the file to {path}'
            ) from error
        _check_hash(part, expected, f'the download from {url}', 'it was damaged or replaced, and is not kept')
    return path


def verify_hash(path: Path, remedy: str) -> None:
    """Compare a file with the hash in its name (``NAME-HASH.EXT``); a name without a hash is not verified.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the hash differs; ``remedy`` ends the message.
    """
    _check_hash(path, _hash_of(path.name), str(path), f'it was damaged or replaced; {remedy}')


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
    """Parse a JSON file; ``kind`` is the expected format, for the error message.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file is not JSON, or too large for the free memory.
    """
    size, free = os.path.getsize(path), free_memory()
    if free is not None and size * JSON_EXPANSION > free:
        raise ValueError(
            f"'{path}' has {_mib(size)} MiB, and parsing JSON takes about {JSON_EXPANSION} times that, "
            f'but {_mib(free)} MiB of memory are free; split the file, or free memory'
        )
    try:
        return json.loads(Path(path).read_text('utf-8'))
    except (ValueError, RecursionError) as error:
        why = 'nested too deeply' if isinstance(error, RecursionError) else error
        raise ValueError(f"'{path}' is not JSON ({why}); a file in {kind} format is needed") from None


def free_memory() -> int | None:
    """Bytes of memory available without swapping; None if the system does not report it."""
    try:
        found = re.search(r'^MemAvailable:\s*(\d+) kB', Path('/proc/meminfo').read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _mib(size: int) -> str:
    return f'{size / 2**20:,.0f}'
