"""The high-level screening feature pyramid (HS-FPN) of MFDS-DETR.

Source: Chen et al., Accurate leukocyte detection based on deformable-DETR and multi-level feature fusion for aiding
diagnosis of blood diseases, Computers in Biology and Medicine 2024, https://arxiv.org/abs/2212.11552. The class is
named after its detector because another neck (AAAI 2025) is also called HS-FPN.
"""

from collections.abc import Sequence

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn import functional as F

from msda_plugin.registry import MODELS

NUM_GROUPS = 32  # of the group norms
REDUCTION = 4  # of the channel attention's hidden layer


class ChannelAttention(nn.Module):
    """One weight per channel: mean and maximum over the map, each through a shared two-layer perceptron, summed."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, channels // REDUCTION, 1, bias=False)
        self.expand = nn.Conv2d(channels // REDUCTION, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Weights (B, C, 1, 1), 0 to 1, of a map (B, C, H, W)."""
        # Mean and maximum pass the perceptron as a map of two pixels.
        pooled = torch.stack([x.mean((2, 3)), x.amax((2, 3))], dim=-1).unsqueeze(-1)
        return self.expand(F.relu(self.squeeze(pooled))).sum(2, keepdim=True).sigmoid()


class FeatureSelection(nn.Module):
    """Channel attention and a projection to the pyramid's width: (B, C, H, W) -> (B, out_channels, H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.attention = ChannelAttention(in_channels)
        self.proj = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.attention(x) * x)


@MODELS.register_module()
class MFDSHSFPN(BaseModule):
    """HS-FPN: the top level, upsampled step by step, weights the channels of every finer level and is added to it.

    Drop-in replacement for ``ChannelMapper`` and ``FPN``.

    Args:
        in_channels: channels of the input maps, finest first; MFDS-DETR uses three.
        out_channels: channels of every output map.
        num_outs: the number of inputs, or one more (the default, as in MFDS-DETR) for a coarser top level computed from
            the last input.
        init_cfg: as in MMEngine. Default: Xavier, uniform.

    Raises:
        ValueError: If ``num_outs`` has another value, or 32, the number of groups of the norms, does not divide the
            channels.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 256,
        num_outs: int | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(
            init_cfg=init_cfg or dict(type='Xavier', layer=['Conv2d', 'ConvTranspose2d'], distribution='uniform')
        )
        self.in_channels = tuple(in_channels)
        num_ins = len(self.in_channels)
        num_outs = num_ins + 1 if num_outs is None else num_outs
        if num_ins == 0:
            raise ValueError('in_channels is empty; expected the channels of at least one map')
        if num_outs not in (num_ins, num_ins + 1):
            raise ValueError(
                f'num_outs is {num_outs} with {num_ins} in_channels, but HS-FPN has as many outputs as inputs, or one '
                f'more: set num_outs to {num_ins} or {num_ins + 1}'
            )
        if out_channels % NUM_GROUPS or (num_outs > num_ins and 2 * self.in_channels[-1] % NUM_GROUPS):
            raise ValueError(
                f'out_channels is {out_channels} and the last of in_channels {self.in_channels[-1]}, but '
                f'out_channels must be a multiple of {NUM_GROUPS}, and the last input of '
                f'{NUM_GROUPS // 2}, for the group norms'
            )
        if min(*self.in_channels, out_channels) < REDUCTION:
            raise ValueError(f'in_channels is {self.in_channels}, but the channel attention needs at least {REDUCTION}')

        channels = list(self.in_channels)
        self.top_level = None
        if num_outs > num_ins:
            top = channels[-1]
            self.top_level = nn.Sequential(
                nn.Conv2d(top, top // 2, 1),
                nn.Conv2d(top // 2, top // 2, 3, stride=2, padding=1),
                nn.Conv2d(top // 2, 2 * top, 1),
                nn.GroupNorm(NUM_GROUPS, 2 * top),
            )
            channels.append(2 * top)
        # Entry i of each list belongs to level i, finest first; upsamples and screens exclude the top level.
        self.selections = nn.ModuleList(FeatureSelection(c, out_channels) for c in channels)
        self.upsamples = nn.ModuleList(
            nn.ConvTranspose2d(out_channels, out_channels, 3, stride=2, padding=1, output_padding=1)
            for _ in channels[:-1]
        )
        self.screens = nn.ModuleList(ChannelAttention(out_channels) for _ in channels[:-1])
        self.output_convs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(out_channels, out_channels, 3, padding=1),
                nn.GroupNorm(NUM_GROUPS, out_channels),
                nn.ReLU(inplace=True),
            )
            for _ in channels
        )

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Fuse a pyramid.

        Args:
            inputs: maps (B, in_channels[i], H_i, W_i), finest first, of any sizes.

        Returns:
            ``num_outs`` maps (B, out_channels, H_i, W_i), finest first; an extra top level has half the last input's
            sides, rounded up.

        Raises:
            ValueError: If the number of maps or their channels differ from ``in_channels``.
        """
        found = tuple(x.shape[1] for x in inputs)
        if found != self.in_channels:
            raise ValueError(
                f'MFDSHSFPN got maps of {list(found)} channels, but in_channels is '
                f'{list(self.in_channels)}: set it to the channels of the backbone'
            )
        inputs = list(inputs)
        if self.top_level is not None:
            inputs.append(self.top_level(inputs[-1]))
        selected = [select(x) for select, x in zip(self.selections, inputs, strict=True)]

        # The chain carries the upsampled top level only: neither the fused outputs nor the maps resized for a fusion.
        top = selected[-1]
        for level in reversed(range(len(selected) - 1)):
            top = self.upsamples[level](top)
            size = selected[level].shape[-2:]
            resized = top
            if top.shape[-2:] != size:
                resized = F.interpolate(top, size, mode='bilinear', align_corners=False)
            selected[level] = self.screens[level](resized) * selected[level] + resized
        return tuple(conv(x) for conv, x in zip(self.output_convs, selected, strict=True))
