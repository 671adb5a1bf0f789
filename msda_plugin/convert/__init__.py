"""Conversion of published checkpoints: one module per family, with a function ``convert(state_dict) -> Conversion``."""

from collections.abc import Mapping
from importlib import import_module

from torch import Tensor

from msda_plugin.convert.conversion import Conversion, load_checkpoint_file, unwrap

FAMILIES = ('dat', 'deformable_detr', 'detr', 'dfine', 'hs_fpn', 'rtdetr', 'shunted_transformer', 'vision_transformer')

__all__ = ['FAMILIES', 'Conversion', 'convert', 'convert_state_dict', 'load_checkpoint_file']


def convert(state_dict: Mapping, family: str) -> Conversion:
    """Convert an upstream state dict, and record what happened to every key.

    Args:
        state_dict: upstream state dict, or a checkpoint that holds it under 'model', 'state_dict' or 'ema'. A state
            dict with msda_plugin's keys is returned unchanged.
        family: one of ``FAMILIES``.

    Raises:
        ValueError: If the family is unknown, or keys are missing or unexpected.
    """
    if family not in FAMILIES:
        raise ValueError(f'unknown family {family!r}; known: {list(FAMILIES)}')
    return import_module(f'{__name__}.{family}').convert(unwrap(state_dict))


def convert_state_dict(state_dict: Mapping, family: str) -> dict[str, Tensor]:
    """Convert an upstream state dict to the one that msda_plugin's module loads; arguments as in :func:`convert`."""
    return convert(state_dict, family).state_dict
