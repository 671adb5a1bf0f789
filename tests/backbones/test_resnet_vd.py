"""The ResNet-vd of RT-DETR, against transformers' with random weights."""

import pytest
import torch
from mmdet.models.backbones import ResNetV1d
from torch import nn

from msda_plugin.backbones import ResNetVD
from msda_plugin.convert import convert
from msda_plugin.convert.rtdetr import _transformers_key


def randomize(model):
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.uniform_(0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize('depth', [18, 50])
def test_equals_transformers(depth):
    transformers = pytest.importorskip('transformers')
    expansion = 1 if depth == 18 else 4
    config = transformers.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8 * expansion * 2**i for i in range(4)],
        depths=[2, 2, 2, 2] if depth == 18 else [3, 4, 6, 3],
        layer_type='basic' if depth == 18 else 'bottleneck',
        out_features=['stage2', 'stage3', 'stage4'],
    )
    stock = randomize(transformers.RTDetrResNetBackbone(config)).double()
    state_dict = {
        _transformers_key(f'model.backbone.model.{key}', 0).removeprefix('backbone.'): value
        for key, value in stock.state_dict().items()
    }
    ours = ResNetVD(depth, base_channels=8, out_indices=(1, 2, 3), norm_eval=False).eval().double()
    ours.load_state_dict(state_dict)
    assert ours.out_channels == [16 * expansion, 32 * expansion, 64 * expansion]

    images = [torch.randn(2, 3, 75, 101, generator=torch.Generator().manual_seed(0)).double() for _ in range(2)]
    outs, expected = ours(images[0].requires_grad_()), stock(images[1].requires_grad_()).feature_maps
    for out, other in zip(outs, expected, strict=True):
        assert out.shape == other.shape and torch.allclose(out, other, rtol=1e-10)
    for maps in (outs, expected):
        sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in maps).backward()
    assert torch.allclose(images[0].grad, images[1].grad, rtol=1e-8)


def test_differs_from_mmdetection_in_one_shortcut():
    fields = dict(base_channels=8, out_indices=(1, 2, 3))
    assert ResNetVD(50, **fields).state_dict().keys() == ResNetV1d(depth=50, **fields).state_dict().keys()
    ours, theirs = (set(model.state_dict()) for model in (ResNetVD(18, **fields), ResNetV1d(depth=18, **fields)))
    assert theirs < ours and {key.rsplit('.', 2)[0] for key in ours - theirs} == {'layer1.0.downsample'}


def test_frozen_parts():
    frozen = ResNetVD(18, base_channels=8, frozen_stages=0, norm_cfg=dict(type='BN', requires_grad=False)).train()
    assert not any(p.requires_grad for p in frozen.stem.parameters())
    norms = [module for module in frozen.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not any(norm.training or norm.weight.requires_grad for norm in norms)
    trained = ResNetVD(18, base_channels=8, norm_eval=False).train()
    assert all(p.requires_grad for p in trained.parameters()) and trained.layer1[0].bn1.training


def authors_keys(model):
    """The state dict of ``model`` with the authors' keys."""
    renamed = {}
    for key, value in model.state_dict().items():
        parts = key.split('.')
        if parts[0] == 'stem':
            index = int(parts[1])
            parts = ['conv1', f'conv1_{index // 3 + 1}', 'norm' if index % 3 else 'conv', parts[2]]
        elif parts[2] == 'downsample':
            inside = ['short'] if parts[0] == 'layer1' else ['short', 'conv']
            place = ['res_layers', str(int(parts[0][-1]) - 1), 'blocks', parts[1]]
            parts = [*place, *inside, 'conv' if parts[3] == '1' else 'norm', parts[4]]
        else:
            kind = 'conv' if parts[2].startswith('conv') else 'norm'
            branch = f'branch2{"abc"[int(parts[2][-1]) - 1]}'
            parts = ['res_layers', str(int(parts[0][-1]) - 1), 'blocks', parts[1], branch, kind, parts[3]]
        renamed['.'.join(parts)] = value
    return renamed


def test_loads_the_authors_files(tmp_path):
    source = randomize(ResNetVD(18, base_channels=8))
    upstream = authors_keys(source)
    assert convert(upstream, 'rtdetr').taken.keys() == upstream.keys()
    torch.save(upstream, tmp_path / 'backbone.pth')
    cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'backbone.pth'))
    model = ResNetVD(18, base_channels=8, init_cfg=cfg)
    model.init_weights()
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    with pytest.raises(ValueError, match='does not fit this ResNetVD'):
        ResNetVD(34, base_channels=8, init_cfg=cfg).init_weights()


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        (dict(depth=20), r'depth is 20; expected one of \[18, 34, 50, 101, 152\]'),
        (dict(out_indices=(1, 4)), r'out_indices=\(1, 4\) is invalid; expected increasing indices of stages, 0 to 3'),
        (dict(frozen_stages=5), 'frozen_stages=5 is out of range'),
    ],
)
def test_invalid_options(fields, message):
    with pytest.raises(ValueError, match=message):
        ResNetVD(**dict(depth=18, base_channels=8) | fields)


def test_images_with_other_channels():
    with pytest.raises(ValueError, match=r'ResNetVD got images of shape \(1, 4, 32, 32\); expected \(B, 3, H, W\)'):
        ResNetVD(18, base_channels=8)(torch.rand(1, 4, 32, 32))
    assert len(ResNetVD(18, base_channels=8, in_channels=4).eval()(torch.rand(1, 4, 32, 32))) == 4
