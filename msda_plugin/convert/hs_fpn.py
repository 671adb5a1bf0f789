"""HS-FPN of MFDS-DETR: the authors' neck to ours. Their lists run from the top level down but for the output convs."""

import re
from collections.abc import Mapping

from torch import Tensor

from .conversion import Conversion, check_keys

FAMILY = 'hs_fpn'
_AFFINE = ('weight', 'bias')
_ATTENTION = (('conv1', 'squeeze'), ('conv2', 'expand'))


def convert(state_dict: Mapping[str, Tensor]) -> Conversion:
    """Rename every key of the neck; the number of levels is read off the keys.

    Raises:
        ValueError: if the keys are not those of a whole HS-FPN.
    """
    conversion = Conversion()
    if any(key.startswith('selections.') for key in state_dict):
        for key, value in state_dict.items():
            conversion.take(key, key, value)
        return conversion
    levels = [int(match.group(1)) for key in state_dict if (match := re.match(r'lateral_conv\.(\d+)\.', key))]
    renamed = _rename_table(max(levels, default=3) + 1, any(key.startswith('top_feature_proj.') for key in state_dict))
    check_keys(FAMILY, set(state_dict), set(renamed))
    for key, value in state_dict.items():
        conversion.take(key, renamed[key], value)
    return conversion


def _rename_table(num_levels: int, has_extra_level: bool) -> dict[str, str]:
    """Upstream key -> our key, of a pyramid of ``num_levels`` outputs."""
    table: dict[str, str] = {}
    if has_extra_level:
        table |= {f'top_feature_proj.0.{i}.{name}': f'top_level.{i}.{name}' for i in range(4) for name in _AFFINE}
    for i in range(num_levels):
        level = num_levels - 1 - i
        table |= {
            f'upbottom_conv.{i}.0.{theirs}.weight': f'selections.{level}.attention.{ours}.weight'
            for theirs, ours in _ATTENTION
        }
        table |= {f'upbottom_conv.{i}.1.{name}': f'selections.{level}.proj.{name}' for name in _AFFINE}
        table |= {
            f'lateral_conv.{i}.{part}.{name}': f'output_convs.{i}.{part}.{name}' for part in (0, 1) for name in _AFFINE
        }
    for i in range(num_levels - 1):
        level = num_levels - 2 - i
        table |= {f'weight_conv.{i}.0.{theirs}.weight': f'screens.{level}.{ours}.weight' for theirs, ours in _ATTENTION}
        table |= {f'up_sample_conv.{i}.0.{name}': f'upsamples.{level}.{name}' for name in _AFFINE}
    return table
