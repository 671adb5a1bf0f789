"""SwinNeck: blocks equal to MMDetection's Swin, with alternating regular and shifted windows."""

import pytest
import torch
from mmdet.models.backbones.swin import SwinBlockSequence
from mmdet.models.necks import ChannelMapper

from msda_plugin.necks import SwinNeck

CHANNELS = [24, 40]


@pytest.mark.parametrize('window_size', [7, 4])
def test_blocks_equal_swin(window_size):
    torch.manual_seed(0)
    neck = SwinNeck(
        CHANNELS, 32, num_outs=3, depth=4, num_heads=4, window_size=window_size, fusion=None, layer_scale_init_value=1.0
    ).double()
    for name, parameter in neck.named_parameters():
        if 'scale' not in name:
            torch.nn.init.normal_(parameter, mean=0.2, std=0.3)
    mapper = ChannelMapper(
        CHANNELS, 32, 1, norm_cfg=dict(type='GN', num_groups=32), act_cfg=None, bias=True, num_outs=3
    ).double()
    mapper.load_state_dict(neck.state_dict(), strict=False)
    inputs = [torch.randn(2, 24, 13, 10, dtype=torch.float64), torch.randn(2, 40, 6, 5, dtype=torch.float64)]
    outs, maps = neck(inputs), mapper(inputs)
    for level in range(2):
        theirs = SwinBlockSequence(32, 4, feedforward_channels=128, depth=4, window_size=window_size).double()
        theirs.load_state_dict(
            {
                f'blocks.{name}'.replace('ffn.fc1', 'ffn.layers.0.0').replace('ffn.fc2', 'ffn.layers.1'): value
                for name, value in neck.blocks[level].state_dict().items()
                if 'scale' not in name
            }
        )
        expected = theirs(maps[level].flatten(2).mT, maps[level].shape[2:])[0]
        torch.testing.assert_close(outs[level].flatten(2).mT, expected, rtol=1e-12, atol=1e-10)
    assert torch.equal(outs[2], maps[2])


def test_an_odd_depth_is_refused():
    with pytest.raises(ValueError, match='depth=3; expected an even number of blocks'):
        SwinNeck(CHANNELS, 32, depth=3)
