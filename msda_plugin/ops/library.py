"""Defines ``torch.ops.msda``: schemas, fake kernels, autograd and FLOP formulas.

The compiled libraries (csrc/) register the kernels. Autocast does not change the dtypes of the operators' arguments, so
coordinates are never rounded.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from msda_plugin.costs.formulas import MACS_PER_SAMPLE
from msda_plugin.ops.reference import attend, attend_fused, pad_points

torch.library.define(
    'msda::ms_deform_attn',
    (
        '(Tensor value, Tensor spatial_shapes, Tensor level_start_index, Tensor sampling_locations, '
        'Tensor attention_weights, bool deterministic, int[] num_points=[]) -> Tensor'
    ),
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    'msda::ms_deform_attn_backward',
    (
        '(Tensor grad_output, Tensor value, Tensor spatial_shapes, Tensor level_start_index, '
        'Tensor sampling_locations, Tensor attention_weights, bool deterministic, int[] num_points=[]) '
        '-> (Tensor, Tensor, Tensor)'
    ),
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    'msda::ms_deform_attn_fused',
    (
        '(Tensor value, Tensor spatial_shapes, Tensor level_start_index, Tensor reference_points, '
        'Tensor sampling_offsets, Tensor attention_logits, bool deterministic, int[] num_points=[]) -> Tensor'
    ),
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    'msda::ms_deform_attn_fused_backward',
    (
        '(Tensor grad_output, Tensor value, Tensor spatial_shapes, Tensor level_start_index, '
        'Tensor reference_points, Tensor sampling_offsets, Tensor attention_logits, bool deterministic, '
        'int[] num_points=[]) -> (Tensor, Tensor, Tensor, Tensor)'
    ),
    tags=torch.Tag.pt2_compliant_tag,
)


def _below_autograd(op: Callable) -> Callable:
    def run(*inputs):
        # Not around more than the operator: unpacked tensors of a checkpoint are recomputed with autograd.
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    return run


# Each operator takes (value, spatial_shapes, level_start_index, *coordinates and weights, deterministic, num_points).
# Its backward takes grad_output before these, and returns the gradients of the value, the coordinates and the weights.
def _register(name: str, definition, num_floats: int) -> Callable[..., Tensor]:
    """Register an operator. Returns a function that calls its kernels."""
    operator, backward_operator = getattr(torch.ops.msda, name), getattr(torch.ops.msda, f'{name}_backward')
    forward_op, backward_op = operator.default, backward_operator.default
    sampling = num_floats - 2  # in `rest`: (bs, num_queries, num_heads, num_levels, num_points, 2)

    @torch.library.register_fake(f'msda::{name}')
    def fake(value, spatial_shapes, level_start_index, *rest):
        tensors = (spatial_shapes, level_start_index, *rest[:num_floats])
        if any(tensor.device != value.device for tensor in tensors):
            # A tensor on the meta device among real ones leads here, too.
            raise RuntimeError(f'all tensors must be on the device of value, {value.device}')
        return value.new_empty(value.shape[0], rest[sampling].shape[1], value.shape[2] * value.shape[3])

    @torch.library.register_fake(f'msda::{name}_backward')
    def fake_backward(grad_output, value, spatial_shapes, level_start_index, *rest):
        tensors = (value, *rest[:num_floats])
        return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors)

    def keep_inputs(ctx, inputs, output):
        *tensors, ctx.deterministic, ctx.num_points = inputs
        ctx.save_for_backward(*tensors)

    def backward(ctx, grad_output, run=backward_op):
        grad_value, *grads = run(grad_output, *ctx.saved_tensors, ctx.deterministic, ctx.num_points)
        return grad_value, None, None, *grads, None, None

    def double_backward(ctx, *grad_grads):
        with torch.enable_grad():
            grad_output, value, shapes, starts, *rest = ctx.saved_tensors
            leaves = [t.detach().requires_grad_() for t in (grad_output, value, *rest)]
            arguments = leaves[2:]
            if arguments[-1].dim() == 4:  # all levels in one dimension
                arguments[-2:] = pad_points(ctx.num_points, *arguments[-2:], *arguments[:-2])
            output = definition(leaves[1], shapes, starts, *arguments)
            grads = torch.autograd.grad(output, leaves[1:], leaves[0], create_graph=True)
        result = torch.autograd.grad(grads, leaves, grad_grads, allow_unused=True, materialize_grads=True)
        return result[0], result[1], None, None, *result[2:], None, None

    def flops(value, spatial_shapes, level_start_index, *rest, out_shape=None):
        return 2 * MACS_PER_SAMPLE * math.prod(rest[sampling][:-1]) * value[3]  # the arguments are shapes

    def backward_flops(grad_output, *args, out_shape=None):
        # As for a matrix product, one part for the gradient of the value and one for those of the samples.
        return 2 * flops(*args)

    # What register_autograd generates costs as much as the rest of a small call, and compilers need it. In eager mode,
    # this function does the same.
    forward_kernel, backward_kernel = _below_autograd(forward_op), _below_autograd(backward_op)

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            keep_inputs(ctx, inputs, None)
            return forward_kernel(*inputs)

        @staticmethod
        def backward(ctx, grad_output):
            # A second derivative and compiled autograd need the registered operator.
            whole = torch.is_grad_enabled() or torch.compiler.is_compiling()
            return backward(ctx, grad_output, backward_op if whole else backward_kernel)

    def direct(*inputs):
        return (Direct.apply if torch.is_grad_enabled() else forward_kernel)(*inputs)

    register_flop_formula(operator)(flops)
    register_flop_formula(backward_operator)(backward_flops)
    torch.library.register_autograd(f'msda::{name}', backward, setup_context=keep_inputs)
    torch.library.register_autograd(f'msda::{name}_backward', double_backward, setup_context=keep_inputs)
    return direct


# For eager mode. `torch.ops.msda` has the operators for every other mode.
direct_plain = _register('ms_deform_attn', attend, num_floats=2)
direct_fused = _register('ms_deform_attn_fused', attend_fused, num_floats=3)
