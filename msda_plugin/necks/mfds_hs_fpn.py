"""The high-level screening feature pyramid (HS-FPN) of MFDS-DETR.

Source: Chen et al., Accurate leukocyte detection based on deformable-DETR and multi-level feature fusion for aiding
diagnosis of blood diseases, Computers in Biology and Medicine 2024, https://arxiv.org/abs/2212.11552. Another neck of
2025 is called HS-FPN too; this one carries its detector's name.
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
    """One weight per channel, from its mean and its maximum over the map, through one shared two-layer perceptron."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, channels // REDUCTION, 1, bias=False)
        self.expand = nn.Conv2d(channels // REDUCTION, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Weights (B, C, 1, 1), 0 to 1, of a map (B, C, H, W)."""
        # Mean and maximum go through the perceptron as one map of two pixels.
        pooled = torch.stack([x.mean((2, 3)), x.amax((2, 3))], dim=-1).unsqueeze(-1)
        return self.expand(F.relu(self.squeeze(pooled))).sum(2, keepdim=True).sigmoid()


class FeatureSelection(nn.Module):
    """Weights the channels of a level and brings them to the pyramid's width: (B, C, H, W) to (B, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.attention = ChannelAttention(in_channels)
        self.proj = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.attention(x) * x)


@MODELS.register_module()
class MFDSHSFPN(BaseModule):
    """HS-FPN: the top level, upsampled step by step, screens the channels of every finer level and is added to it.

    Drop-in for ``ChannelMapper`` and ``FPN``.

    Args:
        in_channels: channels of the input maps, finest first; the detector uses three.
        out_channels: channels of every output map.
        num_outs: as many outputs as inputs, or one more (the detector's form): a coarser top level made from the last
            input. Default: one more.
        init_cfg: MMEngine's. Default: Xavier, uniform.

    Raises:
        ValueError: for another ``num_outs``, or channels that the group norms (32 groups) cannot divide.
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
            raise ValueError('in_channels is empty, but the channels of at least one map are expected')
        if num_outs not in (num_ins, num_ins + 1):
            raise ValueError(
                f'num_outs is {num_outs} with {num_ins} in_channels, but HS-FPN has as many outputs as '
                f'inputs or one more: set num_outs to {num_ins} or {num_ins + 1}'
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
        # Entry i of each list is of level i, finest first; only the levels below the top are screened.
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
            ValueError: if number or channels of the maps are not those of ``in_channels``.
        """
        found = tuple(x.shape[1] for x in inputs)
        if found != self.in_channels:
            raise ValueError(
                f'MFDSHSFPN got maps of {list(found)} channels, but in_channels is '
                f'{list(self.in_channels)}: set it to what the backbone gives'
            )
        inputs = list(inputs)
        if self.top_level is not None:
            inputs.append(self.top_level(inputs[-1]))
        selected = [select(x) for select, x in zip(self.selections, inputs, strict=True)]

        # The chain of upsampled maps carries the top level alone, never what a finer level added.
        top = selected[-1]
        for level in reversed(range(len(selected) - 1)):
            top = self.upsamples[level](top)
            if top.shape[-2:] != selected[level].shape[-2:]:
                top = F.interpolate(top, selected[level].shape[-2:], mode='bilinear', align_corners=False)
            selected[level] = self.screens[level](top) * selected[level] + top
        return tuple(conv(x) for conv, x in zip(self.output_convs, selected, strict=True))
