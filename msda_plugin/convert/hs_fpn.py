"""Checkpoints of MFDS-DETR's authors, neck only. Upstream lists start at the top level, except the output convs."""

from collections.abc import Mapping

from torch import Tensor

from msda_plugin.convert.conversion import Conversion, check_keys, count, rename

FAMILY = 'hs_fpn'
_ATTENTION = {'conv1.weight': 'squeeze.weight', 'conv2.weight': 'expand.weight'}


def convert(state_dict: Mapping[str, Tensor]) -> Conversion:
    """Rename every key of the neck; the number of levels follows from the keys.

    Raises:
        ValueError: If the keys are not those of a complete HS-FPN.
    """
    if any(key.startswith('selections.') for key in state_dict):
        return Conversion.unchanged(state_dict)
    num_levels = count(state_dict, r'lateral_conv\.(\d+)\.') or 4
    renamed = _rename_table(num_levels, any(key.startswith('top_feature_proj.') for key in state_dict))
    check_keys(FAMILY, set(state_dict), set(renamed))
    conversion = Conversion()
    for key, value in state_dict.items():
        conversion.take(key, renamed[key], value)
    return conversion


def _rename_table(num_levels: int, has_extra_level: bool) -> dict[str, str]:
    """Upstream key -> msda_plugin's key, for a pyramid of ``num_levels`` outputs."""
    table: dict[str, str] = {}
    if has_extra_level:
        for i in range(4):
            table |= rename(f'top_feature_proj.0.{i}', f'top_level.{i}')
    for i in range(num_levels):
        selection = f'selections.{num_levels - 1 - i}'
        table |= rename(f'upbottom_conv.{i}.0', f'{selection}.attention', _ATTENTION)
        table |= rename(f'upbottom_conv.{i}.1', f'{selection}.proj')
        for part in (0, 1):
            table |= rename(f'lateral_conv.{i}.{part}', f'output_convs.{i}.{part}')
    for i in range(num_levels - 1):
        level = num_levels - 2 - i
        table |= rename(f'weight_conv.{i}.0', f'screens.{level}', _ATTENTION)
        table |= rename(f'up_sample_conv.{i}.0', f'upsamples.{level}')
    return table
