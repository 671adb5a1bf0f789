"""What every family of checkpoints shares: reading a file, unwrapping it, and the account of a conversion."""

import argparse
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from msda_plugin import safe_loading

WRAPPERS = ('model', 'state_dict')


@dataclass
class Conversion:
    """The result of a conversion, and where every upstream key went.

    Attributes:
        state_dict: what the project's module loads.
        taken: upstream key -> our key.
        dropped: upstream key -> why it is left out.
    """

    state_dict: dict[str, Tensor] = field(default_factory=dict)
    taken: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)

    def take(self, key: str, new_key: str, value: Tensor) -> None:
        """Store ``value`` under ``new_key``."""
        self.state_dict[new_key] = value
        self.taken[key] = new_key


def unwrap(checkpoint: Mapping) -> Mapping[str, Tensor]:
    """The state dict of a checkpoint that holds it bare, under 'model' or under 'state_dict'.

    Raises:
        ValueError: if there is no dict of tensors in any of the three places.
    """
    state_dict = checkpoint
    if isinstance(checkpoint, Mapping):
        wrapped = (checkpoint[name] for name in WRAPPERS if isinstance(checkpoint.get(name), Mapping))
        state_dict = next(wrapped, checkpoint)
    if (
        not isinstance(state_dict, Mapping)
        or not state_dict
        or not all(isinstance(value, Tensor) for value in state_dict.values())
    ):
        found = list(checkpoint)[:8] if isinstance(checkpoint, Mapping) else type(checkpoint).__name__
        raise ValueError(
            f'the checkpoint holds no state dict: got {found}; expected a dict of tensors, bare or under '
            f'one of the keys {list(WRAPPERS)}'
        )
    return state_dict


def load_checkpoint_file(path: str | Path, prefix: str | None = None) -> Mapping[str, Tensor]:
    """Read the state dict of a checkpoint file or URL on the CPU, tensors and plain containers only.

    Args:
        path: a local file, or an http(s) URL.
        prefix: keep the keys under this prefix alone, without it ('backbone' for the backbone of a detector).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no whole checkpoint, names more than tensors and plain containers, is not the one whose
            hash is in the name of the URL, holds no state dict, or no key has the prefix.
    """
    state_dict = unwrap(_read(str(path)))
    if prefix:
        prefix = prefix.rstrip('.') + '.'
        found = list(state_dict)[:8]
        state_dict = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        if not state_dict:
            raise ValueError(f'no key of {path} starts with {prefix!r}; it holds {found} ...')
    return state_dict


def _read(path: str) -> object:
    """What a checkpoint file holds; every failure is a sentence."""
    if path.startswith(('http://', 'https://')):
        path = str(safe_loading.fetch(path, progress=sys.stderr.isatty()))
    elif not Path(path).is_file():
        raise FileNotFoundError(f'the checkpoint {path} does not exist; give the path of a .pth file, or a URL')
    # Training scripts keep their command line in the checkpoint; as a class, it does nothing when it is read.
    return safe_loading.load_checkpoint(path, 'cpu', allow=[argparse.Namespace])


def check_keys(family: str, found: set[str], expected: set[str]) -> None:
    """Raise ValueError, naming every key, unless an upstream dict has exactly the keys that its family expects."""
    missing, unexpected = sorted(expected - found), sorted(found - expected)
    if missing or unexpected:
        raise ValueError(
            f'the state dict does not fit family {family!r}: missing keys {missing}, unexpected keys {unexpected}'
        )


def count(keys: Iterable[str], pattern: str) -> int:
    """One more than the largest number that the pattern finds at the start of a key."""
    return 1 + max((int(match.group(1)) for key in keys if (match := re.match(pattern, key))), default=-1)
