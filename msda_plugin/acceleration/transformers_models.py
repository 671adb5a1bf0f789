"""The attention layers of Hugging Face transformers' models, on msda_plugin's operator.

One class per arithmetic. A layer is recognized by its results instead of its version: :func:`examine` runs the stock
forward and ours on a few random inputs, and a layer with other results, gradients or arguments stays unchanged.

The layers return the attention weights as well, which only visualizations read: a softmax that costs little beside the
sampling. The operator does not use them; it computes its own from the logits, without storing them.
"""

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msda_plugin.acceleration.convert_model import change_class, is_frozen_batch_norm
from msda_plugin.acceleration.text_fusion import TransformersTextFusion
from msda_plugin.ops import ms_deform_attn_fused, use_backend
from msda_plugin.ops.functional import Shapes
from msda_plugin.ops.points_per_level import ms_deform_attn_points_per_level

TOLERANCE = 1e-9  # of results in float64, relative to their size
OPTIONAL = ('encoder_attention_mask', 'output_attentions')  # arguments that have no effect on the results


class Attention(nn.Module):
    """The layer of Deformable DETR, Grounding DINO, OmDet-Turbo, RT-DETR, RF-DETR, LW-DETR and PP-DocLayout."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        encoder_hidden_states: Tensor,
        position_embeddings: Tensor | None = None,
        reference_points: Tensor,
        spatial_shapes: Tensor | None = None,
        spatial_shapes_list: Sequence[tuple[int, int]] | None = None,
        level_start_index: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor]:
        """Attend from each query to a few points around its reference, on every level.

        Args:
            hidden_states: (bs, num_queries, channels), the queries.
            attention_mask: (bs, num_keys), False where the value is padding.
            encoder_hidden_states: (bs, num_keys, channels), the value before its projection.
            position_embeddings: added to the queries, with their shape.
            reference_points: (bs, num_queries, num_levels or 1, 2 or 4), 0-1 over the level.
            spatial_shapes, spatial_shapes_list: (h, w) of each level, as a tensor (num_levels, 2), as pairs, or both.
            level_start_index: (num_levels,) int64, the first key of each level. None: consecutive levels.
            **kwargs: ignored, as in the stock layer.

        Returns:
            (bs, num_queries, channels), and the attention weights (bs, num_queries, num_heads, num_levels, num_points).
        """
        if position_embeddings is not None:
            hidden_states = hidden_states + position_embeddings
        value = self.value_proj(encoder_hidden_states)
        if attention_mask is not None:
            value = _zero(value, self._padding(attention_mask), in_place=value is not encoder_hidden_states)
        points = (*hidden_states.shape[:2], self.n_heads, self.n_levels, self.n_points)
        logits = self.attention_weights(hidden_states).view(points)
        output = ms_deform_attn_fused(
            _split_heads(value, self.n_heads),
            _shapes(spatial_shapes, spatial_shapes_list),
            level_start_index,
            reference_points.expand(*points[:2], self.n_levels, -1),
            self.sampling_offsets(hidden_states).view(*points, 2),
            logits,
        )
        return self.output_proj(output), logits.flatten(-2).softmax(-1).view(points)

    @staticmethod
    def _padding(attention_mask: Tensor) -> Tensor:
        return ~attention_mask


class PixelDecoderAttention(Attention):
    """The layer of the pixel decoders of Mask2Former and OneFormer, whose mask is True where the value is padding."""

    @staticmethod
    def _padding(attention_mask: Tensor) -> Tensor:
        return attention_mask


class PointsPerLevelAttention(nn.Module):
    """The layer of RT-DETRv2, whose offsets have a scale and whose method may be 'discrete'."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        encoder_hidden_states: Tensor,
        position_embeddings: Tensor | None = None,
        reference_points: Tensor,
        spatial_shapes: Tensor | None = None,
        spatial_shapes_list: Sequence[tuple[int, int]] | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor]:
        """As in :class:`Attention`, with boxes (bs, num_queries, 1, 4) as reference points.

        Returns:
            (bs, num_queries, channels), and the attention weights (bs, num_queries, num_heads, points of all levels).
        """
        if position_embeddings is not None:
            hidden_states = hidden_states + position_embeddings
        value = self.value_proj(encoder_hidden_states)
        if attention_mask is not None:
            value = _zero(value, ~attention_mask, in_place=value is not encoder_hidden_states)
        output, weights = _attend_per_level(
            self,
            hidden_states,
            value,
            reference_points,
            _shapes(spatial_shapes, spatial_shapes_list),
            self.n_points_list,
            self.n_points_scale,
            self.method,
        )
        return self.output_proj(output), weights


class UnprojectedAttention(nn.Module):
    """The layer of D-FINE and DEIMv2: no projections of value and output, and another number of points per level."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        encoder_hidden_states: Tensor,
        reference_points: Tensor,
        spatial_shapes: Tensor | None = None,
        spatial_shapes_list: Sequence[tuple[int, int]] | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor]:
        """As in :class:`PointsPerLevelAttention`; position embeddings are ignored, as in the stock layer."""
        value = encoder_hidden_states
        if attention_mask is not None:
            value = _zero(value, ~attention_mask, in_place=False)
        return _attend_per_level(
            self,
            hidden_states,
            value,
            reference_points,
            _shapes(spatial_shapes, spatial_shapes_list),
            self.num_points_list,
            self.num_points_scale,
            self.decoder_method,
        )


class FrozenBatchNorm(nn.Module):
    """The batch norm of transformers' ResNets with constant statistics, in one pass where no gradient is needed."""

    def forward(self, x: Tensor) -> Tensor:
        """(bs, channels, h, w) -> (bs, channels, h, w)."""
        if x.dtype != self.weight.dtype or (x.requires_grad and torch.is_grad_enabled()):
            return super().forward(x)  # F.batch_norm would keep the dtype, and store its input
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=1e-5)


LAYERS = (Attention, PixelDecoderAttention, PointsPerLevelAttention, UnprojectedAttention)
_examined: dict[tuple, type[nn.Module] | None] = {}  # the class in LAYERS, by class and fields of the stock layer
_compared_fusions: dict[tuple, bool] = {}  # by class and fields of the stock layer


def _attend_per_level(
    layer: nn.Module,
    queries: Tensor,
    value: Tensor,
    boxes: Tensor,
    shapes: Shapes,
    points: Sequence[int],
    scale: Tensor,
    method: str,
) -> tuple[Tensor, Tensor]:
    """Attention with boxes, ``points[level]`` points per level and offsets in units of ``scale``, one per point."""
    if boxes.shape[-1] != 4:
        raise ValueError(
            f'reference_points has shape {tuple(boxes.shape)}, but (bs, num_queries, 1, 4) is needed: '
            f'{type(layer).__name__} supports boxes only'
        )
    total = (*queries.shape[:2], layer.n_heads, sum(points))
    offsets = layer.sampling_offsets(queries).view(*total, 2)
    logits = layer.attention_weights(queries).view(total)
    scale = scale.to(queries.dtype) * layer.offset_scale  # converted first, as in the stock layer
    output = ms_deform_attn_points_per_level(
        _split_heads(value, layer.n_heads), shapes, boxes, offsets, logits, points, scale, method
    )
    return output, logits.softmax(-1)


def _split_heads(value: Tensor, num_heads: int) -> Tensor:
    return value.unflatten(-1, (num_heads, -1))


def _shapes(tensor: Tensor | None, pairs: Sequence[tuple[int, int]] | None) -> Shapes:
    return pairs if tensor is None else tensor


def _zero(value: Tensor, padding: Tensor, in_place: bool) -> Tensor:
    # In place only without gradients: a projection's output is a view, and autograd would copy it.
    fill = value.masked_fill_ if in_place and not value.requires_grad else value.masked_fill
    return fill(padding[..., None], 0.0)


def examine(layer: nn.Module) -> tuple[type[nn.Module] | None, str]:
    """The class of this module that gives the results of a layer, and the reason why there is none.

    The comparison runs in float64 on the CPU, with random weights instead of the layer's, and leaves the state of
    random generators as it was.
    """
    name = type(layer).__name__
    forward = type(layer).forward
    if not any(base.__module__.startswith('transformers.') for base in type(layer).__mro__):
        return None, f'{name} is a class of {type(layer).__module__}, not of mmcv or transformers'
    if 'forward' in vars(layer) or not forward.__module__.startswith('transformers.'):
        return None, f'{name} has a forward of its own'
    if not hasattr(layer.sampling_offsets, 'in_features'):
        return None, f'{name}.sampling_offsets is a {type(layer.sampling_offsets).__name__}, not a linear layer'
    if any(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers())):
        return None, f'{name} is on the meta device, without values'
    for part, child in layer.named_children():
        if not any(True for _ in child.parameters()) and (child._forward_hooks or child._forward_pre_hooks):
            return None, f'a hook on {name}.{part} would not run'
    unknown = [
        argument
        for argument, parameter in inspect.signature(forward).parameters.items()
        if argument not in ('self', *OPTIONAL, *_known_arguments()) and parameter.kind != parameter.VAR_KEYWORD
    ]
    if unknown:
        return None, f'{name}.forward takes {" and ".join(unknown)}, which msda_plugin does not know'
    fields = {name: field for name, field in vars(layer).items() if not name.startswith('_')}
    key = (type(layer), forward, repr(layer), repr(fields))
    if key not in _examined:
        _examined[key] = next((ours for ours in LAYERS if _same_results(layer, ours)), None)
    ours = _examined[key]
    return ours, '' if ours else f'the results of {name}.forward differ from those of the operator'


def change_other_layers(model: nn.Module) -> None:
    """Make frozen batch norms run in one pass, and attention between image and text project the words alone."""
    for module in model.modules():
        if 'forward' in vars(module):
            continue
        if is_frozen_batch_norm(type(module)):
            change_class(module, FrozenBatchNorm)
        elif _is_text_fusion(type(module)) and has_results_of_text_fusion(module):
            change_class(module, TransformersTextFusion)


def has_results_of_frozen_batch_norm(stock: type[nn.Module]) -> bool:
    """Whether a class of transformers has the results of :class:`FrozenBatchNorm`."""
    with _isolated():
        norm = stock(3).double()
        for value, name in enumerate(('weight', 'bias', 'running_mean', 'running_var'), start=1):
            getattr(norm, name).copy_(torch.arange(1, 4) / value)
        x = torch.randn(2, 3, 2, 2, dtype=torch.float64)
        expected = norm(x)
        change_class(norm, FrozenBatchNorm)
        return torch.allclose(norm(x), expected, rtol=TOLERANCE, atol=TOLERANCE)


def _is_text_fusion(cls: type[nn.Module]) -> bool:
    return cls.__module__.startswith('transformers.') and cls.__name__.endswith('GroundingDinoBiMultiHeadAttention')


def has_results_of_text_fusion(layer: nn.Module) -> bool:
    """Whether a layer of transformers has the results of :class:`TransformersTextFusion`."""
    key = (type(layer), type(layer).forward, repr(layer))
    if key not in _compared_fusions:
        with _isolated():
            twin = _twin(layer).eval()
            draw = dict(dtype=torch.float64)
            inputs = (torch.randn(2, 5, layer.vision_dim, **draw), torch.randn(2, 3, layer.text_dim, **draw))
            masks = (torch.rand(2, 5) < 0.3, torch.tensor([[False] * 3, [False, False, True]]))
            cases = [(*inputs, None, None), (*inputs, *masks)]
            try:
                expected = [[*pixels, *words] for pixels, words in (twin(*case) for case in cases)]
                change_class(twin, TransformersTextFusion)
                results = [[*pixels, *words] for pixels, words in (twin(*case) for case in cases)]
                _compared_fusions[key] = all(map(_equal, results, expected))
            except Exception:  # noqa: BLE001  (of any type: the code is not ours)
                _compared_fusions[key] = False
    return _compared_fusions[key]


def _known_arguments() -> set[str]:
    return set(inspect.signature(Attention.forward).parameters) - {'self', 'kwargs'}


@contextmanager
def _isolated() -> Iterator[None]:
    """Computes on the CPU with gradients and fixed random numbers, whatever the modes and generators of the caller."""
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.device('cpu'),
        use_backend('reference'),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter('ignore')
        torch.random.default_generator.manual_seed(0)
        yield


def _same_results(layer: nn.Module, ours: type[nn.Module]) -> bool:
    """Whether outputs and gradients are equal, for points and for boxes; False if the stock layer takes neither."""
    with _isolated():
        twin = _twin(layer)
        cases = [(arguments, _outputs(twin, arguments)) for arguments in _random_arguments(layer)]
        change_class(twin, ours)
        supported = [(_outputs(twin, arguments), expected) for arguments, expected in cases if expected]
        return bool(supported) and all(_equal(outputs, expected) for outputs, expected in supported)


def _outputs(layer: nn.Module, arguments: dict[str, object]) -> list[Tensor]:
    """The outputs of a layer, and the gradients of queries and value; an empty list if it does not take arguments."""
    leaves = [arguments[name].requires_grad_() for name in ('hidden_states', 'encoder_hidden_states')]
    try:
        output, weights = layer.forward(**arguments)
        loss = (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum()
        return [output.detach(), weights.detach(), *torch.autograd.grad(loss, leaves)]
    except Exception:  # noqa: BLE001  (of any type: the code is not ours)
        return []


def _equal(outputs: list[Tensor], expected: list[Tensor]) -> bool:
    return len(outputs) == len(expected) and all(
        a.shape == b.shape and (a - b).abs().max() <= TOLERANCE * b.abs().max()
        for a, b in zip(outputs, expected, strict=True)
    )


def _random_arguments(layer: nn.Module) -> Iterator[dict[str, object]]:
    """Arguments of the forward, with points, boxes, and boxes without levels; each with and without a mask."""
    channels, levels, num_queries = layer.sampling_offsets.in_features, getattr(layer, 'n_levels', 1), 5
    pairs = [(4 + level, 7 - level % 6) for level in range(levels)]
    areas = [height * width for height, width in pairs]
    draw = dict(dtype=torch.float64, device='cpu')
    accepted = inspect.signature(type(layer).forward).parameters
    any_name = any(parameter.kind == parameter.VAR_KEYWORD for parameter in accepted.values())
    for size, masked in product(((levels, 2), (levels, 4), (1, 4)), (True, False)):
        arguments = dict(
            hidden_states=torch.randn(2, num_queries, channels, **draw),
            attention_mask=torch.rand(2, sum(areas)) < 0.7 if masked else None,
            encoder_hidden_states=torch.randn(2, sum(areas), channels, **draw),
            position_embeddings=torch.randn(2, num_queries, channels, **draw),
            reference_points=torch.rand(2, num_queries, *size, **draw),
            spatial_shapes=torch.tensor(pairs),
            spatial_shapes_list=pairs,
            level_start_index=torch.tensor([sum(areas[:level]) for level in range(levels)]),
        )
        yield {name: argument for name, argument in arguments.items() if any_name or name in accepted}


def _twin(module: nn.Module) -> nn.Module:
    """A module of the same class and fields on the CPU, without hooks; its linear layers have random weights."""
    if hasattr(module, 'in_features'):  # also linear layers of adapters and quantizers
        return nn.Linear(module.in_features, module.out_features, dtype=torch.float64)
    twin = type(module).__new__(type(module))
    nn.Module.__init__(twin)
    vars(twin).update({name: field for name, field in vars(module).items() if not name.startswith('_')})
    for name, buffer in module.named_buffers(recurse=False):
        twin.register_buffer(name, buffer.detach().cpu())
    for name, child in module.named_children():
        setattr(twin, name, _twin(child))
    return twin
