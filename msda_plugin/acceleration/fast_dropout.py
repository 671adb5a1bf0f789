"""Dropout on CPUs that draws four elements at once, with other random numbers than PyTorch's.

PyTorch draws each element on its own and, on other CPUs than Intel's, on one thread: a fifth of a training step of
Deformable DETR.
"""

import torch
from torch import Tensor, nn

from msda_plugin.acceleration.convert_model import change_class, is_plain

STEPS = 1 << 16  # the probability is rounded to a multiple of 1 / STEPS


class FastDropout(nn.Dropout):
    """``nn.Dropout`` that draws 16 bits per element on the CPU, and stores one byte for the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """In training, zero each element of ``x`` (any shape) with probability p, and divide the others by 1 - p."""
        if not (self.training and 0 < self.p < 1) or self.inplace or x.device.type != 'cpu':
            return super().forward(x)
        return _Dropout.apply(x, self.p)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        kept, scale = draw(x, p)
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return (x * kept).mul_(scale)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return (grad * kept).mul_(ctx.scale), None


def draw(x: Tensor, p: float) -> tuple[Tensor, float]:
    """Which elements of ``x`` are kept, as bool of its shape, and the factor of these. 0 < p < 1."""
    dropped = min(max(round(p * STEPS), 1), STEPS - 1)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - STEPS // 2
    return kept, STEPS / (STEPS - dropped)


def use_fast_dropout(model: nn.Module) -> int:
    """Make each ``nn.Dropout`` of a model a :class:`FastDropout`, in place; ``restore`` undoes it.

    Returns:
        The number of changed dropouts.
    """
    count = 0
    for module in model.modules():
        if is_plain(module, nn.Dropout) and not isinstance(module, FastDropout):
            change_class(module, FastDropout)
            count += 1
    return count
