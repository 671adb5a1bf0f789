"""HS-FPN against golden outputs of the published neck, and in front of dense and DETR-style heads."""

import json
import sys
from pathlib import Path

import mmdet
import numpy as np
import pytest
import torch
from mmdet.registry import MODELS as MMDET_MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from msda_plugin.convert import convert, convert_state_dict
from msda_plugin.necks import MFDSHSFPN

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / 'tests' / 'golden'
sys.path.insert(0, str(GOLDEN))
import recipe  # noqa: E402


def upstream_state_dict():
    shapes = json.loads((GOLDEN / 'hs_fpn_state_dict.json').read_text())
    return recipe.fill({key: torch.zeros(shape) for key, shape in shapes.items()})


def maps(sizes, channels=(32, 48, 64), bs=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(bs, c, *size, generator=generator, dtype=dtype) for c, size in zip(channels, sizes, strict=True)
    ]


@pytest.mark.parametrize(
    'name, batch, sizes',
    [
        ('hs_fpn_2x_64_128_256_to_64', 2, [(16, 24), (8, 12), (4, 6)]),
        ('hs_fpn_1x_64_128_256_to_64_odd', 1, [(21, 27), (11, 14), (6, 7)]),
    ],
)
def test_matches_the_published_numbers(name, batch, sizes):
    neck = MFDSHSFPN([64, 128, 256], 64)
    neck.load_state_dict(convert_state_dict(upstream_state_dict(), 'hs_fpn'))
    inputs = [
        recipe.tensor(f'feat{batch}x{c}x{h}x{w}', (batch, c, h, w))
        for c, (h, w) in zip((64, 128, 256), sizes, strict=True)
    ]
    with torch.inference_mode():
        outs = neck(inputs)
    golden = np.load(GOLDEN / f'{name}.npz')
    assert len(outs) == len(golden.files) == 4
    for i, out in enumerate(outs):
        expected = torch.from_numpy(golden[f'out{i}'])
        assert out.shape == expected.shape
        assert (out - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max())


def test_parameters_on_a_resnet50():
    with torch.device('meta'):
        neck = MFDSHSFPN([512, 1024, 2048])
        count = sum(p.numel() for p in neck.parameters())
        top = sum(p.numel() for p in neck.top_level.parameters())
    assert (round((count - top) / 1e6, 1), round(top / 1e6, 1)) == (17.3, 15.7)


@pytest.mark.parametrize('sizes', [[(19, 13), (10, 7), (5, 4)], [(1, 1)] * 3, [(7, 9), (7, 9), (2, 2)]])
@pytest.mark.parametrize('num_outs', [3, 4])
def test_every_parameter_gets_a_gradient_at_any_size(sizes, num_outs):
    neck = MFDSHSFPN([32, 48, 64], 32, num_outs=num_outs)
    neck.init_weights()
    outs = neck(maps(sizes))
    top = [tuple((side + 1) // 2 for side in sizes[-1])]
    assert [out.shape for out in outs] == [(2, 32, *size) for size in (sizes + top)[:num_outs]]
    sum(out.square().sum() for out in outs).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in neck.parameters())


def test_channels_last_and_batch_one_give_the_same():
    neck = MFDSHSFPN([32, 48, 64], 32).double().eval()
    inputs = maps([(9, 7), (5, 4), (3, 2)], dtype=torch.float64)
    with torch.inference_mode():
        expected = neck(inputs)
        strided = neck([x.to(memory_format=torch.channels_last) for x in inputs])
        single = neck([x[1:] for x in inputs])
    for e, s, one in zip(expected, strided, single, strict=True):
        torch.testing.assert_close(s, e)
        torch.testing.assert_close(one, e[1:])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_is_finite(dtype):
    neck = MFDSHSFPN([32, 48, 64], 32)
    with torch.autocast('cpu', dtype):
        outs = neck(maps([(9, 7), (5, 4), (3, 2)]))
        loss = sum(out.float().square().mean() for out in outs)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in neck.parameters())


def detector(kind):
    """Config of a detector with a ResNet-18: a base config with another backbone and neck."""
    backbone = dict(type='mmdet.ResNet', depth=18, norm_cfg=dict(type='BN'))
    if kind == 'DeformableDETR':
        cfg = Config.fromfile(ROOT / 'configs/_base_/models/deformable-detr-two-stage_shunted-nano.py').model
        cfg.backbone = dict(backbone, out_indices=(1, 2, 3))
        cfg.neck = dict(type='msda_plugin.MFDSHSFPN', in_channels=[128, 256, 512], out_channels=128)
        return cfg
    cfg = Config.fromfile(
        Path(mmdet.__file__).parent
        / '.mim/configs/_base_/models'
        / {'RetinaNet': 'retinanet_r50_fpn.py', 'MaskRCNN': 'mask-rcnn_r50_fpn.py'}[kind]
    ).model
    cfg.backbone = dict(backbone, out_indices=(0, 1, 2, 3))
    cfg.neck = dict(type='msda_plugin.MFDSHSFPN', in_channels=[64, 128, 256, 512], out_channels=256)
    return cfg


@pytest.mark.parametrize('kind', ['RetinaNet', 'MaskRCNN', 'DeformableDETR'])
def test_in_front_of_a_head(kind):
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MMDET_MODELS.build(detector(kind))
    meta = dict(img_shape=(64, 96), ori_shape=(64, 96), scale_factor=(1.0, 1.0))
    objects = InstanceData(
        bboxes=torch.tensor([[8.0, 12.0, 40.0, 60.0]]),
        labels=torch.tensor([1]),
        masks=BitmapMasks([np.ones((64, 96), np.uint8)], 64, 96),
    )
    batch = {
        'inputs': [torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)],
        'data_samples': [DetDataSample(metainfo=meta, gt_instances=objects)],
    }
    loss, _ = model.parse_losses(model(**model.data_preprocessor(batch, training=True), mode='loss'))
    loss.backward()
    assert loss.isfinite()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    model.eval()
    with torch.inference_mode():
        assert model.test_step(batch)[0].pred_instances.bboxes.shape[1] == 4


@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(num_outs=5), 'num_outs is 5 with 3 in_channels, .*: set num_outs to 3 or 4'),
        (dict(out_channels=48), 'out_channels is 48 .* must be a multiple of 32'),
        (dict(in_channels=[32, 64, 40]), 'the last of in_channels 40, .* the last input of 16'),
        (dict(in_channels=[]), 'in_channels is empty'),
        (dict(in_channels=[3, 64, 64]), 'needs at least 4'),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MFDSHSFPN(**dict(dict(in_channels=[32, 48, 64], out_channels=32), **arguments))


@pytest.mark.parametrize('channels, sizes', [((32, 48), [(4, 4), (2, 2)]), ((32, 48, 63), [(4, 4), (2, 2), (1, 1)])])
def test_maps_with_wrong_channels(channels, sizes):
    with pytest.raises(ValueError, match=r'in_channels is \[32, 48, 64\]: set it to the channels of the backbone'):
        MFDSHSFPN([32, 48, 64], 32)(maps(sizes, channels))


def test_conversion_records_every_key_and_names_missing_ones():
    upstream = upstream_state_dict()
    conversion = convert(upstream, 'hs_fpn')
    assert conversion.taken.keys() == upstream.keys() and not conversion.dropped
    assert convert_state_dict(conversion.state_dict, 'hs_fpn') == conversion.state_dict
    upstream['lateral_conv.2.2.weight'] = upstream.pop('weight_conv.1.0.conv1.weight')
    with pytest.raises(
        ValueError,
        match=r"missing keys \['weight_conv.1.0.conv1.weight'\], "
        r"unexpected keys \['lateral_conv.2.2.weight'\]",
    ):
        convert_state_dict(upstream, 'hs_fpn')
