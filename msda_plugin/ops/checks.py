"""Argument checks of the operator. Every message says what came, what is needed, and the remedy."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

VALUE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MAX_UNEVEN_LEVELS = 16  # kMaxUnevenLevels in csrc/ms_deform_attn.h


def check_plain(
    value: Tensor,
    spatial_shapes: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points: Sequence[int] | None,
) -> list[int]:
    """Raise TypeError or ValueError unless dtypes, devices and sizes fit :func:`msda_plugin.ops.ms_deform_attn`.

    Returns:
        ``num_points``, empty for None.
    """
    points = _check_num_points(num_points, spatial_shapes)
    _check_sizes(
        value, spatial_shapes, 'sampling_locations', sampling_locations, 'attention_weights', attention_weights, points
    )
    return points


def check_fused(
    value: Tensor,
    spatial_shapes: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    num_points: Sequence[int] | None,
) -> list[int]:
    """:func:`check_plain` for ``ms_deform_attn_fused``."""
    points = _check_num_points(num_points, spatial_shapes)
    _check_sizes(
        value, spatial_shapes, 'sampling_offsets', sampling_offsets, 'attention_logits', attention_logits, points
    )
    _check_float(reference_points, 'reference_points', value)
    expected = (value.shape[0], sampling_offsets.shape[1], spatial_shapes.shape[0])
    if (
        reference_points.dim() != 4
        or tuple(reference_points.shape[:3]) != expected
        or reference_points.shape[3] not in (2, 4)
    ):
        raise ValueError(
            f'reference_points has shape {_shape(reference_points)}, but (bs, num_queries, num_levels, 2 '
            f'or 4) = ({", ".join(map(str, expected))}, 2 or 4) is needed: points (x, y) or boxes (cx, '
            'cy, w, h) between 0 and 1, one per level (repeat them over the levels if they have none)'
        )
    return points


def prepare_levels(
    value: Tensor, spatial_shapes: Tensor | Sequence[tuple[int, int]], level_start_index: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Convert the levels to what the kernels take: ``spatial_shapes`` (L, 2) and ``level_start_index`` (L,), int64.

    Sizes are checked only on the CPU, since reading them would synchronize with a device. Use :func:`check_levels` to
    check the sizes in a device tensor.
    """
    if not isinstance(value, Tensor):
        raise TypeError(
            f'value is a {type(value).__name__}, but a tensor (bs, num_keys, num_heads, head_dim) is needed'
        )
    if value.dim() != 4:
        raise ValueError(
            f'value has shape {_shape(value)}, but (bs, num_keys, num_heads, head_dim) is needed: split '
            'the channels with value.view(bs, num_keys, num_heads, -1)'
        )
    if not isinstance(spatial_shapes, Tensor):
        spatial_shapes = shapes_from_pairs(spatial_shapes, value.device)
    _check_int(spatial_shapes, 'spatial_shapes', value)
    if spatial_shapes.dim() != 2 or spatial_shapes.shape[0] < 1 or spatial_shapes.shape[1] != 2:
        raise ValueError(
            f'spatial_shapes has shape {_shape(spatial_shapes)}, but (num_levels, 2) with at least one '
            'level is needed: one row (h, w) per level'
        )
    spatial_shapes = spatial_shapes.long()
    if level_start_index is None:
        level_start_index = _starts(spatial_shapes)
    elif not isinstance(level_start_index, Tensor):
        raise TypeError(
            f'level_start_index is a {type(level_start_index).__name__}, but an int64 tensor (num_levels,) '
            'or None is needed'
        )
    _check_int(level_start_index, 'level_start_index', value)
    if tuple(level_start_index.shape) != (spatial_shapes.shape[0],):
        raise ValueError(
            f'level_start_index has shape {_shape(level_start_index)}, but ({spatial_shapes.shape[0]},) '
            'is needed, one entry per row of spatial_shapes; None computes it'
        )
    level_start_index = level_start_index.long()
    if value.device.type == 'cpu' and not torch.compiler.is_compiling():
        check_levels(spatial_shapes, level_start_index, value.shape[1])
    return spatial_shapes, level_start_index


def unchecked_levels(
    value: Tensor, spatial_shapes: Tensor | Sequence[tuple[int, int]], level_start_index: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The results of :func:`prepare_levels` for valid arguments; others raise errors of any type, now or later."""
    if isinstance(spatial_shapes, Tensor):
        spatial_shapes = _int64(spatial_shapes)
        if level_start_index is None:
            level_start_index = _starts(spatial_shapes)
    else:
        spatial_shapes, starts = _levels_of(tuple(map(tuple, spatial_shapes)), value.device)
        if level_start_index is None:
            level_start_index = starts
    return spatial_shapes, _int64(level_start_index)


def _int64(tensor: Tensor) -> Tensor:
    return tensor.long() if tensor.dtype == torch.int32 else tensor


def _starts(spatial_shapes: Tensor) -> Tensor:
    areas = spatial_shapes[:, 0] * spatial_shapes[:, 1]
    return areas.cumsum(0) - areas


def check_levels(spatial_shapes: Tensor, level_start_index: Tensor | None, num_keys: int) -> None:
    """Raise ValueError unless the levels fill ``num_keys``. Reads the values, which synchronizes with the device.

    Args:
        spatial_shapes: (num_levels, 2) integers, (h, w) of each level.
        level_start_index: (num_levels,) integers, the first key of each level; or None.
        num_keys: size 1 of ``value``.
    """
    shapes = spatial_shapes.tolist()
    if any(h < 1 or w < 1 for h, w in shapes):
        raise ValueError(f'spatial_shapes is {shapes}, but every level needs h >= 1 and w >= 1: leave empty levels out')
    areas = [h * w for h, w in shapes]
    if sum(areas) != num_keys:
        raise ValueError(
            f'spatial_shapes is {shapes}, whose areas add up to {sum(areas)}, but value has num_keys = '
            f'{num_keys}: the sum of h * w over the levels must equal size 1 of value'
        )
    expected = [sum(areas[:level]) for level in range(len(areas))]
    if level_start_index is not None and level_start_index.tolist() != expected:
        raise ValueError(
            f'level_start_index is {level_start_index.tolist()}, but spatial_shapes {shapes} needs '
            f'{expected}, the running sum of the areas; None computes it'
        )


def _check_num_points(num_points: Sequence[int] | None, spatial_shapes: Tensor) -> list[int]:
    if num_points is None:
        return []
    levels = spatial_shapes.shape[0]
    if (
        not isinstance(num_points, Sequence)
        or len(num_points) != levels
        or not all(isinstance(points, int) and points >= 1 for points in num_points)
    ):
        raise ValueError(
            f'num_points is {num_points!r}, but a list of {levels} integers >= 1 is needed, one for each level in '
            'spatial_shapes, such as [3, 6, 3]; None: as many on each level as sampling_locations or sampling_offsets '
            'have'
        )
    if levels > MAX_UNEVEN_LEVELS and len(set(num_points)) > 1:
        raise ValueError(
            f'num_points has {levels} levels, but different numbers of points need at most {MAX_UNEVEN_LEVELS} levels'
        )
    return list(num_points)


def _check_sizes(
    value: Tensor,
    spatial_shapes: Tensor,
    coordinates_name: str,
    coordinates: Tensor,
    weights_name: str,
    weights: Tensor,
    num_points: Sequence[int],
) -> None:
    if value.dtype not in VALUE_DTYPES:
        raise TypeError(
            f'value has dtype {value.dtype}, but one of float64, float32, float16, bfloat16 is needed: '
            'convert it with value.float()'
        )
    _check_float(coordinates, coordinates_name, value)
    _check_float(weights, weights_name, value)
    batch, _, num_heads, head_dim = value.shape
    if num_heads < 1 or head_dim < 1:
        raise ValueError(
            f'value has shape {_shape(value)}, but num_heads and head_dim (sizes 2 and 3) must be at least 1'
        )
    samples = 'sum(num_points)' if num_points else 'num_levels, num_points'
    if coordinates.dim() != (5 if num_points else 6):
        raise ValueError(
            f'{coordinates_name} has shape {_shape(coordinates)}, but (bs, num_queries, num_heads, '
            f'{samples}, 2) is needed'
        )
    counts = (sum(num_points),) if num_points else (spatial_shapes.shape[0], coordinates.shape[4])
    expected = (batch, coordinates.shape[1], num_heads, *counts, 2)
    if tuple(coordinates.shape) != expected or counts[-1] < 1:
        raise ValueError(
            f'{coordinates_name} has shape {_shape(coordinates)}, but (bs, num_queries, num_heads, '
            f'{samples}, 2) = {expected} with num_points >= 1 is needed, to go with value '
            f'{_shape(value)} and {spatial_shapes.shape[0]} levels in spatial_shapes'
        )
    if tuple(weights.shape) != expected[:-1]:
        raise ValueError(
            f'{weights_name} has shape {_shape(weights)}, but (bs, num_queries, num_heads, '
            f'{samples}) = {expected[:-1]} is needed, to go with {coordinates_name} {_shape(coordinates)}'
        )


def _check_float(tensor: Tensor, name: str, value: Tensor) -> None:
    _check_tensor(tensor, name, value)
    if tensor.dtype not in VALUE_DTYPES:
        raise TypeError(
            f'{name} has dtype {tensor.dtype}, but one of float64, float32, float16, bfloat16 is needed: '
            f'convert it with {name}.float()'
        )


def _check_int(tensor: Tensor, name: str, value: Tensor) -> None:
    _check_tensor(tensor, name, value)
    if tensor.dtype not in (torch.int64, torch.int32):
        raise TypeError(f'{name} has dtype {tensor.dtype}, but int64 is needed: convert it with {name}.long()')


def _check_tensor(tensor: Tensor, name: str, value: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f'{name} is a {type(tensor).__name__}, but a tensor is needed')
    if tensor.device != value.device:
        raise ValueError(
            f'{name} is on {tensor.device}, but value is on {value.device}: move it with {name}.to(value.device)'
        )


def shapes_from_pairs(pairs: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """Pairs (h, w) as (num_levels, 2) int64, copied to the device once for each set of shapes.

    Raises:
        TypeError: If they are not pairs of integers.
    """
    try:
        rows = tuple((height, width) for height, width in pairs)
    except (TypeError, ValueError):
        raise TypeError(
            f'spatial_shapes is {pairs!r}, but an int64 tensor (num_levels, 2) or a sequence of pairs (h, w) is needed'
        ) from None
    if torch.compiler.is_compiling():
        return torch.tensor(rows, dtype=torch.int64, device=device)
    if torch.jit.is_tracing():  # sizes are tensors then, which stay dynamic
        sizes = [torch.as_tensor(size, dtype=torch.int64, device=device) for row in rows for size in row]
        return torch.stack(sizes).view(len(rows), 2)
    return _levels_of(rows, device)[0]


def _levels_of(rows: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    # Not in the cached function: 3.0 finds the entry of 3.
    for row in rows:
        for size in row:
            if not isinstance(size, int):
                raise TypeError(f'spatial_shapes is {rows!r}, but its pairs (h, w) must be integers')
    return _cached_levels(rows, device)


@lru_cache(maxsize=256)
def _cached_levels(rows: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    # Copying from the host synchronizes with the device, so each set of shapes is copied once. The tensors are never
    # written to. A tensor made in inference mode could not be saved for a later backward pass.
    with torch.inference_mode(False):
        shapes = torch.tensor(rows, dtype=torch.int64, device=device).reshape(len(rows), 2)
        return shapes, _starts(shapes)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
