"""Multi-scale deformable attention under mmcv's names, with the kernels of :mod:`msda_plugin.ops`."""

import torch
from torch import Tensor

from msda_plugin.ops import backend_for, ms_deform_attn
from msda_plugin.ops.reference import accumulation_dtype


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Return :func:`msda_plugin.ops.ms_deform_attn`; `im2col_step` is not needed."""
    return ms_deform_attn(value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Add the gradients to `grad_value`, `grad_sampling_loc` and `grad_attn_weight`."""
    grads = gradients(
        value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights, grad_output
    )
    for total, grad in zip((grad_value, grad_sampling_loc, grad_attn_weight), grads, strict=True):
        total.add_(grad)


def gradients(
    value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor, grad_output: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the value, the locations and the weights, each in the dtype of its input."""
    if backend_for(value.device, value.dtype).name == 'reference':
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (value, locations, weights)]
            output = ms_deform_attn(leaves[0], shapes, starts, *leaves[1:])
            return torch.autograd.grad(output, leaves, grad_output)
    sampling = (locations, weights)
    if any(t.dtype != value.dtype for t in sampling):
        sampling = (t.to(accumulation_dtype(value)) for t in sampling)
    grads = torch.ops.msda.ms_deform_attn_backward(
        grad_output, value, shapes.long(), starts.long(), *sampling, torch.are_deterministic_algorithms_enabled()
    )
    return tuple(grad.to(t.dtype) for grad, t in zip(grads, (value, locations, weights), strict=True))
