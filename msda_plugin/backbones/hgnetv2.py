"""PP-HGNetV2, the backbone of D-FINE and DEIM.

Sources: Cui et al., PP-LCNet and PP-HGNet in PaddleClas, https://github.com/PaddlePaddle/PaddleClas, and its use in
D-FINE, https://arxiv.org/abs/2410.13842. State-dict keys are those of D-FINE's authors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from msda_plugin.backbones.published_backbone import (
    PublishedBackbone,
    check_frozen_stages,
    check_image,
    check_indices,
    choose_arch,
)
from msda_plugin.layers.transformer_parts import run_layer
from msda_plugin.registry import MODELS

# stem: channels inside and after the stem. inner, channels, blocks: of each stage. layers: convolutions of a block.
ARCHS = {
    'B0': dict(stem=(16, 16), inner=(16, 32, 64, 128), channels=(64, 256, 512, 1024), blocks=(1, 1, 2, 1), layers=3),
    'B1': dict(stem=(24, 32), inner=(32, 48, 96, 192), channels=(64, 256, 512, 1024), blocks=(1, 1, 2, 1), layers=3),
    'B2': dict(stem=(24, 32), inner=(32, 64, 128, 256), channels=(96, 384, 768, 1536), blocks=(1, 1, 3, 1), layers=4),
    'B3': dict(stem=(24, 32), inner=(32, 64, 128, 256), channels=(128, 512, 1024, 2048), blocks=(1, 1, 3, 1), layers=5),
    'B4': dict(stem=(32, 48), inner=(48, 96, 192, 384), channels=(128, 512, 1024, 2048), blocks=(1, 1, 3, 1), layers=6),
    'B5': dict(
        stem=(32, 64), inner=(64, 128, 256, 512), channels=(128, 512, 1024, 2048), blocks=(1, 2, 5, 2), layers=6
    ),
    'B6': dict(
        stem=(48, 96), inner=(96, 192, 384, 768), channels=(192, 512, 1024, 2048), blocks=(2, 3, 6, 3), layers=6
    ),
}


class LearnableAffine(nn.Module):
    """``scale * x + bias`` with one learned scale and bias for all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return self.scale * x + self.bias


class Bound(nn.Module):
    """Clamp to at least ``low`` and at most ``high``, in place."""

    def __init__(self, low: float | None, high: float | None) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return x.clamp_(self.low, self.high)


class ConvNormAct(nn.Module):
    """Convolution, batch norm, ReLU and :class:`LearnableAffine`; the last two are optional."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        act: bool = True,
        affine: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, channels, kernel_size, stride, (kernel_size - 1) // 2, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True) if act else nn.Identity()
        self.lab = LearnableAffine() if act and affine else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, channels, H / stride, W / stride), rounded up."""
        return self.lab(self.act(self.bn(self.conv(x))))

    def fuse(self) -> None:
        """Fold the batch norm and the affine block into the convolution."""
        if isinstance(self.bn, nn.BatchNorm2d):
            self.conv = fuse_conv_bn_eval(self.conv, self.bn.eval())
            self.bn = nn.Identity()
        if isinstance(self.lab, LearnableAffine):
            scale, bias = self.lab.scale.item(), self.lab.bias.item()
            with torch.no_grad():
                self.conv.weight *= scale
                self.conv.bias.mul_(scale).add_(bias)
            # scale * max(x, 0) + bias = max(scale * x + bias, bias), or the minimum for a negative scale
            self.act = Bound(bias, None) if scale >= 0 else Bound(None, bias)
            self.lab = nn.Identity()


class LightConv(nn.Module):
    """A 1x1 convolution and a depthwise one."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int, affine: bool) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(in_channels, channels, 1, act=False)
        self.conv2 = ConvNormAct(channels, channels, kernel_size, groups=channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, channels, H, W)."""
        return self.conv2(self.conv1(x))


class Stem(nn.Module):
    """Stride 4, with a branch of convolutions and one of pooling."""

    def __init__(self, in_channels: int, inner: int, channels: int, affine: bool) -> None:
        super().__init__()
        self.stem1 = ConvNormAct(in_channels, inner, 3, 2, affine=affine)
        self.stem2a = ConvNormAct(inner, inner // 2, 2, affine=affine)
        self.stem2b = ConvNormAct(inner // 2, inner, 2, affine=affine)
        self.stem3 = ConvNormAct(2 * inner, inner, 3, 2, affine=affine)
        self.stem4 = ConvNormAct(inner, channels, 1, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, channels, H / 4, W / 4), rounded up."""
        # Kernels of 2 keep the size with one row and column of padding, below and to the right.
        x = F.pad(self.stem1(x), (0, 1, 0, 1))
        convolved = self.stem2b(F.pad(self.stem2a(x), (0, 1, 0, 1)))
        # The maximum of 2x2 pixels: max_pool2d is many times slower on CPUs.
        pooled = torch.maximum(x[..., :-1, :], x[..., 1:, :])
        pooled = torch.maximum(pooled[..., :-1], pooled[..., 1:])
        return self.stem4(self.stem3(torch.cat([pooled, convolved], 1)))


class Block(nn.Module):
    """A chain of convolutions whose outputs are concatenated and reduced by two 1x1 convolutions."""

    def __init__(
        self,
        in_channels: int,
        inner: int,
        channels: int,
        num_layers: int,
        kernel_size: int,
        light: bool,
        residual: bool,
        affine: bool,
    ) -> None:
        super().__init__()
        self.residual = residual
        layer = LightConv if light else ConvNormAct
        self.layers = nn.ModuleList(
            [layer(inner if i else in_channels, inner, kernel_size, affine=affine) for i in range(num_layers)]
        )
        self.aggregation = nn.Sequential(
            ConvNormAct(in_channels + num_layers * inner, channels // 2, 1, affine=affine),
            ConvNormAct(channels // 2, channels, 1, affine=affine),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, channels, H, W)."""
        outs = [x]
        for layer in self.layers:
            outs.append(layer(outs[-1]))
        out = self.aggregation(torch.cat(outs, 1))
        return out + x if self.residual else out


class Stage(nn.Module):
    """A depthwise convolution of stride 2, except in the first stage, and blocks."""

    def __init__(self, in_channels: int, blocks: Sequence[Block], downsample: bool) -> None:
        super().__init__()
        self.downsample = (
            ConvNormAct(in_channels, in_channels, 3, 2, groups=in_channels, act=False) if downsample else nn.Identity()
        )
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, channels, H / 2, W / 2), rounded up; the first stage keeps the size."""
        return self.blocks(self.downsample(x))


@MODELS.register_module()
class HGNetV2(PublishedBackbone):
    """PP-HGNetV2 as a detection backbone.

    Args:
        arch: 'B0' to 'B6', or a dict with the keys of an entry of ``ARCHS``: ``stem`` (channels inside and after the
            stem), ``inner``, ``channels`` and ``blocks`` (one value per stage: channels inside a block and after it,
            number of blocks) and ``layers`` (convolutions of a block). From the third stage on, blocks have light
            5x5 convolutions.
        in_channels: channels of the images.
        out_indices: 0-based stages whose maps are returned, in increasing order; strides are 4, 8, 16 and 32. D-FINE-N
            takes (2, 3).
        use_lab: a learnable affine block after each ReLU, as in D-FINE-N, S and M.
        frozen_stages: -1 freezes nothing; 0 freezes the stem, as in D-FINE-L and X; k > 0 freezes the stem and the
            first k stages.
        frozen_norms: every batch norm uses its running statistics and has no gradients, as in D-FINE-L and X.
        with_cp: recompute each stage in the backward pass instead of keeping its activations.
        init_cfg: ``dict(type='Pretrained', checkpoint=path_or_url)`` loads a checkpoint of D-FINE's authors or of
            transformers, or (with ``prefix='backbone.'``) that of a detector; None: PyTorch's initialization, as in
            the authors' code.

    Raises:
        ValueError: If ``arch`` is unknown or invalid, or an index is out of range.

    Example:
        >>> backbone = HGNetV2('B0', use_lab=True)
        >>> [tuple(x.shape) for x in backbone(torch.rand(1, 3, 64, 96))]
        [(1, 256, 8, 12), (1, 512, 4, 6), (1, 1024, 2, 3)]
    """

    family = 'dfine'

    def __init__(
        self,
        arch: str | dict = 'B0',
        in_channels: int = 3,
        out_indices: Sequence[int] = (1, 2, 3),
        use_lab: bool = False,
        frozen_stages: int = -1,
        frozen_norms: bool = False,
        with_cp: bool = False,
        init_cfg: dict | list | None = None,
    ) -> None:
        super().__init__(init_cfg)
        arch = resolve_arch(arch)
        channels = arch['channels']
        self.in_channels = in_channels
        self.out_indices = check_indices('out_indices', out_indices, len(channels), 'stages')
        self.out_channels = tuple(channels[i] for i in self.out_indices)
        self.frozen_stages = check_frozen_stages(frozen_stages, len(channels), 'stem', 'stages')
        self.frozen_norms = frozen_norms
        self.with_cp = with_cp

        self.stem = Stem(in_channels, *arch['stem'], use_lab)
        self.stages = nn.ModuleList()
        before = arch['stem'][1]
        for i, after in enumerate(channels):
            light = i >= 2
            blocks = [
                Block(
                    after if j else before,
                    arch['inner'][i],
                    after,
                    arch['layers'],
                    kernel_size=5 if light else 3,
                    light=light,
                    residual=j > 0,
                    affine=use_lab,
                )
                for j in range(arch['blocks'][i])
            ]
            self.stages.append(Stage(before, blocks, downsample=i > 0))
            before = after
        self._freeze_stages()

    def _draw_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
                module.reset_parameters()
            elif isinstance(module, LearnableAffine):
                nn.init.ones_(module.scale)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images (B, in_channels, H, W) -> one map (B, C_i, H_i, W_i) per entry of ``out_indices``.

        Raises:
            ValueError: If the channels differ from ``in_channels``.
        """
        check_image('HGNetV2', x, self.in_channels)
        x = self.stem(x)
        outs = []
        for i, stage in enumerate(self.stages[: self.out_indices[-1] + 1]):
            x = run_layer(stage, self.with_cp, x=x)
            if i in self.out_indices:
                outs.append(x)
        return tuple(outs)

    def fuse(self) -> 'HGNetV2':
        """Fold batch norms and affine blocks into the convolutions, in place, for inference.

        The results are those of ``eval()``, up to rounding. The state dict has other keys afterwards, so load a
        checkpoint before.
        """
        for module in self.modules():
            if isinstance(module, ConvNormAct):
                module.fuse()
        return self

    def _freeze_stages(self) -> None:
        frozen = [self.stem, *self.stages[: self.frozen_stages]] if self.frozen_stages >= 0 else []
        if self.frozen_norms:
            frozen += [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]
        for module in frozen:
            module.eval().requires_grad_(False)


def resolve_arch(arch: str | dict) -> dict:
    """The arch dict of a published name, or a given dict.

    Raises:
        ValueError: If the name is unknown, or the dict is invalid.
    """
    arch = choose_arch(arch, ARCHS)
    num_stages = len(arch['channels'])
    # The first stem convolution and the blocks halve their channels.
    for key, length, least in (
        ('stem', 2, 2),
        ('inner', num_stages, 1),
        ('channels', num_stages, 2),
        ('blocks', num_stages, 1),
    ):
        if len(arch[key]) != length or min(arch[key]) < least:
            raise ValueError(f'arch dict has {key}={tuple(arch[key])}; expected {length} integers of at least {least}')
    if arch['layers'] < 1:
        raise ValueError(f'arch dict has layers={arch["layers"]}; expected 1 or more')
    return arch
