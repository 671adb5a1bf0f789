"""Channels of the backbone are compared with the neck's: when the detector is built, or in the forward pass."""

import pytest
import torch
from detector_cases import Pyramid, build, deformable_detr_config, detr_config, make_images, make_samples
from mmdet.registry import MODELS as MMDET_MODELS
from torch import nn

from msda_plugin.detectors.build_checks import declared_channels
from msda_plugin.registry import MODELS

CONFIGS = {'DETR': detr_config, 'DeformableDETR': deformable_detr_config}


def undeclared(kind, **neck):
    """A detector config whose backbone does not declare its channels, and its neck with changed fields."""
    config = CONFIGS[kind]()
    config['backbone']['declared'] = False
    config['neck'] |= neck
    return config


def in_channels(kind, last):
    return [*CONFIGS[kind]()['neck']['in_channels'][:-1], last]


@pytest.mark.parametrize('kind', CONFIGS)
def test_building_runs_no_forward_pass(kind, monkeypatch):
    monkeypatch.setattr(Pyramid, 'forward', lambda *args: pytest.fail('the backbone ran'))
    MODELS.build(CONFIGS[kind]())
    MODELS.build(undeclared(kind))


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('kind', CONFIGS)
def test_undeclared_channels_are_checked_in_the_forward_pass(kind, training):
    wrong = in_channels(kind, 24)
    model = build(undeclared(kind, in_channels=wrong)).train(training)
    message = r'the backbone gives maps of .*32\] channels, but neck.in_channels is .*24\]: make them equal'
    with pytest.raises(ValueError, match=message):
        model(make_images(), make_samples(), mode='loss' if training else 'predict')
    with pytest.raises(ValueError, match=message):
        model(make_images(), mode='tensor')


def test_undeclared_number_of_maps_is_checked_in_the_forward_pass():
    config = undeclared('DeformableDETR')
    config['backbone']['num_outs'] = 2
    with pytest.raises(ValueError, match=r'maps of \[16, 32\] channels, but neck.in_channels is \[8, 16, 32\]'):
        build(config)(make_images(), mode='tensor')


@pytest.mark.parametrize('kind', CONFIGS)
def test_undeclared_channels_without_a_neck(kind):
    config = undeclared(kind) | dict(neck=None)
    if kind == 'DETR':
        build(config)(make_images(), mode='tensor')  # a map of 32 channels, as wide as the transformer
        config = dict(detr_config(dims=64), backbone=config['backbone'], neck=None)
    with pytest.raises(ValueError, match=r'the backbone gave .* embed_dims=.*: change the neck, or add one such as'):
        build(config)(make_images(), mode='tensor')


@pytest.mark.parametrize('kind', CONFIGS)
def test_the_check_leaves_no_trace_in_a_graph(kind):
    """No graph break, and the exported graph is the one of backbone and neck alone."""
    model = build(undeclared(kind)).eval()
    plain = nn.Sequential(model.backbone, model.neck)
    images = make_images()
    expected = plain(images)
    torch._dynamo.reset()
    compiled = torch.compile(model.extract_feat, fullgraph=True, backend='eager')(images)
    for out, reference in zip(compiled, expected, strict=True):
        torch.testing.assert_close(out, reference)

    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, images):
            return self.model.extract_feat(images)

    with torch.no_grad():
        graphs = [torch.export.export(module, (images,)).graph for module in (Features(), plain)]
    exported, reference = ([str(node.target) for node in graph.nodes if node.op == 'call_function'] for graph in graphs)
    assert exported == reference


@pytest.mark.parametrize(
    'backbone',
    [
        dict(type='mmdet.ResNet', depth=18, out_indices=(1, 3)),
        dict(
            type='mmdet.ResNet',
            depth=50,
            base_channels=8,
            stem_channels=8,
            num_stages=3,
            strides=(1, 2, 2),
            dilations=(1, 1, 1),
            out_indices=(2, 0),
        ),
        dict(type='mmdet.ResNetV1d', depth=50, base_channels=8, stem_channels=8, out_indices=(2, 3)),
        dict(type='mmdet.ResNeXt', depth=50, groups=2, base_width=4, base_channels=8, stem_channels=8),
        dict(
            type='mmdet.SwinTransformer', embed_dims=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 4), out_indices=(1, 3)
        ),
        dict(
            type='msda_plugin.ShuntedTransformer',
            arch=dict(
                embed_dims=(16, 32, 48),
                depths=(1, 1, 1),
                num_heads=(2, 2, 4),
                mlp_ratios=(2, 2, 2),
                sr_ratios=(4, 2, 1),
                stem_convs=0,
            ),
            out_indices=(0, 2),
        ),
        dict(
            type='msda_plugin.DAT',
            arch=dict(
                embed_dims=(16, 24),
                blocks=('L', 'D'),
                num_heads=(2, 2),
                num_groups=(1, 1),
                kernel_sizes=(5, 3),
                mlp_ratio=2,
                window_size=3,
                image_size=64,
                drop_path_rate=0.0,
            ),
            out_indices=(1,),
        ),
        dict(
            type='msda_plugin.VisionTransformer',
            arch=dict(embed_dims=24, depth=2, num_heads=3, mlp_ratio=2),
            img_size=64,
            out_indices=(0, 1),
        ),
    ],
    ids=lambda config: config['type'],
)
def test_declared_channels_are_those_of_the_maps(backbone):
    model = MMDET_MODELS.build(backbone)
    model.eval()  # returns None for a ResNet
    with torch.no_grad():
        maps = model(torch.rand(1, 3, 64, 64))
    assert declared_channels(model) == [x.shape[1] for x in maps]


@pytest.mark.parametrize('kind', ['RegNet', 'PyramidVisionTransformer', 'EfficientNet'])
def test_other_backbones_declare_no_channels(kind):
    """RegNet is a ResNet of other widths; ``out_channels`` of EfficientNet belongs to its last layer."""
    arch = dict(RegNet=dict(arch='regnetx_400mf'), EfficientNet=dict(arch='b0'))
    assert declared_channels(MMDET_MODELS.build(dict(type=f'mmdet.{kind}') | arch.get(kind, {}))) is None


def test_out_channels_of_all_stages_declare_nothing():
    backbone = nn.Module()
    backbone.out_channels, backbone.out_indices = [8, 16, 32], (1, 2)
    assert declared_channels(backbone) is None
    backbone.out_indices = (0, 1, 2)
    assert declared_channels(backbone) == [8, 16, 32]
