"""Mixup of a batch, and the epochs in which it runs."""

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.logging import MessageHub
from mmengine.structures import InstanceData

from msda_plugin.detectors.batch_mixup import BatchMixUp


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
    mixed, _ = BatchMixUp(prob=1.0, start_epoch=4, stop_epoch=10)(images, samples())
    assert torch.equal(mixed, images) != runs


def test_is_an_augmentation_of_the_data_preprocessor(at_epoch):
    at_epoch(0)
    preprocessor = MODELS.build(
        dict(type='mmdet.DetDataPreprocessor', batch_augments=[dict(type='msda_plugin.BatchMixUp', prob=1.0)])
    )
    batch = dict(inputs=[torch.zeros(3, 40, 80, dtype=torch.uint8)] * 2, data_samples=samples())
    out = preprocessor(batch, training=True)
    assert out['inputs'].shape == (2, 3, 40, 80) and len(out['data_samples'][0].gt_instances) == 3
    out = preprocessor(dict(batch, data_samples=samples()), training=False)
    assert len(out['data_samples'][0].gt_instances) == 2


@pytest.mark.parametrize(
    'options, message', [(dict(prob=1.5), 'prob=1.5'), (dict(ratios=(0.6, 0.4)), 'the lower ratio first')]
)
def test_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        BatchMixUp(**options)
