"""Detail-specific feed-forward layer of the Shunted Transformer, GELU(h + DWConv3x3(h)) between two linear layers.

Source: Ren et al., "Shunted Self-Attention via Multi-Scale Token Aggregation", CVPR 2022, equation 6,
https://arxiv.org/abs/2111.15193; the residual inside the activation is the authors' code.
"""

import math
from collections.abc import Iterator

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from msda_plugin.layers.token_layout import map_to_tokens, tokens_to_map

# Hidden channels are independent of each other between fc1 and fc2. On the CPU they are computed in slices with at most
# this many bytes of activations. Slices stay close to the caches, and below the size from which the C library maps (and
# zeroes) new memory for each allocation.
SLICE_BYTES = 16 * 2**20


class DetailFeedForward(BaseModule):
    """fc1, GELU(h + DWConv3x3(h)), fc2.

    Args:
        embed_dims: token channels C.
        hidden_dims: hidden channels.
        drop_rate: dropout after the activation and after fc2, 0-1.
    """

    def __init__(self, embed_dims: int, hidden_dims: int, drop_rate: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(embed_dims, hidden_dims)
        self.dwconv = nn.Conv2d(hidden_dims, hidden_dims, 3, padding=1, groups=hidden_dims)
        self.fc2 = nn.Linear(hidden_dims, embed_dims)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Tokens (B, H * W, C) of a map of ``hw_shape`` (H, W) -> tokens (B, H * W, C)."""
        if self._can_slice(x):
            return _SlicedFeedForward.apply(
                x,
                self.fc1.weight,
                self.fc1.bias,
                self.dwconv.weight,
                self.dwconv.bias,
                self.fc2.weight,
                self.fc2.bias,
                hw_shape,
                torch.is_grad_enabled(),
            )
        x = self.fc1(x)
        x = F.gelu(x + map_to_tokens(self.dwconv(tokens_to_map(x, hw_shape))))
        return self.drop(self.fc2(self.drop(x)))

    def _can_slice(self, x: Tensor) -> bool:
        """Slices are faster only in eager mode on the CPU in float32 or float64, without dropout."""
        return (
            x.device.type == 'cpu'
            and x.dtype in (torch.float32, torch.float64)
            and not torch.is_autocast_enabled('cpu')
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
            and not (self.training and self.drop.p > 0)
        )


class _SlicedFeedForward(torch.autograd.Function):
    """The layer without dropout, computed in slices of hidden channels. Stores fc1's output for the backward pass."""

    @staticmethod
    def forward(ctx, x, weight1, bias1, weight_dw, bias_dw, weight2, bias2, hw_shape, keep_hidden):
        tokens = x.reshape(-1, x.shape[2])
        weight_dw = _with_identity(weight_dw)
        hidden = []
        out = None
        for part in _slices(tokens, weight1):
            h = torch.addmm(bias1[part], tokens, weight1[part].t())
            act = F.gelu(_depthwise(h, x.shape[0], hw_shape, weight_dw[part], bias_dw[part]))
            weight = weight2[:, part].t()
            out = torch.addmm(bias2, act, weight) if out is None else out.addmm_(act, weight)
            if keep_hidden:
                hidden.append(h)
        ctx.save_for_backward(tokens, weight1, weight_dw, bias_dw, weight2, *hidden)
        ctx.batch, ctx.hw_shape = x.shape[0], hw_shape
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        tokens, weight1, weight_dw, bias_dw, weight2, *hidden = ctx.saved_tensors
        shape = grad_out.shape
        grad_out = grad_out.reshape(tokens.shape)
        grad_weight1, grad_weight_dw, grad_weight2 = (torch.empty_like(w) for w in (weight1, weight_dw, weight2))
        grad_bias1, grad_bias_dw = torch.empty_like(bias_dw), torch.empty_like(bias_dw)
        grad_tokens = torch.zeros_like(tokens)
        for part, h in zip(_slices(tokens, weight1), hidden, strict=True):
            pre_act = _depthwise(h, ctx.batch, ctx.hw_shape, weight_dw[part], bias_dw[part])
            grad_weight2[:, part] = grad_out.t() @ F.gelu(pre_act)
            grad = torch.ops.aten.gelu_backward(grad_out @ weight2[:, part], pre_act)
            grad, grad_weight_dw[part], grad_bias_dw[part] = torch.ops.aten.convolution_backward(
                _to_map(grad, ctx.batch, ctx.hw_shape),
                _to_map(h, ctx.batch, ctx.hw_shape),
                weight_dw[part],
                [h.shape[1]],
                (1, 1),
                (1, 1),
                (1, 1),
                False,
                (0, 0),
                h.shape[1],
                (True, True, True),
            )
            grad = map_to_tokens(grad).flatten(0, 1)
            grad_weight1[part] = grad.t() @ tokens
            grad_bias1[part] = grad.sum(0)
            grad_tokens.addmm_(grad, weight1[part])
        return (
            grad_tokens.view(shape),
            grad_weight1,
            grad_bias1,
            grad_weight_dw,
            grad_bias_dw,
            grad_weight2,
            grad_out.sum(0),
            None,
            None,
        )


def _slices(tokens: Tensor, weight1: Tensor) -> Iterator[slice]:
    """Nearly equal slices of the hidden channels, multiples of 32 with about ``SLICE_BYTES`` of activations each."""
    hidden_dims = weight1.shape[0]
    num_slices = math.ceil(hidden_dims * tokens.shape[0] * tokens.element_size() / SLICE_BYTES)
    size = max(math.ceil(hidden_dims / num_slices / 32), 1) * 32
    return (slice(start, min(start + size, hidden_dims)) for start in range(0, hidden_dims, size))


def _with_identity(weight_dw: Tensor) -> Tensor:
    """The depthwise kernel of h + DWConv(h): 1 added to the center."""
    weight_dw = weight_dw.clone()
    weight_dw[:, :, 1, 1] += 1
    return weight_dw


def _to_map(tokens: Tensor, batch: int, hw_shape: tuple[int, int]) -> Tensor:
    return tokens_to_map(tokens.unflatten(0, (batch, -1)), hw_shape)


def _depthwise(tokens: Tensor, batch: int, hw_shape: tuple[int, int], weight: Tensor, bias: Tensor) -> Tensor:
    """Tokens (B * H * W, D) -> tokens (B * H * W, D)."""
    out = F.conv2d(_to_map(tokens, batch, hw_shape), weight, bias, padding=1, groups=weight.shape[0])
    return map_to_tokens(out).flatten(0, 1)
