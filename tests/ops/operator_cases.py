"""Inputs for tests of the operator, and two definitions that are independent of the package."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Case:
    """One set of inputs; ``plain()`` and ``fused()`` are the arguments of the two forms."""

    shapes: list[tuple[int, int]]
    value: Tensor
    locations: Tensor
    weights: Tensor
    reference_points: Tensor
    offsets: Tensor
    logits: Tensor
    num_points: list[int] | None = None

    def plain(self) -> tuple[Tensor, ...]:
        return self.value, self.locations, self.weights

    def fused(self) -> tuple[Tensor, ...]:
        return self.value, self.reference_points, self.offsets, self.logits

    def to(self, *args) -> 'Case':
        tensors = [t.detach().to(*args) for t in (*self.plain(), *self.fused()[1:])]
        return Case(self.shapes, *tensors, self.num_points)

    def requires_grad(self) -> 'Case':
        for tensor in (*self.plain(), *self.fused()[1:]):
            tensor.requires_grad_()
        return self


def make_case(
    shapes=((5, 7), (3, 2), (1, 1)),
    batch=2,
    queries=4,
    heads=2,
    head_dim=6,
    points=3,
    reference_size=2,
    seed=0,
    dtype=torch.float64,
    spread=0.3,
) -> Case:
    """Random inputs.

    ``points`` is the number on each level, or a list with one number for each level. ``spread`` is how far locations
    reach outside of the level, as a fraction of its size.
    """
    g = torch.Generator().manual_seed(seed)
    levels, keys = len(shapes), sum(h * w for h, w in shapes)
    uneven = not isinstance(points, int)
    sampling = (batch, queries, heads, *((sum(points),) if uneven else (levels, points)))

    def rand(*size):
        return torch.rand(*size, generator=g, dtype=torch.float64).to(dtype)

    return Case(
        shapes=list(shapes),
        value=rand(batch, keys, heads, head_dim) - 0.5,
        locations=rand(*sampling, 2) * (1 + 2 * spread) - spread,
        weights=rand(*sampling),
        reference_points=rand(batch, queries, levels, reference_size),
        offsets=(rand(*sampling, 2) - 0.5) * 6,
        logits=(rand(*sampling) - 0.5) * 4,
        num_points=points if uneven else None,
    )


def grid_sample_attention(
    value: Tensor, shapes, locations: Tensor, weights: Tensor, num_points: Sequence[int] | None = None
) -> Tensor:
    """The operator in terms of ``grid_sample``."""
    batch, _, heads, head_dim = value.shape
    queries = locations.shape[1]
    locations, weights = (t.split(num_points, 3) if num_points else t.unbind(3) for t in (locations, weights))
    output = value.new_zeros(batch * heads, head_dim, queries)
    parts = value.split([h * w for h, w in shapes], 1)
    for level, (part, (height, width)) in enumerate(zip(parts, shapes, strict=True)):
        image = part.permute(0, 2, 3, 1).reshape(batch * heads, head_dim, height, width)
        points = locations[level].shape[3]
        grid = (2 * locations[level] - 1).transpose(1, 2).reshape(batch * heads, queries, points, 2)
        sampled = F.grid_sample(image, grid, mode='bilinear', padding_mode='zeros', align_corners=False)
        weight = weights[level].transpose(1, 2).reshape(batch * heads, 1, queries, points)
        output = output + (sampled * weight).sum(-1)
    return output.view(batch, heads * head_dim, queries).transpose(1, 2)


def locations_and_weights(
    shapes, reference_points: Tensor, offsets: Tensor, logits: Tensor, num_points: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Sampling locations and attention weights of the fused operator."""
    if num_points:  # as many levels as samples, with one point each
        counts = torch.tensor(num_points)
        level = torch.arange(len(shapes)).repeat_interleave(counts)
        if reference_points.shape[-1] == 4:
            offsets = offsets / counts[level][:, None]
        locations, weights = locations_and_weights(
            [shapes[i] for i in level], reference_points[:, :, level], offsets[..., None, :], logits[..., None]
        )
        return locations[..., 0, :], weights[..., 0]
    weights = logits.flatten(-2).softmax(-1).view_as(logits)
    if reference_points.shape[-1] == 2:
        size = torch.tensor([(w, h) for h, w in shapes], dtype=offsets.dtype, device=offsets.device)
        return reference_points[:, :, None, :, None] + offsets / size[:, None], weights
    center, extent = reference_points[:, :, None, :, None].split(2, -1)
    return center + offsets / offsets.shape[-2] * extent * 0.5, weights


def value_and_grads(function, inputs, grad: Tensor | None = None) -> tuple[Tensor, ...]:
    """Return the output and the gradients of a fixed linear combination of its elements (or with ``grad``)."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    output = function(*inputs)
    if grad is None:
        grad = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
    return (output.detach(), *torch.autograd.grad(output, inputs, grad.to(output)))


def expected_forward(case: Case, dtype: torch.dtype, weight_scale: float = 1) -> tuple[list[Tensor], Tensor, Tensor]:
    """Inputs with ``value`` in ``dtype`` and the others in float32, the output in float64, and its largest error.

    Only the values and the output are rounded to ``dtype``. Weights have 16 bits of precision at least; positions and
    sums are computed in float32.
    """
    inputs = [case.value.to(dtype), case.locations.float(), case.weights.float() * weight_scale]
    value, locations, weights = (tensor.double() for tensor in inputs)
    expected = grid_sample_attention(value, case.shapes, locations, weights, case.num_points)
    terms = grid_sample_attention(value.abs(), case.shapes, locations, weights.abs(), case.num_points)
    limits = torch.finfo(dtype)
    rounding = (limits.eps / 2 * expected.abs()).clamp(min=limits.smallest_normal * limits.eps)
    position = 2**-22 * max(max(shape) for shape in case.shapes)  # in pixels
    steepest = weights.abs().flatten(3).sum(3).max() * value.nan_to_num(0, 0, 0).abs().max()
    return inputs, expected, rounding + 2**-16 * terms + position * steepest
