"""Augmentations of whole batches, and the epochs in which they run."""

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.logging import MessageHub
from mmengine.structures import InstanceData

from msda_plugin.detectors.batch_augments import BatchMixUp, BatchRandomResize


def samples(counts=(2, 1)):
    out = []
    for image, count in enumerate(counts):
        meta = dict(img_shape=(40, 80), pad_shape=(40, 80), batch_input_shape=(40, 80))
        boxes = torch.tensor([[8.0, 4.0, 40.0, 20.0]]).repeat(count, 1)
        objects = InstanceData(bboxes=boxes, labels=torch.full((count,), image))
        out.append(DetDataSample(metainfo=meta, gt_instances=objects))
    return out


@pytest.fixture
def at_epoch():
    hub = MessageHub.get_current_instance()
    before = hub.get_info('epoch')
    yield lambda epoch: hub.update_info('epoch', epoch)
    hub.update_info('epoch', before or 0)


def test_random_resize_scales_images_and_boxes(at_epoch):
    at_epoch(0)
    images, resized = BatchRandomResize([160])(torch.rand(2, 3, 40, 80), samples())
    assert images.shape == (2, 3, 160, 160)
    assert resized[0].gt_instances.bboxes.tolist() == [[16, 16, 80, 80]] * 2
    assert resized[0].img_shape == resized[0].batch_input_shape == (160, 160)


def test_sizes_are_drawn_by_their_frequency(at_epoch):
    at_epoch(0)
    torch.manual_seed(0)
    augment = BatchRandomResize([32, 64, 64, 64])
    sides = [augment(torch.rand(1, 3, 32, 32), samples([0]))[0].shape[-1] for _ in range(200)]
    assert sides.count(64) / 200 == pytest.approx(0.75, abs=0.1)


def test_mixup_averages_neighbors_and_joins_their_objects(at_epoch):
    at_epoch(0)
    images = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    mixed, joined = BatchMixUp(prob=1.0, ratios=(0.45, 0.45))(images, samples())
    assert torch.allclose(mixed[0], torch.tensor(0.55)) and torch.allclose(mixed[1], torch.tensor(0.45))
    assert [sample.gt_instances.labels.tolist() for sample in joined] == [[0, 0, 1], [1, 0, 0]]


def test_probability_of_mixup(at_epoch):
    at_epoch(0)
    images = torch.rand(2, 3, 4, 4)
    assert torch.equal(BatchMixUp(prob=0.0)(images, samples())[0], images)


@pytest.mark.parametrize('epoch, runs', [(3, False), (4, True), (9, True), (10, False)])
def test_runs_in_its_epochs_only(at_epoch, epoch, runs):
    at_epoch(epoch)
    images = torch.rand(2, 3, 40, 80)
    assert (BatchRandomResize([64], begin=4, end=10)(images, samples())[0].shape[-1] == 64) == runs


def test_is_an_augmentation_of_the_data_preprocessor(at_epoch):
    at_epoch(0)
    preprocessor = MODELS.build(
        dict(
            type='mmdet.DetDataPreprocessor',
            batch_augments=[
                dict(type='msda_plugin.BatchMixUp', prob=1.0),
                dict(type='msda_plugin.BatchRandomResize', sizes=[64]),
            ],
        )
    )
    batch = dict(inputs=[torch.zeros(3, 40, 80, dtype=torch.uint8)] * 2, data_samples=samples())
    out = preprocessor(batch, training=True)
    assert out['inputs'].shape == (2, 3, 64, 64) and len(out['data_samples'][0].gt_instances) == 3
    assert preprocessor(dict(batch, data_samples=samples()), training=False)['inputs'].shape == (2, 3, 40, 80)


@pytest.mark.parametrize(
    'augment, options, message',
    [
        (BatchRandomResize, dict(sizes=[]), 'expected positive sides'),
        (BatchRandomResize, dict(sizes=[64], begin=4, end=3), 'begin=4 and end=3 are invalid'),
        (BatchMixUp, dict(prob=1.5), 'prob=1.5'),
        (BatchMixUp, dict(ratios=(0.6, 0.4)), 'the lower ratio first'),
    ],
)
def test_invalid_options(augment, options, message):
    with pytest.raises(ValueError, match=message):
        augment(**options)
