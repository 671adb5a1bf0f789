"""Missing weights and schedules that do not fit the training are reported before it starts."""

import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from mmengine.config import Config
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from torch.utils.data import DataLoader

from msda_plugin.engine import config_check
from msda_plugin.engine.config_check import check_fields, check_schedule, check_weights

CONFIGS = sorted((Path(__file__).resolve().parents[2] / 'configs').glob('[!_]*/*.py'))
WARM_UP = dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=20)


class Images(list):
    metainfo = dict(classes=('cat',))


def loader(images, batch=2, sampler=DefaultSampler, **options):
    images = Images(range(images))
    return DataLoader(images, batch_size=batch, sampler=sampler(images), **options)


def epochs(count, dataloader=None, **options):
    """A loop of ``count`` epochs, by default of 10 iterations each."""
    runner = SimpleNamespace(visualizer=SimpleNamespace())
    return EpochBasedTrainLoop(runner, loader(20) if dataloader is None else dataloader, count, **options)


def iterations(count, dataloader, **options):
    return IterBasedTrainLoop(SimpleNamespace(visualizer=SimpleNamespace()), dataloader, count, **options)


def config(*schedulers, **fields):
    return Config(dict(param_scheduler=list(schedulers), val_dataloader=dict(batch_size=1), **fields))


# ---- weights --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    'field, cfg',
    [
        ('load_from', dict(load_from='no.pth')),
        (
            'model.backbone.init_cfg.checkpoint',
            dict(model=dict(backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='no.pth')))),
        ),
        (
            'model.heads.1.init_cfg.checkpoint',
            dict(model=dict(heads=[dict(), dict(init_cfg=dict(type='Pretrained', checkpoint='no.pth'))])),
        ),
    ],
)
def test_missing_checkpoint(field, cfg):
    message = (
        f'the checkpoint no.pth of {field} does not exist; put it there, or name its file with --cfg-options '
        f'{field}=FILE'
    )
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        check_weights(Config(cfg))


def test_existing_and_remote_checkpoints(tmp_path):
    (tmp_path / 'a.pth').touch()
    check_weights(
        Config(
            dict(
                load_from=str(tmp_path / 'a.pth'),
                model=dict(
                    backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet50')),
                    neck=dict(init_cfg=dict(type='Xavier', layer='Conv2d')),
                ),
            )
        )
    )
    check_weights(Config(dict(load_from=None)))


# ---- fields ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    'fields, message',
    [
        (dict(train_cfg=dict(max_epochs=-1)), 'train_cfg.max_epochs must be a whole number of 1 or more, got -1'),
        (dict(train_cfg=dict(max_epochs=1.5)), 'train_cfg.max_epochs must be a whole number of 1 or more, got 1.5'),
        (dict(train_cfg=dict(val_interval=0)), 'set it with --cfg-options train_cfg.val_interval=NUMBER'),
        (
            dict(val_dataloader=dict(batch_size='4')),
            "val_dataloader.batch_size must be a whole number of 1 or more, got '4'",
        ),
        (dict(test_dataloader=dict(num_workers=-1)), 'test_dataloader.num_workers must be a whole number of 0 or more'),
        (
            dict(optim_wrapper=dict(optimizer=dict(lr='abc'))),
            "optim_wrapper.optimizer.lr must be a number of 0 or more, got 'abc'",
        ),
        (
            dict(optim_wrapper=dict(optimizer=dict(lr=float('inf')))),
            'optimizer.lr must be a number of 0 or more, got inf',
        ),
        (
            dict(optim_wrapper=dict(optimizer=dict(lr=float('nan')))),
            'optimizer.lr must be a number of 0 or more, got nan',
        ),
        (dict(randomness=dict(seed=-1)), 'randomness.seed must be a whole number from 0 to 4294967295, got -1'),
        (dict(log_level='LOUD'), "log_level must be DEBUG, INFO, WARNING or ERROR, got 'LOUD'"),
    ],
)
def test_fields_of_the_wrong_type_or_size(fields, message):
    complete = {}
    for name in fields:
        for group in config_check.GROUPS:
            if name in group:
                complete |= {other: dict() for other in group}
    with pytest.raises(ValueError, match=re.escape(message)):
        check_fields(Config({**complete, **fields}))


def test_no_workers_that_persist():
    loaders = dict(
        train_cfg=dict(), optim_wrapper=dict(), train_dataloader=dict(num_workers=0, persistent_workers=True)
    )
    with pytest.raises(ValueError, match='set train_dataloader.persistent_workers=False as well'):
        check_fields(Config(loaders))


def test_fields_that_belong_together():
    with pytest.raises(
        ValueError, match='the config has val_cfg, val_evaluator, but val_dataloader is missing; set all'
    ):
        check_fields(Config(dict(val_cfg=dict(), val_evaluator=dict(), val_dataloader=None)))


def test_usual_fields():
    check_fields(Config(dict(randomness=dict(seed=None), log_level='INFO', optim_wrapper=None, test_cfg=None)))
    for path in CONFIGS[::5]:
        check_fields(Config.fromfile(str(path)))


# ---- schedule -------------------------------------------------------------------------------------------------------
def test_a_schedule_that_fits():
    cfg = config(
        WARM_UP,
        dict(type='MultiStepLR', by_epoch=True, milestones=[2, 4]),
        dict(type='CosineAnnealingLR', begin=2, end=4, T_max=2),
        dict(type='ExponentialLR', gamma=0.9),
    )
    check_schedule(cfg, epochs(4))
    check_schedule(Config(), epochs(1))
    check_schedule(config(WARM_UP), iterations(20, loader(4)))


@pytest.mark.parametrize(
    'scheduler, message',
    [
        (
            dict(WARM_UP, end=41),
            'param_scheduler.0 (LinearLR) has end=41, but the training ends with iteration 40 (4 epochs of 10): the '
            'learning rate never gets there; set train_cfg.max_epochs=5 or more, or param_scheduler.0.end=40 or less',
        ),
        (dict(type='ConstantLR', factor=0.1, begin=2, end=5), 'has end=5, but the training ends with epoch 4:'),
        (dict(type='MultiStepLR', milestones=[2, 9]), 'has milestones=9, but the training ends with epoch 4:'),
        (dict(type='MultiStepLR', milestones=[3], begin=2), 'has milestones=3, counted from epoch 2, but the training'),
        (
            dict(type='CosineAnnealingLR', T_max=12),
            'has T_max=12, but the training ends with epoch 4: the learning rate',
        ),
        (
            dict(type='CosineAnnealingLR', begin=4, T_max=2),
            'begins after epoch 4, but the training ends with epoch 4; set train_cfg.max_epochs=5 or more, or '
            'param_scheduler.0.begin=3 or less',
        ),
        (
            dict(type='mmengine.LinearLR', by_epoch=False, begin=50, end=60),
            'begins after iteration 50, but the training',
        ),
    ],
)
def test_a_schedule_that_is_longer_than_the_training(scheduler, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_schedule(config(scheduler), epochs(4))


def test_a_warm_up_longer_than_an_iteration_based_training():
    with pytest.raises(ValueError, match='iteration 19: .* set train_cfg.max_iters=20 or more, or param_.*=19 or less'):
        check_schedule(config(WARM_UP), iterations(19, loader(4)))


@pytest.mark.parametrize(
    'warm_up', [dict(WARM_UP, end=1), dict(type='ConstantLR', factor=0.1, by_epoch=True, begin=2, end=3)]
)
def test_a_warm_up_of_one_step_never_ends(warm_up):
    with pytest.raises(
        ValueError, match=r'is one (iteration|epoch) long, .* stays at its first value; set .*\.end=[24] or'
    ):
        check_schedule(config(warm_up), epochs(4))
    check_schedule(config(dict(warm_up, end=warm_up['end'] + 1)), epochs(4))
    # One epoch that is converted has several iterations.
    check_schedule(config(dict(type='LinearLR', begin=0, end=1, convert_to_iter_based=True)), epochs(4))
    check_schedule(config(dict(type='LinearLR', start_factor=1.0, by_epoch=False, begin=0, end=1)), epochs(4))


def test_no_validation():
    with pytest.raises(
        ValueError,
        match='val_begin is 5, but the training ends with epoch 4: it is never validated; '
        'set train_cfg.val_begin=4 or less',
    ):
        check_schedule(config(), epochs(4, val_begin=5))
    with pytest.raises(ValueError, match='val_begin is 9, but the training ends with iteration 8'):
        check_schedule(config(), iterations(8, loader(4), val_begin=9))
    check_schedule(config(), epochs(4, val_interval=5))  # the last epoch is validated in any case
    check_schedule(Config(dict(val_dataloader=None)), epochs(4, val_begin=5))


def test_no_iteration():
    with pytest.raises(
        ValueError,
        match='train_dataloader.batch_size is 8 and drop_last is on, but there are 5 images'
        ': no batch is ever full, .* set train_dataloader.batch_size=5 or less, or',
    ):
        check_schedule(config(), epochs(4, loader(5, batch=8, drop_last=True)))
    with pytest.raises(ValueError, match='train_dataloader.dataset has no image'):
        check_schedule(config(), epochs(4, loader(0)))
    check_schedule(config(), epochs(4, loader(5, batch=8)))
    # A sampler without an end fills a batch from any number of images, and none from no image.
    check_schedule(config(), iterations(4, loader(5, batch=8, drop_last=True, sampler=InfiniteSampler)))
    with pytest.raises(ValueError, match='train_cfg.max_epochs is 0, so that nothing is trained; set it to 1 or more'):
        check_schedule(config(), epochs(0))


@pytest.fixture
def said(monkeypatch):
    messages = []
    monkeypatch.setattr(config_check, 'print_log', lambda message, logger, level: messages.append((message, level)))
    return messages


def written(scheduler, length=4):
    return config(scheduler, train_cfg=dict(by_epoch=True, max_epochs=length))


def test_a_shorter_training_than_in_the_file_is_a_warning(said):
    """The schedule of the file belongs to the longer training."""
    check_schedule(written(WARM_UP), epochs(1), written(WARM_UP))
    ((message, level),) = said
    assert 'has end=20, but the training ends with iteration 10 (1 epochs of 10)' in message
    assert 'set train_cfg.max_epochs=2 or more, or param_scheduler.0.end=10 or less' in message
    assert level == logging.WARNING
    with pytest.raises(ValueError, match='end=20, but the training ends with iteration 4 '):
        check_schedule(written(WARM_UP), epochs(4, loader(1)), written(WARM_UP))  # as long as in the file


def test_a_longer_training_than_in_the_file_is_a_warning(said):
    cosine = dict(type='CosineAnnealingLR', begin=1, end=4, T_max=3)
    check_schedule(written(cosine), epochs(6), written(cosine))
    ((message, level),) = said
    assert 'anneals the learning rate until epoch 4, but the training ends with epoch 6' in message
    assert message.endswith('set param_scheduler.0.T_max=5 param_scheduler.0.end=6') and level == logging.WARNING
    check_schedule(written(dict(cosine, T_max=5, end=6)), epochs(6), written(cosine))
    check_schedule(written(WARM_UP), epochs(6), written(WARM_UP))
    check_schedule(written(cosine), epochs(6), written(cosine), resumed=True)
    assert len(said) == 1


def test_a_field_that_has_no_effect_is_an_error():
    cfg = Config(dict(max_epochs=2, train_cfg=dict(max_epochs=4)))
    as_written = Config(dict(max_epochs=4, train_cfg=dict(max_epochs=4)))
    with pytest.raises(ValueError, match='max_epochs=2 has no effect, .* set train_cfg.max_epochs=2, and the fields'):
        check_schedule(cfg, epochs(4), as_written)
    cfg.train_cfg.max_epochs = 2
    check_schedule(cfg, epochs(2), as_written)


def test_no_schedule_is_changed():
    cfg = written(dict(type='CosineAnnealingLR', begin=0, end=4, T_max=4))
    before = cfg.to_dict()
    check_schedule(cfg, epochs(1), cfg)
    check_schedule(cfg, epochs(9), cfg)
    assert cfg.to_dict() == before


def check_with_enough_images(cfg):
    options = {key: value for key, value in cfg.train_cfg.items() if key in ('val_begin', 'val_interval')}
    check_schedule(cfg, epochs(cfg.train_cfg.max_epochs, loader(10_000), **options))


@pytest.mark.parametrize('path', CONFIGS[::3], ids=lambda path: path.stem)  # a family shares its schedules
def test_configs_fit_their_own_schedules(path):
    cfg = Config.fromfile(str(path))
    if 'max_epochs' not in cfg.train_cfg:
        pytest.skip('its schedule counts iterations')
    check_with_enough_images(cfg)


@pytest.mark.parametrize('readme', sorted(CONFIGS[0].parents[1].glob('*/README.md')), ids=lambda path: path.parent.name)
def test_every_family_links_to_the_slurm_instructions(readme):
    [link] = re.findall(r'\]\((\S+many_gpus\.md)\)', readme.read_text())
    assert '--launcher slurm' in (readme.parent / link).read_text()
