"""mmcv's ``im2col_step`` is accepted with any batch size."""

import torch

from msda_plugin.layers.multi_scale_deformable_attention import MultiScaleDeformableAttention


def test_im2col_step_has_no_effect():
    query, value = torch.rand(3, 5, 16), torch.rand(3, 12, 16)  # mmcv's kernel refuses this: 2 does not divide 3
    outputs = []
    for step in (64, 2):
        torch.manual_seed(0)
        layer = MultiScaleDeformableAttention(
            embed_dims=16, num_heads=2, num_levels=1, num_points=2, dropout=0.0, batch_first=True, im2col_step=step
        )
        outputs.append(
            layer(
                query,
                value=value,
                reference_points=torch.full((3, 5, 1, 2), 0.5),
                spatial_shapes=torch.tensor([[3, 4]]),
                level_start_index=torch.tensor([0]),
            )
        )
    assert outputs[0].shape == (3, 5, 16)
    assert torch.equal(*outputs)
