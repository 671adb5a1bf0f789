"""The public operator: multi-scale deformable attention, plain and fused.

Source: Zhu et al., Deformable DETR, https://arxiv.org/abs/2010.04159, equation 3.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from msda_plugin.ops import backends
from msda_plugin.ops.checks import VALUE_DTYPES, check_fused, check_plain, prepare_levels, unchecked_levels
from msda_plugin.ops.library import direct_fused, direct_plain
from msda_plugin.ops.reference import accumulation_dtype, attend, attend_fused, pad_points

Shapes = Tensor | Sequence[tuple[int, int]]


class Substitute(NamedTuple):
    """Functions that run instead of the kernels, with the tensors of :func:`attend` and :func:`attend_fused`."""

    plain: Callable[..., Tensor]
    fused: Callable[..., Tensor]


REFERENCE = Substitute(attend, attend_fused)
substitute: Substitute | None = None  # set by msda_plugin.export.onnx_operator while it exports


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Shapes,
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    num_points: Sequence[int] | None = None,
    deterministic: bool | None = None,
) -> Tensor:
    """Multi-scale deformable attention: the output of each query is a weighted sum of bilinear samples of the value.

    Args:
        value: (bs, num_keys, num_heads, head_dim) in float64, float32, float16 or bfloat16. The keys are the pixels of
            the levels, row by row.
        spatial_shapes: (num_levels, 2) int64, (h, w) of each level, or a sequence of pairs (h, w).
        level_start_index: (num_levels,) int64, the first key of each level. None: consecutive levels.
        sampling_locations: (bs, num_queries, num_heads, num_levels, num_points, 2), (x, y), 0 to 1 over the level (0
            and 1 are the outer edges of its border pixels). The level is zero-padded. NaN and infinite locations
            contribute nothing and get gradient 0.
        attention_weights: (bs, num_queries, num_heads, num_levels, num_points), usually summing to 1 per query and
            head.
        num_points: Number of points on each level, where levels have different numbers, such as [3, 6, 3]; at most 16
            levels. Then sampling_locations is (bs, num_queries, num_heads, sum(num_points), 2) and attention_weights
            (bs, num_queries, num_heads, sum(num_points)), level by level.
        deterministic: Whether results are bitwise repeatable; None follows
            :func:`torch.use_deterministic_algorithms`. The CPU kernels are always deterministic.

    Locations and weights may have another float dtype than the value; they are then converted to float32 (float64 for a
    float64 value). Sums are computed in float32 (float64). Each gradient has the dtype of its input.

    In transforms of :mod:`torch.func` and in forward-mode differentiation, the reference runs instead of the kernels.

    Returns:
        (bs, num_queries, num_heads * head_dim) in the value's dtype.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If an argument has a wrong shape, size or device.
        RuntimeError: If the chosen backend cannot run, or a kernel launch fails.

    Example:
        >>> value = torch.rand(1, 6 * 8 + 3 * 4, 2, 16)
        >>> locations, weights = torch.rand(1, 5, 2, 2, 3, 2), torch.rand(1, 5, 2, 2, 3)
        >>> ms_deform_attn(value, [(6, 8), (3, 4)], None, locations, weights).shape
        torch.Size([1, 5, 32])
    """
    if _runs_directly(value, num_points):
        try:
            return direct_plain(
                value,
                *unchecked_levels(value, spatial_shapes, level_start_index),
                *unify(value, sampling_locations, attention_weights),
                _deterministic(deterministic),
                _points_on_levels(sampling_locations),
            )
        except Exception:
            spatial_shapes, _ = prepare_levels(value, spatial_shapes, level_start_index)
            check_plain(value, spatial_shapes, sampling_locations, attention_weights, None)
            raise
    spatial_shapes, level_start_index = prepare_levels(value, spatial_shapes, level_start_index)
    num_points = check_plain(value, spatial_shapes, sampling_locations, attention_weights, num_points)
    if instead := _substitute(value):
        if num_points:
            sampling_locations, attention_weights = pad_points(num_points, sampling_locations, attention_weights)
        return instead.plain(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    sampling_locations, attention_weights = unify(value, sampling_locations, attention_weights)
    return torch.ops.msda.ms_deform_attn(
        value,
        spatial_shapes,
        level_start_index,
        sampling_locations,
        attention_weights,
        _deterministic(deterministic),
        num_points or _points_on_levels(sampling_locations),
    )


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: Shapes,
    level_start_index: Tensor | None,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    *,
    num_points: Sequence[int] | None = None,
    deterministic: bool | None = None,
) -> Tensor:
    """:func:`ms_deform_attn` with the softmax and the location arithmetic inside the kernel.

    Args:
        value, spatial_shapes, level_start_index, deterministic: As for :func:`ms_deform_attn`.
        reference_points: (bs, num_queries, num_levels, 2 or 4), points (x, y) or boxes (cx, cy, w, h), 0 to 1 over the
            level.
        sampling_offsets: (bs, num_queries, num_heads, num_levels, num_points, 2), (x, y). With points, in pixels of the
            level: ``location = xy + offset / (w, h) of the level``. With boxes, in units of half the box, divided by
            the number of points: ``location = xy + offset / num_points * wh * 0.5``.
        attention_logits: (bs, num_queries, num_heads, num_levels, num_points); their softmax over all levels
            and points is the attention weight.
        num_points: As for :func:`ms_deform_attn`. Then sampling_offsets is (bs, num_queries, num_heads,
            sum(num_points), 2) and attention_logits (bs, num_queries, num_heads, sum(num_points)).

    The reference points may have another float dtype than offsets and logits, as under autocast, where layers return 16
    bits: nothing is converted then if the reference points are float32.

    Returns:
        (bs, num_queries, num_heads * head_dim) in the value's dtype. Only the inputs are saved for the backward pass.

    Raises:
        TypeError, ValueError, RuntimeError: As :func:`ms_deform_attn`.
    """
    if _runs_directly(value, num_points):
        try:
            return direct_fused(
                value,
                *unchecked_levels(value, spatial_shapes, level_start_index),
                *unify_fused(value, reference_points, sampling_offsets, attention_logits),
                _deterministic(deterministic),
                _points_on_levels(sampling_offsets),
            )
        except Exception:
            spatial_shapes, _ = prepare_levels(value, spatial_shapes, level_start_index)
            check_fused(value, spatial_shapes, reference_points, sampling_offsets, attention_logits, None)
            raise
    spatial_shapes, level_start_index = prepare_levels(value, spatial_shapes, level_start_index)
    num_points = check_fused(value, spatial_shapes, reference_points, sampling_offsets, attention_logits, num_points)
    if instead := _substitute(value):
        if num_points:
            sampling_offsets, attention_logits = pad_points(
                num_points, sampling_offsets, attention_logits, reference_points
            )
        return instead.fused(
            value, spatial_shapes, level_start_index, reference_points, sampling_offsets, attention_logits
        )
    rest = unify_fused(value, reference_points, sampling_offsets, attention_logits)
    return torch.ops.msda.ms_deform_attn_fused(
        value,
        spatial_shapes,
        level_start_index,
        *rest,
        _deterministic(deterministic),
        num_points or _points_on_levels(sampling_offsets),
    )


def ms_deform_attn_reference(
    value: Tensor,
    spatial_shapes: Shapes,
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    num_points: Sequence[int] | None = None,
    deterministic: bool | None = None,
) -> Tensor:
    """:func:`ms_deform_attn` in plain PyTorch: the definition. Same arguments; always deterministic."""
    spatial_shapes, level_start_index = prepare_levels(value, spatial_shapes, level_start_index)
    num_points = check_plain(value, spatial_shapes, sampling_locations, attention_weights, num_points)
    if num_points:
        sampling_locations, attention_weights = pad_points(num_points, sampling_locations, attention_weights)
    return attend(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)


def _points_on_levels(coordinates: Tensor) -> list[int]:
    # Never an empty list, although the kernels accept it: compiled by AOTInductor, it would get lost.
    return [coordinates.shape[4]] * coordinates.shape[3]


def _runs_directly(value: Tensor, num_points: Sequence[int] | None) -> bool:
    # The compiled operators refuse wrong arguments themselves. Their sentences are short, so the checks of this package
    # explain an error, but do not slow down a call without one.
    return (
        num_points is None
        and type(value) is Tensor
        and value.dtype in VALUE_DTYPES
        and substitute is None
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not _is_transformed()
        and backends.runs_native(value.device, value.dtype)
    )


def _is_transformed() -> bool:
    # The kernels have gradients, but no rules for vmap and forward-mode differentiation.
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _substitute(value: Tensor) -> Substitute | None:
    # Unless told otherwise, an ONNX export decomposes the operator like the reference.
    if substitute is not None:
        return substitute
    if torch.onnx.is_in_onnx_export() or _is_transformed() or not backends.runs_native(value.device, value.dtype):
        return REFERENCE
    return None


def unify(value: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Convert tensors to a dtype of the kernels: the value's if all tensors have it, else the accumulation dtype."""
    if all(tensor.dtype == value.dtype for tensor in tensors):
        return tensors
    dtype = accumulation_dtype(value)
    return tuple(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors)


def unify_fused(value: Tensor, reference_points: Tensor, offsets: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
    """:func:`unify` for the fused operator, whose reference points may be of the accumulation dtype."""
    offsets, logits = unify(value, offsets, logits)
    if reference_points.dtype != offsets.dtype and reference_points.is_floating_point():
        reference_points = reference_points.to(accumulation_dtype(value))
    return reference_points, offsets, logits


def _deterministic(deterministic: bool | None) -> bool:
    return torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic
