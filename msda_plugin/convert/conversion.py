"""Shared by all checkpoint families: reading a file, and recording a conversion."""

import argparse
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from msda_plugin import safe_loading

WRAPPERS = ('model', 'state_dict')
PARAMETERS = ('weight', 'bias')
IN_PROJ = ('in_proj_weight', 'in_proj_bias')  # of torch.nn.MultiheadAttention


@dataclass
class Conversion:
    """The result of a conversion, and a record of every upstream key.

    Attributes:
        state_dict: the state dict that msda_plugin's module loads.
        taken: upstream key -> msda_plugin's key.
        dropped: upstream key -> reason why it is left out.
    """

    state_dict: dict[str, Tensor] = field(default_factory=dict)
    taken: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)

    def take(self, key: str, new_key: str, value: Tensor) -> None:
        """Store ``value`` under ``new_key``."""
        self.state_dict[new_key] = value
        self.taken[key] = new_key

    @classmethod
    def unchanged(cls, state_dict: Mapping[str, Tensor]) -> 'Conversion':
        """The conversion of a state dict that has msda_plugin's keys already."""
        return cls(dict(state_dict), {key: key for key in state_dict})


def unwrap(checkpoint: Mapping) -> Mapping[str, Tensor]:
    """The state dict of a checkpoint: its averaged weights ('ema'), its entry 'model' or 'state_dict', or itself.

    Raises:
        ValueError: If none of them is a dict of tensors.
    """
    state_dict = checkpoint
    if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get('ema'), Mapping):
        state_dict = checkpoint['ema'].get('module', checkpoint['ema'])
    elif isinstance(checkpoint, Mapping):
        wrapped = (checkpoint[name] for name in WRAPPERS if isinstance(checkpoint.get(name), Mapping))
        state_dict = next(wrapped, checkpoint)
    if (
        not isinstance(state_dict, Mapping)
        or not state_dict
        or not all(isinstance(value, Tensor) for value in state_dict.values())
    ):
        found = list(checkpoint)[:8] if isinstance(checkpoint, Mapping) else type(checkpoint).__name__
        raise ValueError(
            f'the checkpoint holds no state dict: got {found}; expected a dict of tensors, at the top level or under '
            f'one of the keys {[*WRAPPERS, "ema"]}'
        )
    return state_dict


def load_checkpoint_file(path: str | Path, prefix: str | None = None) -> Mapping[str, Tensor]:
    """Read the state dict of a checkpoint file or URL to the CPU. No code in the file is executed.

    Args:
        path: a local file, an http(s) URL, or ``msda_plugin://MODEL``, the starter weights of a model.
        prefix: take only the keys with this prefix, and remove it ('backbone' for the backbone of a detector).

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not a complete checkpoint, contains other objects than tensors and plain containers,
            does not match the hash in the name of its URL, or holds no state dict, or if no key has the prefix.
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
    """Content of a checkpoint."""
    if path.startswith(('http://', 'https://')):
        path = str(safe_loading.fetch(path, progress=sys.stderr.isatty()))
    elif path.startswith('msda_plugin://'):
        from msda_plugin.starter_weights import load_from_package  # imports MMEngine, which conversion does without

        return load_from_package(path, 'cpu')
    elif not Path(path).is_file():
        raise FileNotFoundError(f'the checkpoint {path} does not exist; give the path of a .pth file, or a URL')
    # Training scripts store their command line in the checkpoint; loading a Namespace executes nothing.
    return safe_loading.load_checkpoint(path, 'cpu', allow=[argparse.Namespace])


def check_keys(family: str, found: set[str], expected: set[str]) -> None:
    """Raise ValueError, with the missing and unexpected keys, unless ``found`` equals ``expected``."""
    missing, unexpected = sorted(expected - found), sorted(found - expected)
    if missing or unexpected:
        raise ValueError(
            f'the state dict does not fit family {family!r}: missing keys {missing}, unexpected keys {unexpected}'
        )


def rename(module: str, new_module: str, names: Iterable[str] | Mapping[str, str] = PARAMETERS) -> dict[str, str]:
    """Keys of a module -> keys of a renamed module; a mapping of ``names`` renames the parameters as well."""
    if not isinstance(names, Mapping):
        names = {name: name for name in names}
    return {f'{module}.{name}': f'{new_module}.{new_name}' for name, new_name in names.items()}


def count(keys: Iterable[str], pattern: str) -> int:
    """One more than the largest number that the pattern's group matches at the start of a key; 0 without a match."""
    return 1 + max((int(match.group(1)) for key in keys if (match := re.match(pattern, key))), default=-1)
