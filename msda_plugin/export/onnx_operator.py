"""What ``torch.onnx.export(dynamo=False)`` writes for the operator: ``GridSample``, ``Gather``, or one node.

The decompositions compute in float32 for a value of 16 bits, as the kernels do. The batch, the keys, the queries and
the levels' sizes may be dynamic.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from msda_plugin.ops import functional
from msda_plugin.ops.backends import runs_native
from msda_plugin.ops.reference import accumulation_dtype, attend, attend_fused

DOMAIN, NAME, FUSED_NAME = 'msda_plugin', 'MSDeformAttn', 'MSDeformAttnFused'
# The domain in which onnxruntime's TensorRT provider looks for plugins. TensorRT itself accepts no other.
TENSORRT_DOMAIN, TENSORRT_NAME = 'trt.plugins', 'MultiscaleDeformableAttnPlugin_TRT'
_PLAIN, _FUSED = torch.ops.msda.ms_deform_attn, torch.ops.msda.ms_deform_attn_fused


@contextmanager
def operator_as(form: str) -> Iterator[None]:
    """Choose how ``ms_deform_attn`` and ``ms_deform_attn_fused`` are exported within a ``with`` block.

    Within the block, the whole process computes them in this form: it holds for ``torch.onnx.export(dynamo=False)``,
    and for every other tracer. Outside of it, an ONNX export writes the form ``'gather'``.

    Args:
        form: One of

            - ``'grid_sample'``: one ``GridSample`` for each level. Needs ``opset_version=16`` or higher.
            - ``'gather'``: gathers and arithmetic, without ``GridSample``.
            - ``'custom'``: the nodes ``MSDeformAttn`` and ``MSDeformAttnFused`` of the domain ``msda_plugin``, which
              the library at :func:`msda_plugin.onnxruntime_library` computes. Their inputs are those of
              ``ms_deform_attn`` and ``ms_deform_attn_fused`` without ``level_start_index``; the shapes are a tensor of
              int64 or int32. The value is float32 or float16. Locations and weights, or offsets and logits, have its
              dtype or are float32; reference points have the dtype of the offsets or are float32. No attributes.
            - ``'tensorrt'``: the node ``MultiscaleDeformableAttnPlugin_TRT`` of the domain ``trt.plugins``, in float32,
              with the inputs of ``ms_deform_attn``, shapes and starts in int32. Its output is (bs, num_queries,
              num_heads, head_dim). Runs in TensorRT, and in onnxruntime with the same library.

    Raises:
        ValueError: If there is no such form.
        TypeError: While exporting, if the form is one node and the value is not float32 or float16.

    Example:
        >>> import io
        >>> class Attention(torch.nn.Module):
        ...     def forward(self, value, locations, weights):
        ...         return functional.ms_deform_attn(value, [(6, 8)], None, locations, weights)
        >>> inputs = torch.rand(1, 48, 2, 16), torch.rand(1, 5, 2, 1, 3, 2), torch.rand(1, 5, 2, 1, 3)
        >>> with operator_as('custom'):
        ...     torch.onnx.export(Attention(), inputs, io.BytesIO(), dynamo=False, opset_version=17)
    """
    if form not in _FORMS:
        raise ValueError(f'form is {form!r}, but one of {", ".join(_FORMS)} is needed')
    previous, functional.substitute = functional.substitute, _FORMS[form]
    try:
        yield
    finally:
        functional.substitute = previous


def _fused(plain) -> functional.Substitute:
    """A plain form, and the same after the softmax and the location arithmetic."""

    def fused(value, spatial_shapes, level_start_index, reference_points, sampling_offsets, attention_logits):
        dtype = accumulation_dtype(value)
        weights = attention_logits.to(dtype).flatten(-2).softmax(-1).view(attention_logits.shape)
        # Runtimes broadcast slowly over last dimensions that are short: (x, y) of all levels and points are joined.
        batch, queries, heads, _, points, _ = sampling_offsets.shape
        offsets = sampling_offsets.to(dtype).reshape(batch, queries, heads, -1)
        references = reference_points.to(dtype)

        def per_sample(tensor):  # (..., L, 2) -> (..., L * P * 2)
            return tensor[..., None, :].expand(*tensor.shape[:-1], points, 2).flatten(-3)

        centers = per_sample(references[..., :2])[:, :, None]
        if references.shape[-1] == 2:
            locations = centers + offsets / per_sample(spatial_shapes.flip(-1).to(dtype))
        else:
            locations = centers + offsets * per_sample(references[..., 2:] * (0.5 / points))[:, :, None]
        return plain(value, spatial_shapes, level_start_index, locations.view(sampling_offsets.shape), weights)

    return functional.Substitute(plain, fused)


def _grid_sample(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    batch, _, heads, head_dim = value.shape
    dtype = accumulation_dtype(value)
    rows = value.to(dtype).permute(0, 2, 3, 1).flatten(0, 1)  # (B * M, D, S)
    grids = (2 * sampling_locations.to(dtype) - 1).transpose(1, 2).flatten(0, 1)  # (B * M, Q, L, P, 2)
    weights = attention_weights.to(dtype).transpose(1, 2).flatten(0, 1)[:, None]  # (B * M, 1, Q, L, P)
    output = 0
    for level in range(len(spatial_shapes)):
        # Elements of a tensor, so that a tracer does not record their numbers.
        (height, width), start = spatial_shapes[level].unbind(), level_start_index[level]
        image = rows[:, :, start : start + height * width].reshape(batch * heads, head_dim, height, width)
        samples = F.grid_sample(image, grids[:, :, level], align_corners=False)  # (B * M, D, Q, P)
        output = output + (samples * weights[:, :, :, level]).sum(-1)
    return output.view(batch, heads * head_dim, -1).transpose(1, 2).to(value.dtype)


class _Node(torch.autograd.Function):
    """Computes the operator; an ONNX export writes one node for it, with the inputs as they come."""

    @staticmethod
    def forward(ctx, value, spatial_shapes, *rest):
        operator, definition = (_PLAIN, attend) if len(rest) == 2 else (_FUSED, attend_fused)
        return _compute(operator, definition, value, spatial_shapes, *rest)

    @staticmethod
    def symbolic(graph, *inputs):
        batch, heads, head_dim = _sizes(inputs[0], 0, 2, 3)
        channels = None if None in (heads, head_dim) else heads * head_dim
        name = NAME if len(inputs) == 4 else FUSED_NAME
        return _node(graph, DOMAIN, name, inputs, [batch, *_sizes(inputs[-2], 1), channels])


class _TensorRTNode(torch.autograd.Function):
    """As :class:`_Node`, with TensorRT's inputs and output."""

    @staticmethod
    def forward(ctx, value, spatial_shapes, level_start_index, sampling_locations, attention_weights):
        output = _compute(_PLAIN, attend, value, spatial_shapes, sampling_locations, attention_weights)
        return output.unflatten(-1, value.shape[2:])

    @staticmethod
    def symbolic(graph, *inputs):
        batch, heads, head_dim = _sizes(inputs[0], 0, 2, 3)
        return _node(graph, TENSORRT_DOMAIN, TENSORRT_NAME, inputs, [batch, *_sizes(inputs[3], 1), heads, head_dim])


def _custom(value, spatial_shapes, level_start_index, sampling_locations, attention_weights):
    _check_dtype(value, 'custom')
    return _Node.apply(value, spatial_shapes, *functional.unify(value, sampling_locations, attention_weights))


def _custom_fused(value, spatial_shapes, level_start_index, reference_points, sampling_offsets, attention_logits):
    _check_dtype(value, 'custom')
    return _Node.apply(
        value, spatial_shapes, *functional.unify_fused(value, reference_points, sampling_offsets, attention_logits)
    )


def _tensorrt(value, spatial_shapes, level_start_index, sampling_locations, attention_weights):
    _check_dtype(value, 'tensorrt')
    # TensorRT's plugin wants one dtype. In float16 it would round the locations to a pixel or two of a large level.
    floats = (tensor.float() for tensor in (value, sampling_locations, attention_weights))
    value32, *sampling = floats
    output = _TensorRTNode.apply(value32, spatial_shapes.int(), level_start_index.int(), *sampling)
    return output.flatten(2).to(value.dtype)


def _check_dtype(value: Tensor, form: str) -> None:
    if value.dtype not in (torch.float32, torch.float16):
        raise TypeError(
            f'value has dtype {value.dtype}, but the form {form!r} needs float32 or float16: convert the model with '
            '.float() or .half()'
        )


def _compute(operator, definition, value, spatial_shapes, *rest):
    shapes = spatial_shapes.long()
    levels = shapes, shapes.prod(1).cumsum(0) - shapes.prod(1)
    if runs_native(value.device, value.dtype):
        return operator(value, *levels, *rest, False)
    return definition(value, *levels, *rest)


def _sizes(tensor: torch.Value, *dims: int) -> list[int | None]:
    """Sizes of a tensor of the graph; None where the export does not know them."""
    sizes = torch.onnx.symbolic_helper._get_tensor_sizes(tensor) or [None] * 6
    return [sizes[dim] for dim in dims]


def _node(graph, domain: str, name: str, inputs, sizes: list[int | None]) -> torch.Value:
    output = graph.op(f'{domain}::{name}', *inputs)
    output.setType(inputs[0].type().with_sizes(sizes))
    return output


_FORMS = {
    'grid_sample': _fused(_grid_sample),
    'gather': functional.Substitute(attend, attend_fused),
    'custom': functional.Substitute(_custom, _custom_fused),
    'tensorrt': _fused(_tensorrt),
}
