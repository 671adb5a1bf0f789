"""What is chosen from the data: epochs, batch, image size, augmentation; and the plan for a number of minutes."""

import json
import time
from pathlib import Path

import pytest
from mmengine.config import Config

from msda_plugin.engine.model_zoo import find_model
from msda_plugin.tools.custom_data.budget import Speed, earlier_plan, plan_training
from msda_plugin.tools.custom_data.config import DEFAULT_MODEL, Choices, Data, build_config
from msda_plugin.tools.custom_data.recipe import Objects, Plan, choose_recipe, choose_side, measure_objects
from msda_plugin.tools.shapes import generate
from msda_plugin.tools.train import main

STOCK = 'mmdet-deformable-detr-two-stage_r18'


def config(model=DEFAULT_MODEL, plan=None, num_images=100, objects=None, **choices):
    files = {split: (Path(f'/data/{split}.json'), Path('/data/images')) for split in ('train', 'val')}
    data = Data(files, ('cat', 'dog'), num_images, 5, num_val=20, objects=objects or Objects())
    return build_config(find_model(model).config, data, Choices(work_dir='work', **choices), plan)


def hooks(cfg, kind):
    return [hook for hook in cfg.custom_hooks if hook.type == kind]


def test_epochs_by_the_number_of_images():
    epochs = [choose_recipe(number, fine_tuning=False).epochs for number in (1, 60, 131, 1000, 50_000)]
    assert epochs == [100, 100, 76, 12, 12]
    assert choose_recipe(131, fine_tuning=True).epochs == 31
    assert config(num_images=131)[0].train_cfg.max_epochs == 76
    assert config(num_images=131, epochs=7)[0].train_cfg.max_epochs == 7


def test_batch_and_learning_rate():
    cfg, _ = config()
    assert cfg.train_dataloader.batch_size == 4 and cfg.optim_wrapper.optimizer.lr == 4e-4
    cfg, _ = config(batch_size=1)
    assert cfg.train_dataloader.batch_size == 1 and cfg.optim_wrapper.optimizer.lr == pytest.approx(2e-4)
    assert config(effective_batch=10)[0].train_dataloader.batch_size == 2  # the largest one that divides it


def test_image_size_by_the_objects():
    images = [dict(id=1, width=640, height=480), dict(id=2, width=600, height=800)]
    boxes = [dict(image_id=1, bbox=[0, 0, 64, 64]), dict(image_id=2, bbox=[0, 0, 400, 100])]
    crowd = dict(image_id=2, bbox=[0, 0, 1, 1], iscrowd=1)
    objects = measure_objects(images, [*boxes, crowd])
    assert objects.small == pytest.approx(0.1 + 0.05 * (0.25 - 0.1)) and objects.image_side == 720
    assert measure_objects(images, []) == Objects(0.0, 720)

    for small, image_side, side in (
        (0.3, 640, 320),  # large objects
        (0.063, 640, 384),  # 24 pixels
        (0.01, 4000, 640),  # tiny
        (0.01, 500, 512),  # enlarging images adds nothing
        (0.01, 96, 320),
        (0.0, 640, 320),  # no objects
    ):
        assert choose_side(Objects(small, image_side)) == side
    cfg, notes = config(objects=Objects(0.063, 640))
    assert cfg.test_dataloader.dataset.pipeline[1].scale == (384, 384)
    assert 'image size: 384, chosen from the sizes of images and objects' in notes
    cfg, _ = config(objects=Objects(0.063, 640), image_size=(128, 96))
    assert cfg.test_dataloader.dataset.pipeline[1].scale == (128, 96)


def test_strong_augmentations_end_before_the_last_epochs():
    for augmentation, ending in ((None, ['RandomApply']), ('strong', ['Mosaic', 'RandomApply'])):
        cfg, _ = config(epochs=80, augmentation=augmentation)
        assert cfg.train_dataloader.dataset.type == 'MultiImageMixDataset'
        (switch,) = hooks(cfg, 'YOLOXModeSwitchHook')
        assert switch.num_last_epochs == 12 and switch.skip_type_keys == ending
        kinds = [step.type for step in cfg.train_dataloader.dataset.pipeline]
        assert kinds == [*ending, 'RandomResize', 'YOLOXHSVRandomAug', 'RandomFlip', 'PackDetInputs']
    small = 'deformable-detr-two-stage_shunted-nano_1xb4-8e_shapes'  # its 40 queries need more pixels
    for name, choices in (
        (DEFAULT_MODEL, dict(augmentation='weak')),
        (DEFAULT_MODEL, dict(epochs=19)),
        (small, dict(image_size=(64, 64))),
    ):
        cfg, _ = config(name, **choices)
        kinds = [step.type for step in cfg.train_dataloader.dataset.pipeline]
        assert kinds[2:] == ['RandomResize', 'RandomFlip', 'PackDetInputs'] and not hooks(cfg, 'YOLOXModeSwitchHook')


def test_augmentation_by_the_passes_through_the_data():
    divided = Plan(epochs=25, val_interval=5, val_epochs=0.1, epoch_images=60)  # 5 passes
    for choices in (dict(epochs=59), dict(plan=divided, num_images=300, minutes=60)):
        assert 'augmentation: weak' in config(**choices)[1]
    assert 'augmentation: medium' in config(epochs=60)[1]


def test_published_detectors_are_tuned_gently():
    name = 'deformable-detr-refine-twostage_r50_16xb2-50e_coco'
    cfg, notes = config(name, load_from='published.pth')
    assert cfg.train_dataloader.dataset.type == 'CocoDataset' and not hooks(cfg, 'YOLOXModeSwitchHook')
    published = Config.fromfile(str(find_model(name).config)).optim_wrapper.optimizer
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(published.lr * (4 / 32) ** 0.5, rel=1e-3)
    assert cfg.optim_wrapper.optimizer.weight_decay == published.weight_decay


def test_weights_are_averaged_over_a_part_of_the_training():
    for epochs, images, momentum in ((20, 100, 0.02), (100, 131, 0.003), (100, 4000, 0.0005)):
        cfg, _ = config(epochs=epochs, num_images=images)
        (average,) = hooks(cfg, 'EMAHook')
        assert average.momentum == pytest.approx(momentum, rel=0.2) and average.ema_type == 'ExpMomentumEMA'


def test_early_stopping_is_a_choice():
    assert not hooks(config()[0], 'EarlyStoppingHook')
    (stop,) = hooks(config(patience=4)[0], 'EarlyStoppingHook')
    assert stop.patience == 4 and stop.monitor == 'coco/bbox_mAP' == config()[0].default_hooks.checkpoint.save_best


def test_overfitting_is_measured():
    (report,) = hooks(config()[0], 'msda_plugin.TrainingReportHook')
    assert report.num_train_images == 20  # as many as there are validation images, at most 32


# ---- a number of minutes --------------------------------------------------------------------------------------------
def test_plan_fits_into_the_time():
    plan = plan_training(40, Speed(train=0.2, val=0.1), num_images=130, batch_size=1, val_iterations=65)
    assert plan.epoch_images is None
    validations = -(-plan.epochs // plan.val_interval)
    assert 2 <= validations <= 10
    seconds = plan.epochs * 130 * 0.2 + validations * 6.5
    assert 2300 < seconds <= 2400 and plan.val_epochs == pytest.approx(6.5 / 26, rel=0.05)


def test_long_epochs_are_divided():
    plan = plan_training(10, Speed(train=1.0, val=0.5), num_images=100_000, batch_size=4, val_iterations=40)
    assert plan.epoch_images == 4 * 29 and 18 <= plan.epochs <= 20
    cfg, _ = config(plan=plan, num_images=100_000, minutes=10)
    assert cfg.train_dataloader.sampler == dict(type='msda_plugin.PartSampler', num_samples=116)
    assert cfg.train_cfg.max_epochs == plan.epochs == cfg.param_scheduler[-1].end
    (budget,) = hooks(cfg, 'msda_plugin.TimeBudgetHook')
    assert budget.minutes == 10 and budget.val_epochs == plan.val_epochs
    assert earlier_plan(cfg) == plan and earlier_plan(config()[0]) is None


def test_too_little_time():
    with pytest.raises(ValueError, match='--minutes leaves 6 seconds for the training, but an iteration takes 1,'):
        plan_training(0.1, Speed(train=1.0, val=0.5), num_images=10, batch_size=1, val_iterations=40)


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'mine'
    generate(folder, train=8, val=2, size=(64, 64), seed=1)
    return folder


OPTIONS = ['--image-size', '128', '--workers', '0', '--device', 'cpu']


@pytest.mark.parametrize('augmentation', ['medium', 'strong'])
def test_training_data_of_the_recipe(augmentation, shapes, tmp_path, capsys):
    """Every image that the pipeline can produce has boxes inside it, with one label each."""
    from mmdet.registry import DATASETS
    from mmengine.registry import init_default_scope

    assert (
        main(['--data', str(shapes), '--dry-run', '--work-dir', str(tmp_path), '--augment', augmentation, *OPTIONS])
        == 0
    )
    (path,) = tmp_path.glob('*.py')
    cfg = Config.fromfile(str(path))
    init_default_scope(cfg.default_scope)
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    counts = []
    for index in list(range(8)) * 5:
        sample = dataset[index]
        height, width = sample['inputs'].shape[1:]
        found = sample['data_samples'].gt_instances
        boxes = found.bboxes.tensor
        counts.append(len(boxes))
        assert len(found.labels) == len(boxes) and (boxes >= 0).all()
        assert (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all() and max(height, width) <= 154
    assert len(set(counts)) > 2
    dataset.update_skip_type_keys([hook for hook in cfg.custom_hooks if 'skip_type_keys' in hook][0].skip_type_keys)
    annotated = [len(dataset.get_data_info(index)['instances']) for index in range(8)]
    assert [len(dataset[index]['data_samples'].gt_instances) for index in range(8)] == annotated


@pytest.mark.slow
def test_trains_for_minutes_and_resumes(shapes, tmp_path, capsys, monkeypatch):
    for clock in ('monotonic', 'perf_counter'):  # CPU time does not depend on what else runs
        monkeypatch.setattr(time, clock, time.process_time)
    options = ['--data', str(shapes), '--work-dir', str(tmp_path), '--minutes', '0.6', *OPTIONS]
    assert main(options) == 0
    said = capsys.readouterr().out
    assert 'time: 0.6 minutes, planned as' in said and 'seconds an iteration' in said
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    assert metrics['finished'] and metrics['train_seconds'] < 40 and metrics['final']['train_bbox_mAP'] is not None
    options[options.index('0.6')] = '0.9'
    assert main([*options, '--resume']) == 0
    assert json.loads((tmp_path / 'metrics.json').read_text())['final']['epoch'] > metrics['final']['epoch']


@pytest.mark.slow
def test_the_last_epochs_see_whole_images(shapes, tmp_path):
    options = ['--data', str(shapes), '--work-dir', str(tmp_path), '--epochs', '20', '--batch-size', '8', *OPTIONS]
    options[options.index('--workers') + 1] = '1'  # whose process has a copy of the pipeline
    assert main([*options, '--augment', 'strong', '--cfg-options', 'train_cfg.val_interval=20']) == 0
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    assert metrics['finished'] and metrics['final']['epoch'] == 20
    (log,) = tmp_path.glob('*/*.log')
    assert log.read_text().count('No mosaic and mixup aug now!') == 1
