"""Feed-forward layer with a depthwise convolution between the linear layers.

Source: Wang et al., PVT v2, https://arxiv.org/abs/2106.13797, section 3.2.
"""

from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn import functional as F

from msda_plugin.layers.token_layout import map_to_tokens, tokens_to_map


class MixFeedForward(BaseModule):
    """fc1, GELU(DWConv3x3(h)), fc2, without residual connections.

    Args:
        embed_dims: token channels C.
        hidden_dims: hidden channels.
        use_conv: use the convolution; False gives the feed-forward layer of PVT v1 and Swin.
    """

    def __init__(self, embed_dims: int, hidden_dims: int, use_conv: bool = True):
        super().__init__()
        self.fc1 = nn.Linear(embed_dims, hidden_dims)
        self.dwconv = nn.Conv2d(hidden_dims, hidden_dims, 3, padding=1, groups=hidden_dims) if use_conv else None
        self.fc2 = nn.Linear(hidden_dims, embed_dims)

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Tokens (B, H * W, C) of a map of ``hw_shape`` (H, W) -> tokens (B, H * W, C)."""
        x = self.fc1(x)
        if self.dwconv is not None:
            x = map_to_tokens(self.dwconv(tokens_to_map(x, hw_shape)))
        return self.fc2(F.gelu(x))
