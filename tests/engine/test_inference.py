"""Config and checkpoint are found and loaded; predictions equal those of MMDetection."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.apis import inference_detector, init_detector
from mmengine.config import Config
from PIL import Image

from msda_plugin.engine.inference import find_checkpoint, find_source, load_detector, predict, predict_batch, read_image

CONFIG = Path(__file__).parents[2] / 'configs' / 'shapes' / 'deformable-detr-two-stage_shunted-nano_1xb4-8e_shapes.py'


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """A checkpoint of an untrained model, next to its config."""
    from mmengine.registry import init_default_scope

    from msda_plugin.registry import MODELS

    folder = tmp_path_factory.mktemp('work')
    cfg = Config.fromfile(CONFIG)
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    cfg.dump(folder / 'config.py')
    meta = dict(dataset_meta=dict(CLASSES=tuple('abcdef')))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), folder / 'epoch_1.pth')
    return folder / 'epoch_1.pth'


def touch(path, seconds):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (seconds, seconds))
    return str(path)


# ---- which files ----------------------------------------------------------------------------------------------------
def test_the_best_checkpoint_of_the_newest_main_job(tmp_path):
    touch(tmp_path / 'shapes-upstream' / 'best_coco_bbox_mAP_epoch_4.pth', 10)
    best = touch(tmp_path / 'shapes' / 'best_coco_bbox_mAP_epoch_8.pth', 20)
    touch(tmp_path / 'shapes' / 'epoch_9.pth', 30)
    touch(tmp_path / 'other' / 'epoch_9.pth', 40)
    touch(tmp_path / 'shapes' / 'config.py', 5)
    assert find_checkpoint(work_dirs=tmp_path) == (None, best)


def test_the_last_checkpoint_without_a_best_one(tmp_path):
    touch(tmp_path / 'mine' / 'epoch_8.pth', 20)
    last = touch(tmp_path / 'mine' / 'epoch_9.pth', 30)
    config = touch(tmp_path / 'configs' / 'mine.py', 1)
    assert find_checkpoint(config, work_dirs=tmp_path) == (config, last)


def test_the_checkpoint_next_to_a_config(tmp_path):
    config = touch(tmp_path / 'run' / 'mine.py', 1)
    beside = touch(tmp_path / 'run' / 'epoch_2.pth', 1)
    assert find_checkpoint(config, work_dirs=tmp_path / 'work_dirs') == (config, beside)
    in_work_dir = touch(tmp_path / 'work_dirs' / 'mine' / 'epoch_1.pth', 1)
    assert find_checkpoint(config, work_dirs=tmp_path / 'work_dirs') == (config, in_work_dir)
    assert find_checkpoint(config, beside) == (config, beside)


def test_sources(tmp_path):
    config, last = touch(tmp_path / 'run' / 'mine.py', 1), touch(tmp_path / 'run' / 'epoch_2.pth', 2)
    other = touch(tmp_path / 'other.py', 1)
    assert find_source(last) == (None, last)
    assert find_source(tmp_path / 'run') == (None, last)
    assert find_source(config) == (config, last)
    assert find_source(last, config=other) == find_source(other, checkpoint=last) == (other, last)
    assert find_source(tmp_path / 'run', config=other) == (other, last)
    assert find_source('https://host/a.pth') == (None, 'https://host/a.pth')
    with pytest.raises(ValueError, match="other.py' is a config, and config= names another one, '.*mine.py'"):
        find_source(other, config=config)
    with pytest.raises(ValueError, match="epoch_2.pth' is a checkpoint, and checkpoint= names another one"):
        find_source(last, checkpoint=last)
    for missing in ('work_dirs/none', 'none.pth'):
        with pytest.raises(FileNotFoundError, match=f"'{missing}' does not exist; give a checkpoint"):
            find_source(missing)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='empty contains no checkpoint'):
        find_source(tmp_path / 'empty')


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match='none in .*shapes.*run `make train` first'):
        find_checkpoint(work_dirs=tmp_path)
    with pytest.raises(FileNotFoundError, match='no checkpoint is given, and there is none in .*mine; choose one'):
        find_checkpoint(touch(tmp_path / 'configs' / 'mine.py', 1), work_dirs=tmp_path)
    with pytest.raises(FileNotFoundError, match='the config .*none.py does not exist'):
        find_checkpoint(tmp_path / 'none.py')
    with pytest.raises(FileNotFoundError, match='the checkpoint .*none.pth does not exist'):
        find_checkpoint(None, tmp_path / 'none.pth')


# ---- the model ------------------------------------------------------------------------------------------------------
def test_class_names_from_the_checkpoint_or_the_dataset(checkpoint, tmp_path):
    assert load_detector(CONFIG, checkpoint, 'cpu').dataset_meta == dict(classes=tuple('abcdef'))
    bare = torch.load(checkpoint, weights_only=True)['state_dict']
    torch.save(bare, tmp_path / 'bare.pth')
    model = load_detector(CONFIG, tmp_path / 'bare.pth', 'cpu')
    assert model.dataset_meta['classes'] == ('circle', 'square', 'triangle', 'star', 'ring', 'cross')
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, bare[name]), name


def test_weights_of_another_model_are_refused(checkpoint):
    cfg = Config.fromfile(CONFIG)
    cfg.model.bbox_head.num_classes = 3
    with pytest.raises(
        ValueError, match=r'does not fit the config \(size mismatch for bbox_head.cls_br.*another number'
    ):
        load_detector(cfg, checkpoint, 'cpu')
    cfg = Config.fromfile(CONFIG)
    cfg.model.decoder.num_layers = 3
    with pytest.raises(ValueError, match=r'Missing key.*choose the config it was trained with'):
        load_detector(cfg, checkpoint, 'cpu')


@pytest.mark.parametrize('size', [(128, 96), (200, 260)])
def test_predicts_what_mmdetection_predicts(checkpoint, tmp_path, size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'image.png')
    image = read_image(tmp_path / 'image.png')
    np.testing.assert_array_equal(image, pixels)
    sample = predict(load_detector(CONFIG, checkpoint, 'cpu'), image)
    assert sample.pred_instances.bboxes.isfinite().all()
    theirs = inference_detector(init_detector(str(CONFIG), str(checkpoint), device='cpu'), str(tmp_path / 'image.png'))
    assert torch.equal(sample.pred_instances.bboxes, theirs.pred_instances.bboxes)
    assert torch.equal(sample.pred_instances.scores, theirs.pred_instances.scores)
    assert sample.ori_shape == (size[1], size[0])


def test_a_batch_predicts_what_single_images_predict(checkpoint):
    """Whatever the sizes: images are not padded to the size of others."""
    model = load_detector(CONFIG, checkpoint, 'cpu')
    sizes = [(96, 128), (128, 96), (96, 128), (60, 200), (96, 128)]
    images = [np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8) for i, size in enumerate(sizes)]
    batches, forward = [], model.forward
    model.forward = lambda inputs, *args, **kwargs: batches.append(len(inputs)) or forward(inputs, *args, **kwargs)
    samples = predict_batch(model, images)
    assert batches == [3, 1, 1]
    for image, size, sample in zip(images, sizes, samples, strict=True):
        alone = predict(model, image).pred_instances
        assert sample.ori_shape == size
        torch.testing.assert_close(sample.pred_instances.scores, alone.scores, rtol=1e-4, atol=1e-6)
        assert torch.equal(sample.pred_instances.labels[:5], alone.labels[:5])
        torch.testing.assert_close(sample.pred_instances.bboxes[:5], alone.bboxes[:5], rtol=1e-4, atol=1e-3)


def test_a_config_without_test_data_cannot_predict(checkpoint):
    cfg = Config.fromfile(CONFIG)
    cfg.pop('test_dataloader')
    with pytest.raises(ValueError, match='has no test_dataloader'):
        predict(load_detector(cfg, checkpoint, 'cpu'), np.zeros((64, 64, 3), np.uint8))


def test_images_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match='does not exist'):
        read_image(tmp_path / 'none.png')
    (tmp_path / 'text.jpg').write_text('no image')
    with pytest.raises(ValueError, match='text.jpg cannot be read as an image'):
        read_image(tmp_path / 'text.jpg')
