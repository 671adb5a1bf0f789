"""Instance masks one query at a time: same instances, and panoptic results of the stock code."""

import copy

import pytest
import torch
from mmdet.models.dense_heads import Mask2FormerHead
from mmdet.models.detectors import Mask2Former
from mmdet.models.detectors import MaskFormer as StockMaskFormer
from mmdet.models.seg_heads.panoptic_fusion_heads import MaskFormerFusionHead
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from torch import nn

import msda_plugin
from msda_plugin.acceleration import mmcv_models
from msda_plugin.acceleration.mask_fusion import MaskFormer, MaskFusion


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
    masks = masks.repeat_interleave(4, -1).repeat_interleave(4, -2)
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


class FixedHead(Mask2FormerHead):
    """A head whose outputs do not depend on the features."""

    def __init__(self):
        nn.Module.__init__(self)
        self.calls = 0

    def forward(self, x, batch_data_samples):
        self.calls += 1
        classes, masks, _ = inputs()
        return [classes - 1, classes], [masks - 1, masks[..., ::2, ::2]]


class OwnHead(FixedHead):
    def predict(self, x, batch_data_samples):
        classes, masks = super().predict(x, batch_data_samples)
        return classes, masks + 0.1


class Detector(Mask2Former):
    def __init__(self, head, **fields):
        nn.Module.__init__(self)
        self.panoptic_head, self.panoptic_fusion_head = head, make(**fields)[0]

    def extract_feat(self, batch_inputs):
        return [batch_inputs]


@pytest.mark.parametrize('rescale', [False, True])
@pytest.mark.parametrize('panoptic', [False, True])
@pytest.mark.parametrize('head', [FixedHead, OwnHead])
def test_masks_are_enlarged_one_at_a_time(head, panoptic, rescale, monkeypatch):
    monkeypatch.setattr(mmcv_models, 'MASK_MODELS', (*mmcv_models.MASK_MODELS, f'{__name__}.Detector'))
    stock = Detector(head(), panoptic_on=panoptic)
    fast = copy.deepcopy(stock)
    mmcv_models.change_other_layers(fast)
    assert isinstance(fast, MaskFormer) and isinstance(fast.panoptic_fusion_head, MaskFusion)
    shapes, interpolate = [], torch.nn.functional.interpolate

    def resize(x, **kwargs):
        shapes.append(x.shape)
        return interpolate(x, **kwargs)

    monkeypatch.setattr(torch.nn.functional, 'interpolate', resize)
    results = []
    for detector in (stock, fast):
        samples = inputs()[2]
        for sample in samples:
            sample.set_metainfo(dict(batch_input_shape=(20, 32)))
        shapes.clear()
        results.append(detector.predict(torch.zeros(2, 3, 20, 32), samples, rescale=rescale))
    assert fast.panoptic_head.calls == 1
    if head is FixedHead and not panoptic:
        assert all(shape[:2] == (1, 1) for shape in shapes)
    for wanted, result in zip(*results, strict=True):
        assert torch.equal(result.pred_instances.masks, wanted.pred_instances.masks)
        assert torch.equal(result.pred_instances.bboxes, wanted.pred_instances.bboxes)
        torch.testing.assert_close(result.pred_instances.scores, wanted.pred_instances.scores)
        assert ('pred_panoptic_seg' in result) == ('pred_panoptic_seg' in wanted) == panoptic


def test_detectors_of_mmdetection_are_recognized():
    for cls in (Mask2Former, StockMaskFormer):
        detector = cls.__new__(cls)
        nn.Module.__init__(detector)
        mmcv_models.change_other_layers(detector)
        assert isinstance(detector, MaskFormer)


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
