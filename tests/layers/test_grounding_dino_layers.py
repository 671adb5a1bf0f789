"""The image encoder equals the image layers of MMDetection's Grounding DINO."""

import pytest
import torch
from mmdet.models.layers.transformer.grounding_dino_layers import GroundingDinoTransformerEncoder
from mmdet.structures import DetDataSample
from mmengine.model import ModuleList
from torch import nn

from msda_plugin.layers import GroundingDinoImageEncoder, GroundingDinoImageEncoderLayer
from msda_plugin.registry import MODELS

SHAPES = ((6, 9), (3, 5), (1, 2))
NUM_KEYS = sum(h * w for h, w in SHAPES)
SMALL = dict(self_attn_cfg=dict(embed_dims=32, num_heads=4, num_levels=3), ffn_cfg=dict(feedforward_channels=64))


def build_theirs(num_layers, embed_dims, num_heads, num_levels, feedforward_channels):
    """MMDetection's encoder with fusion and text layers, and the image layers of its configs."""
    return GroundingDinoTransformerEncoder(
        num_layers=num_layers,
        num_cp=-1,
        layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=embed_dims, num_heads=num_heads, num_levels=num_levels, dropout=0.0),
            ffn_cfg=dict(embed_dims=embed_dims, feedforward_channels=feedforward_channels, ffn_drop=0.0),
        ),
        text_layer_cfg=dict(
            self_attn_cfg=dict(num_heads=4, embed_dims=embed_dims, dropout=0.0),
            ffn_cfg=dict(embed_dims=embed_dims, feedforward_channels=64, ffn_drop=0.0),
        ),
        fusion_layer_cfg=dict(v_dim=embed_dims, l_dim=embed_dims, embed_dim=32, num_heads=4, init_values=1e-4),
    )


def image_weights(theirs):
    return {name: value for name, value in theirs.state_dict().items() if name.startswith('layers.')}


def make_inputs(dims=32):
    generator = torch.Generator().manual_seed(1)
    query, query_pos = (torch.randn(2, NUM_KEYS, dims, dtype=torch.float64, generator=generator) for _ in range(2))
    mask = torch.zeros(2, NUM_KEYS, dtype=torch.bool)
    mask[1, 40:54] = True
    shapes = torch.tensor(SHAPES)
    return dict(
        query=query.requires_grad_(),
        query_pos=query_pos,
        key_padding_mask=mask,
        spatial_shapes=shapes,
        level_start_index=shapes.prod(1).cumsum(0) - shapes.prod(1),
        valid_ratios=torch.tensor([[[1.0, 1.0]] * 3, [[0.7, 0.9]] * 3]),
    )


def test_equals_the_image_layers_of_mmdetection():
    torch.manual_seed(0)
    theirs = build_theirs(2, embed_dims=32, num_heads=4, num_levels=3, feedforward_channels=64).double()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = MODELS.build(dict(type='msda_plugin.GroundingDinoImageEncoder', num_layers=2, layer_cfg=SMALL)).double()
    ours.load_state_dict(image_weights(theirs))
    theirs.text_layers = theirs.fusion_layers = ModuleList()
    inputs = make_inputs()
    out, (expected, _) = ours.train()(**inputs), theirs.train()(**inputs)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)  # reference points are computed in float32
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    mine, reference = (
        torch.autograd.grad((o * weights).sum(), [inputs['query'], *layers.parameters()])
        for o, layers in ((out, ours), (expected, theirs.layers))
    )
    for gradient, expected_gradient in zip(mine, reference, strict=True):
        assert (gradient - expected_gradient).norm() <= 1e-4 * expected_gradient.norm() + 1e-6


def test_defaults_are_the_published_sizes():
    ours = GroundingDinoImageEncoder()
    theirs = build_theirs(6, embed_dims=256, num_heads=8, num_levels=4, feedforward_channels=2048)
    ours.load_state_dict(image_weights(theirs))
    assert len(ours.layers) == 6 and ours.embed_dims == 256
    assert {module.p for module in ours.modules() if isinstance(module, nn.Dropout)} == {0.0}
    assert [type(layer) for layer in ours.layers] == [GroundingDinoImageEncoderLayer] * 6


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    torch.manual_seed(0)
    ours = GroundingDinoImageEncoder(num_layers=1, layer_cfg=SMALL)
    inputs = make_inputs()
    inputs.update(query=inputs['query'].detach().float().requires_grad_(), query_pos=inputs['query_pos'].float())
    with torch.autocast('cpu', dtype):
        out = ours(**inputs)
    gradients = torch.autograd.grad(out.float().square().mean(), [inputs['query'], *ours.parameters()])
    assert out.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)


class OneMap(nn.Module):
    """A minimal backbone of stride 16."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 16, 16)

    def forward(self, x):
        return (self.conv(x),)


def test_encoder_of_a_deformable_detr_config():
    attention = dict(embed_dims=32, num_heads=4, dropout=0.0, batch_first=True)
    torch.manual_seed(0)
    model = MODELS.build(
        dict(
            type='msda_plugin.DeformableDETR',
            num_queries=9,
            num_feature_levels=2,
            backbone=dict(type=OneMap),
            neck=dict(
                type='mmdet.ChannelMapper',
                in_channels=[32],
                kernel_size=1,
                out_channels=32,
                act_cfg=None,
                norm_cfg=dict(type='GN', num_groups=8),
                num_outs=2,
            ),
            encoder=dict(
                type='msda_plugin.GroundingDinoImageEncoder',
                num_layers=2,
                layer_cfg=dict(self_attn_cfg=dict(embed_dims=32, num_heads=4)),
            ),
            decoder=dict(
                num_layers=1,
                layer_cfg=dict(
                    self_attn_cfg=attention,
                    cross_attn_cfg=dict(attention),
                    ffn_cfg=dict(embed_dims=32, feedforward_channels=64),
                ),
            ),
            positional_encoding=dict(num_feats=16, normalize=True, offset=0.0, temperature=20),
            bbox_head=dict(
                type='msda_plugin.DeformableDETRHead',
                num_classes=3,
                embed_dims=32,
                sync_cls_avg_factor=True,
                loss_cls=dict(type='mmdet.FocalLoss', use_sigmoid=True, loss_weight=2.0),
                loss_bbox=dict(type='mmdet.L1Loss', loss_weight=5.0),
                loss_iou=dict(type='mmdet.GIoULoss', loss_weight=2.0),
            ),
        )
    )
    assert type(model.encoder) is GroundingDinoImageEncoder and model.encoder.layers[0].self_attn.num_levels == 2
    assert (model.positional_encoding.temperature, model.positional_encoding.offset) == (20, 0.0)
    samples = [DetDataSample(metainfo=dict(img_shape=(64, 80), batch_input_shape=(64, 96)))]
    logits, boxes = model(torch.rand(1, 3, 64, 96), samples, mode='tensor')
    (logits.sum() + boxes.sum()).backward()
    assert logits.shape == (1, 1, 9, 3)
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())


def test_mismatched_widths_raise():
    with pytest.raises(ValueError, match='embed_dims must be divisible by num_heads'):
        GroundingDinoImageEncoder(layer_cfg=dict(self_attn_cfg=dict(embed_dims=30)))
