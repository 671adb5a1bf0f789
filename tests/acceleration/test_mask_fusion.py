"""Instance masks one query at a time: same instances, and panoptic results of the stock code."""

import copy

import pytest
import torch
from mmdet.models.seg_heads.panoptic_fusion_heads import MaskFormerFusionHead
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict

import msda_plugin
from msda_plugin.acceleration import mmcv_models
from msda_plugin.acceleration.mask_fusion import MaskFusion


def make(**fields):
    config = dict(panoptic_on=False, instance_on=True, max_per_image=12) | fields
    stock = MaskFormerFusionHead(num_things_classes=3, num_stuff_classes=2, test_cfg=ConfigDict(config))
    fast = copy.deepcopy(stock)
    mmcv_models.change_other_layers(fast)
    assert isinstance(fast, MaskFusion) and isinstance(fast, MaskFormerFusionHead)
    return stock, fast


def inputs():
    generator = torch.Generator().manual_seed(0)
    samples = [
        DetDataSample(metainfo=dict(img_shape=shape, ori_shape=original))
        for shape, original in (((20, 30), (41, 57)), ((16, 25), (10, 13)))
    ]
    masks = torch.randn(2, 7, 5, 8, generator=generator)
    masks = torch.nn.functional.interpolate(masks, (20, 32), mode='bilinear')
    masks[1, 3] = -1  # an empty mask
    return 3 * torch.randn(2, 7, 6, generator=generator), masks, samples


@pytest.mark.parametrize('rescale', [False, True])
@pytest.mark.parametrize('panoptic', [False, True])
def test_same_instances(panoptic, rescale):
    stock, fast = make(panoptic_on=panoptic)
    for wanted, result in zip(*(head.predict(*inputs(), rescale=rescale) for head in (stock, fast)), strict=True):
        assert wanted.keys() == result.keys()
        instances, expected = result['ins_results'], wanted['ins_results']
        assert instances.keys() == expected.keys() and len(instances) == len(expected) > 0
        assert torch.equal(instances.masks, expected.masks) and torch.equal(instances.bboxes, expected.bboxes)
        assert torch.equal(instances.labels, expected.labels)
        torch.testing.assert_close(instances.scores, expected.scores)
        if panoptic:
            assert torch.equal(result['pan_results'].sem_seg, wanted['pan_results'].sem_seg)


def test_one_mask_at_a_time(monkeypatch):
    _, fast = make()
    shapes, interpolate = [], torch.nn.functional.interpolate
    classes, masks, samples = inputs()

    def resize(x, **kwargs):
        shapes.append(x.shape)
        return interpolate(x, **kwargs)

    monkeypatch.setattr(torch.nn.functional, 'interpolate', resize)
    [result] = fast.predict(classes[:1], masks[:1], samples[:1], rescale=True)
    assert set(shapes) == {(1, 1, 20, 30)}
    assert len(shapes) < len(result['ins_results'])  # some queries have two classes


def test_without_things():
    stock, fast = make(max_per_image=2)
    classes, masks, samples = inputs()
    classes[..., :3] -= 100
    for head in (stock, fast):
        for result in head.predict(classes, masks, samples):
            instances = result['ins_results']
            assert len(instances) == 0 and instances.masks.shape[1:] in ((20, 30), (16, 25))


def test_heads_with_code_of_their_own_stay():
    class Own(MaskFormerFusionHead):
        pass

    stock, _ = make()
    stock.__class__ = Own
    mmcv_models.change_other_layers(stock)
    assert type(stock) is Own


def test_restore():
    stock, fast = make()
    msda_plugin.restore(fast)
    assert type(fast) is type(stock)
