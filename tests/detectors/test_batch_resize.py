"""Random sizes of training batches."""

import random

import pytest
import torch
from mmengine.logging import MessageHub
from rtdetr_cases import samples

from msda_plugin.detectors import BatchRandomResize
from msda_plugin.registry import MODELS


def batch(shape=(64, 128)):
    return torch.rand(2, 3, *shape), samples([(torch.zeros(1).long(), torch.tensor([[0.5, 0.5, 0.2, 0.4]]))] * 2, shape)


def test_scales_images_and_boxes():
    resize = MODELS.build(dict(type='msda_plugin.BatchRandomResize', sizes=[960], base_size=640))
    images, data_samples = batch()
    for sample in data_samples:
        sample.set_metainfo(dict(img_shape=(32, 128)))
    resized, data_samples = resize(images, data_samples)
    assert torch.equal(resized, torch.nn.functional.interpolate(images, size=(96, 192)))
    sample = data_samples[1]
    assert sample.img_shape == (48, 192) and sample.batch_input_shape == (96, 192)
    expected = torch.tensor([[0.4 * 192, 0.3 * 96, 0.6 * 192, 0.7 * 96]])
    assert torch.allclose(sample.gt_instances.bboxes, expected)


def test_draws_a_size_for_each_batch():
    random.seed(0)
    resize = BatchRandomResize([480, 640, 640, 800])
    sides = [resize(*batch((640, 640)))[0].shape[-1] for _ in range(40)]
    assert set(sides) == {480, 640, 800} and sides.count(640) > max(sides.count(480), sides.count(800))


def test_stops_at_an_epoch():
    resize, hub = BatchRandomResize([1280], stop_epoch=3), MessageHub.get_current_instance()
    for epoch, side in ((2, 128), (3, 64)):
        hub.update_info('epoch', epoch)
        assert resize(*batch((64, 64)))[0].shape[-1] == side
    hub.update_info('epoch', 0)


@pytest.mark.parametrize('fields', [dict(sizes=[]), dict(sizes=[0]), dict(sizes=[640], base_size=0)])
def test_bad_sizes(fields):
    with pytest.raises(ValueError, match='expected at least one size'):
        BatchRandomResize(**fields)
