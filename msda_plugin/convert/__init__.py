"""Upstream checkpoints to ours: one module a family, each with a function ``convert(state_dict) -> Conversion``."""

from collections.abc import Mapping
from importlib import import_module

from torch import Tensor

from .conversion import Conversion, load_checkpoint_file, unwrap

FAMILIES = ('dat', 'deformable_detr', 'detr', 'hs_fpn', 'shunted_transformer', 'vision_transformer')

__all__ = ['FAMILIES', 'Conversion', 'convert', 'convert_state_dict', 'load_checkpoint_file']


def convert(state_dict: Mapping, family: str) -> Conversion:
    """Convert an upstream state dict, keeping account of every key.

    Args:
        state_dict: upstream keys, bare, under 'model' or under 'state_dict'. A dict that already has our keys passes
            through.
        family: one of ``FAMILIES``.

    Raises:
        ValueError: for an unknown family, or a dict that does not fit it: missing and unexpected keys are named.
    """
    if family not in FAMILIES:
        raise ValueError(f'unknown family {family!r}; known: {list(FAMILIES)}')
    return import_module(f'{__name__}.{family}').convert(unwrap(state_dict))


def convert_state_dict(state_dict: Mapping, family: str) -> dict[str, Tensor]:
    """``convert``, without the account: the state dict that the project's module loads."""
    return convert(state_dict, family).state_dict
