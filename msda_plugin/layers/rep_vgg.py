"""RepVGG blocks and the convolutional blocks built of them, which a deployed model runs as plain convolutions.

Sources: Ding et al., RepVGG, https://arxiv.org/abs/2101.03697; Zhao et al., RT-DETR, https://arxiv.org/abs/2304.08069,
figure 4 (the fusion block); Peng et al., D-FINE, https://arxiv.org/abs/2410.13842 (the block of its encoder).
"""

import torch
from mmcv.cnn import ConvModule, build_activation_layer, fuse_conv_bn
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

BATCH_NORM = dict(type='BN')
SILU = dict(type='SiLU', inplace=True)


class RepVGGBlock(BaseModule):
    """The sum of a 3x3 and a 1x1 convolution, each with a norm, then an activation.

    Args:
        channels: channels of input and output.
        norm_cfg, act_cfg: configs of norm and activation.
    """

    def __init__(self, channels: int, norm_cfg: dict = BATCH_NORM, act_cfg: dict = SILU) -> None:
        super().__init__()
        self.conv1 = ConvModule(channels, channels, 3, padding=1, norm_cfg=norm_cfg, act_cfg=None)
        self.conv2 = ConvModule(channels, channels, 1, norm_cfg=norm_cfg, act_cfg=None)
        self.act = build_activation_layer(act_cfg)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> the same shape."""
        return self.act(self.conv(x) if hasattr(self, 'conv') else self.conv1(x) + self.conv2(x))

    def fuse(self) -> None:
        """Replace both branches by one 3x3 convolution with the results of ``eval()``.

        Raises:
            TypeError: If the norms are not batch norms.
        """
        if hasattr(self, 'conv'):
            return
        if not isinstance(self.conv1.norm, _BatchNorm):
            raise TypeError(
                f'a RepVGG block has norms of type {type(self.conv1.norm).__name__}; only batch norms can be folded '
                "into a convolution: leave out fuse(), or build the neck with norm_cfg=dict(type='BN')"
            )
        conv, point = fuse_conv_bn(self.conv1).conv, fuse_conv_bn(self.conv2).conv
        conv.weight = nn.Parameter((conv.weight + F.pad(point.weight, (1, 1, 1, 1))).detach())
        conv.bias = nn.Parameter((conv.bias + point.bias).detach())
        self.conv = conv
        del self.conv1, self.conv2


class CSPRepLayer(BaseModule):
    """RepVGG blocks beside a 1x1 convolution: the fusion block of RT-DETR.

    Args:
        in_channels, out_channels: channels of input and output.
        num_blocks: number of RepVGG blocks.
        expansion: channels of the blocks as a multiple of ``out_channels``.
        norm_cfg, act_cfg: configs of norm and activation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int = 3,
        expansion: float = 1.0,
        norm_cfg: dict = BATCH_NORM,
        act_cfg: dict = SILU,
    ) -> None:
        super().__init__()
        hidden = int(out_channels * expansion)
        cfg = dict(norm_cfg=norm_cfg, act_cfg=act_cfg)
        self.conv1 = ConvModule(in_channels, hidden, 1, **cfg)
        self.conv2 = ConvModule(in_channels, hidden, 1, **cfg)
        self.bottlenecks = nn.Sequential(*[RepVGGBlock(hidden, **cfg) for _ in range(num_blocks)])
        self.conv3 = ConvModule(hidden, out_channels, 1, **cfg) if hidden != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H, W)."""
        return self.conv3(self.bottlenecks(self.conv1(x)) + self.conv2(x))


class RepNCSPELAN4(BaseModule):
    """Four stages of 1x1, CSP-RepVGG and 3x3 convolutions, all concatenated: the fusion block of D-FINE.

    Args:
        in_channels, out_channels: channels of input and output.
        split_channels: channels of the first stage, of which one half continues; even.
        block_channels: channels of the two CSP stages.
        num_blocks: RepVGG blocks of each CSP stage.
        norm_cfg, act_cfg: configs of norm and activation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        split_channels: int,
        block_channels: int,
        num_blocks: int = 3,
        norm_cfg: dict = BATCH_NORM,
        act_cfg: dict = SILU,
    ) -> None:
        super().__init__()
        cfg = dict(norm_cfg=norm_cfg, act_cfg=act_cfg)
        self.cv1 = ConvModule(in_channels, split_channels, 1, **cfg)
        self.cv2, self.cv3 = (
            nn.Sequential(
                CSPRepLayer(channels, block_channels, num_blocks, **cfg),
                ConvModule(block_channels, block_channels, 3, padding=1, **cfg),
            )
            for channels in (split_channels // 2, block_channels)
        )
        self.cv4 = ConvModule(split_channels + 2 * block_channels, out_channels, 1, **cfg)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H, W)."""
        outs = [*self.cv1(x).chunk(2, 1)]
        outs.append(self.cv2(outs[-1]))
        outs.append(self.cv3(outs[-1]))
        return self.cv4(torch.cat(outs, 1))
