"""Stock layers that hold less memory: the same numbers, from the same random state.

On the CPU torch's dropout keeps its noise for the backward pass, a float for every activation; a byte is enough. After
a ReLU not even that is needed: where the output is positive, the unit was active and kept. And an attention whose
weights nobody asks for need not form them.
"""

import torch
from mmengine.model import Sequential
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook


class Dropout(nn.Dropout):
    """``nn.Dropout`` whose backward pass keeps one byte an element, on every device."""

    def forward(self, x: Tensor) -> Tensor:
        """x, of any shape, with each element zeroed with probability p, and divided by 1 - p, in training."""
        if not (self.training and 0 < self.p < 1) or self.inplace:
            return super().forward(x)
        return torch.native_dropout(x, self.p, True)[0]


class LinearReLUDropout(Sequential):
    """A linear layer, ``nn.ReLU`` and ``nn.Dropout``, as in mmcv's feed-forward network, as one step in training.

    The output is all that is kept. One after the other, the ReLU keeps its output, the dropout its noise and the next
    layer its input; and a ReLU in place, on a view as the linear layer's output is, costs copies in the backward pass.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        linear, relu, dropout = self
        if not dropout.training or dropout.p == 1 or _has_hooks(relu) or _has_hooks(dropout):
            return dropout(relu(linear(x)))
        hidden = linear(x)
        return _ReLUDropout.apply(hidden, dropout.p) if dropout.p else hidden.relu()


class MultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` that never holds the (queries x keys) weights; mmcv's layer around it throws them away.

    A forward hook may be there to read them: then they are formed.
    """

    def forward(self, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        """As torch's, but the weights returned are None unless the layer has hooks."""
        return super().forward(*args, **kwargs | {'need_weights': _has_hooks(self)})


class _ReLUDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        output = F.dropout(x.relu(), p)
        ctx.save_for_backward(output)
        ctx.scale = 1 / (1 - p)
        return output

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (output,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(grad, output, 0).mul_(ctx.scale), None


def _has_hooks(module: nn.Module) -> bool:
    """Whether somebody waits for the module to be called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    )
