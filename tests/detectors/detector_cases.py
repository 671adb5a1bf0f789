"""Small detection transformers, images and objects for the tests of the detectors."""

import copy

import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import nn

from msda_plugin.registry import MODELS

BATCH_SHAPE = (64, 96)
WHOLE = [BATCH_SHAPE, BATCH_SHAPE]
PADDED = [(64, 80), (45, 96)]


class Pyramid(nn.Module):
    """The smallest backbone: strides 8, 16 and 32, or the last ``num_outs`` of them."""

    def __init__(self, num_outs=3, declared=True):
        super().__init__()
        self.num_outs = num_outs
        if declared:
            self.out_channels = (8, 16, 32)[-num_outs:]
        self.convs = nn.ModuleList([nn.Conv2d(3, 8, 9, 8, 4), nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 2, 1)])

    def forward(self, x):
        maps = [x := conv(x).tanh() for conv in self.convs]
        return tuple(maps[-self.num_outs :])


def deformable_detr_config(scope='msda_plugin', dims=32, num_feature_levels=4, dropout=0.0, **changes):
    in_channels = [8, 16, 32] if num_feature_levels > 1 else [32]
    attention = dict(embed_dims=dims, num_heads=4, dropout=dropout, batch_first=True)
    deformable = dict(attention, num_levels=num_feature_levels)
    ffn = dict(embed_dims=dims, feedforward_channels=2 * dims, ffn_drop=dropout)
    return (
        dict(
            type=f'{scope}.DeformableDETR',
            num_queries=9,
            num_feature_levels=num_feature_levels,
            backbone=dict(type=Pyramid, num_outs=len(in_channels)),
            neck=dict(
                type='mmdet.ChannelMapper',
                in_channels=in_channels,
                kernel_size=1,
                out_channels=dims,
                act_cfg=None,
                norm_cfg=dict(type='GN', num_groups=8),
                num_outs=num_feature_levels,
            ),
            encoder=dict(num_layers=2, layer_cfg=dict(self_attn_cfg=dict(deformable), ffn_cfg=dict(ffn))),
            decoder=dict(
                num_layers=2,
                return_intermediate=True,
                post_norm_cfg=None,
                layer_cfg=dict(self_attn_cfg=attention, cross_attn_cfg=deformable, ffn_cfg=ffn),
            ),
            positional_encoding=dict(num_feats=dims // 2, normalize=True, offset=-0.5),
            bbox_head=dict(
                type=f'{scope}.DeformableDETRHead',
                num_classes=3,
                embed_dims=dims,
                sync_cls_avg_factor=True,
                loss_cls=dict(type='mmdet.FocalLoss', use_sigmoid=True, loss_weight=2.0),
                loss_bbox=dict(type='mmdet.L1Loss', loss_weight=5.0),
                loss_iou=dict(type='mmdet.GIoULoss', loss_weight=2.0),
            ),
            train_cfg=dict(
                assigner=dict(
                    type='mmdet.HungarianAssigner',
                    match_costs=[
                        dict(type='mmdet.FocalLossCost', weight=2.0),
                        dict(type='mmdet.BBoxL1Cost', weight=5.0, box_format='xywh'),
                        dict(type='mmdet.IoUCost', iou_mode='giou', weight=2.0),
                    ],
                )
            ),
            test_cfg=dict(max_per_img=20),
        )
        | changes
    )


def detr_config(scope='msda_plugin', dims=32, dropout=0.0, **changes):
    attention = dict(embed_dims=dims, num_heads=4, dropout=dropout, batch_first=True)
    ffn = dict(embed_dims=dims, feedforward_channels=2 * dims, ffn_drop=dropout)
    return (
        dict(
            type=f'{scope}.DETR',
            num_queries=9,
            backbone=dict(type=Pyramid, num_outs=1),
            neck=dict(
                type='mmdet.ChannelMapper',
                in_channels=[32],
                kernel_size=1,
                out_channels=dims,
                act_cfg=None,
                norm_cfg=None,
                num_outs=1,
            ),
            encoder=dict(num_layers=2, layer_cfg=dict(self_attn_cfg=dict(attention), ffn_cfg=dict(ffn))),
            decoder=dict(
                num_layers=2,
                layer_cfg=dict(self_attn_cfg=dict(attention), cross_attn_cfg=dict(attention), ffn_cfg=dict(ffn)),
            ),
            positional_encoding=dict(num_feats=dims // 2, normalize=True),
            bbox_head=dict(
                type=f'{scope}.DETRHead',
                num_classes=3,
                embed_dims=dims,
                loss_cls=dict(type='mmdet.CrossEntropyLoss', bg_cls_weight=0.1, class_weight=1.0),
                loss_bbox=dict(type='mmdet.L1Loss', loss_weight=5.0),
                loss_iou=dict(type='mmdet.GIoULoss', loss_weight=2.0),
            ),
            train_cfg=dict(
                assigner=dict(
                    type='mmdet.HungarianAssigner',
                    match_costs=[
                        dict(type='mmdet.ClassificationCost', weight=1.0),
                        dict(type='mmdet.BBoxL1Cost', weight=5.0, box_format='xywh'),
                        dict(type='mmdet.IoUCost', iou_mode='giou', weight=2.0),
                    ],
                )
            ),
            test_cfg=dict(max_per_img=7),
        )
        | changes
    )


def build(config):
    torch.manual_seed(0)
    model = MODELS.build(config)
    model.init_weights()
    return model


def make_samples(shapes=WHOLE, counts=(3, 2)):
    generator = torch.Generator().manual_seed(sum(counts))
    samples = []
    for (height, width), count in zip(shapes, counts, strict=True):
        low = torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) * 0.6
        high = low + 4 + torch.rand(count, 2, generator=generator) * 20
        sample = DetDataSample(
            metainfo=dict(
                img_shape=(height, width),
                ori_shape=(height, width),
                scale_factor=(1.0, 1.0),
                batch_input_shape=BATCH_SHAPE,
            )
        )
        sample.gt_instances = InstanceData(
            bboxes=torch.cat([low, high], 1), labels=torch.randint(3, (count,), generator=generator)
        )
        samples.append(sample)
    return samples


def make_images():
    return torch.randn(2, 3, *BATCH_SHAPE, generator=torch.Generator().manual_seed(7))


def share_weights(ours, theirs):
    """Give both models the same random weights; many initial weights are zero."""
    generator = torch.Generator().manual_seed(2)
    weights = {
        name: value + 0.05 * torch.randn(value.shape, generator=generator)
        for name, value in theirs.state_dict().items()
    }
    theirs.load_state_dict(weights)
    ours.load_state_dict(theirs.state_dict())


def losses_and_gradients(model, samples):
    losses = {name: loss.squeeze() for name, loss in model.train().loss(make_images(), samples).items()}
    used = dict(model.named_parameters())
    gradients = torch.autograd.grad(sum(losses.values()), list(used.values()), allow_unused=True)
    return losses, dict(zip(used, gradients, strict=True))


def assert_same(ours, theirs, samples):
    """Compare losses, gradients, outputs and predictions."""
    losses, gradients = losses_and_gradients(ours, samples)
    expected, expected_gradients = losses_and_gradients(theirs, samples)
    assert list(losses) == list(expected)
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f'{name}: {m}')
    for name, gradient in expected_gradients.items():
        assert (gradient is None) == (gradients[name] is None), name
        if gradient is not None:
            # Compare norms: single entries differ if rounding moves the input of a ReLU across zero.
            assert (gradients[name] - gradient).norm() <= 1e-2 * gradient.norm() + 1e-6, name
    with torch.no_grad():
        outputs = ours.eval()(make_images(), samples, mode='tensor')
        expected_outputs = theirs.eval()(make_images(), samples, mode='tensor')
        for output, expected_output in zip(outputs, expected_outputs, strict=True):
            torch.testing.assert_close(output, expected_output, rtol=1e-5, atol=1e-5)
        for sample, expected_sample in zip(
            ours(make_images(), copy.deepcopy(samples), mode='predict'),
            theirs(make_images(), copy.deepcopy(samples), mode='predict'),
            strict=True,
        ):
            found, expected_found = sample.pred_instances, expected_sample.pred_instances
            assert torch.equal(found.labels, expected_found.labels)
            torch.testing.assert_close(found.bboxes, expected_found.bboxes, rtol=1e-4, atol=1e-3)
