"""Memory-efficient versions of stock layers, with the same results from the same random state.

On the CPU PyTorch's dropout stores its noise for the backward pass, one float per element; one byte is enough. After a
ReLU no mask is needed: positive outputs are those that were active and kept. Attention weights that nothing reads need
not be computed.
"""

import torch
from mmengine.model import Sequential
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from msda_plugin.acceleration.fast_dropout import FastDropout, draw


class Dropout(nn.Dropout):
    """``nn.Dropout`` that stores one byte per element for the backward pass, on every device."""

    def forward(self, x: Tensor) -> Tensor:
        """In training, zero each element of ``x`` (any shape) with probability p, and divide the others by 1 - p."""
        if not (self.training and 0 < self.p < 1) or self.inplace:
            return super().forward(x)
        return torch.native_dropout(x, self.p, True)[0]


class LinearReLUDropout(Sequential):
    """A linear layer, ``nn.ReLU`` and ``nn.Dropout``, as in mmcv's feed-forward network, fused in training.

    Stores only the output. As separate layers, the ReLU stores its output, the dropout its noise and the next layer its
    input. An in-place ReLU on the linear layer's output, which is a view, also costs copies in the backward pass.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        linear, relu, dropout = self
        if not dropout.training or dropout.p == 1 or _has_hooks(relu) or _has_hooks(dropout):
            return dropout(relu(linear(x)))
        hidden = linear(x)
        fast = isinstance(dropout, FastDropout) and hidden.device.type == 'cpu'
        return _ReLUDropout.apply(hidden, dropout.p, fast) if dropout.p else hidden.relu()


class MultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` that does not compute the (queries x keys) weights, which mmcv's layer discards.

    With hooks on the layer, which may read them, the weights are computed.
    """

    def forward(self, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        """As in ``nn.MultiheadAttention``, but the weights are None unless the layer has hooks."""
        return super().forward(*args, **kwargs | {'need_weights': _has_hooks(self)})


class _ReLUDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, p: float, fast: bool) -> Tensor:
        if fast:
            kept, ctx.scale = draw(x, p)
            output = x.relu().mul_(kept).mul_(ctx.scale)
        else:
            output = F.dropout(x.relu(), p)
            ctx.scale = 1 / (1 - p)
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (output,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(grad, output, 0).mul_(ctx.scale), None, None


def _has_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs hooks."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    )
