import pytest
from mmengine.config import Config

from msda_plugin.engine.runner import DetectionRunner, propagate_data_root, propagate_max_epochs

CONFIG = """
data_root = 'data/mine/'
dataset = dict(type='CocoDataset', data_root=data_root, ann_file='train.json', data_prefix=dict(img='images/'))
train_dataloader = dict(dataset=dict(type='RepeatDataset', times=2, dataset=dataset))
val_dataloader = dict(dataset=dict(type='ConcatDataset', datasets=[dataset, dict(dataset, data_root='data/other/')]))
val_evaluator = [dict(type='CocoMetric', ann_file=data_root + 'val.json')]
"""


@pytest.fixture
def cfg(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text(CONFIG)
    return Config.fromfile(str(path))


@pytest.mark.parametrize('given', ['/somewhere/else', '/somewhere/else/'])
def test_data_root_reaches_datasets_and_evaluators(cfg, given):
    cfg.merge_from_dict({'data_root': given})
    propagate_data_root(cfg)
    assert cfg.train_dataloader.dataset.dataset.data_root == '/somewhere/else/'
    assert [d.data_root for d in cfg.val_dataloader.dataset.datasets] == ['/somewhere/else/', 'data/other/']
    assert cfg.val_evaluator[0].ann_file == '/somewhere/else/val.json'


def test_data_root_as_written_changes_nothing(cfg):
    before = cfg.to_dict()
    propagate_data_root(cfg)
    assert cfg.to_dict() == before


def test_a_config_that_inherits_may_change_the_root(cfg, tmp_path):
    child = tmp_path / 'child.py'
    child.write_text("_base_ = './config.py'\ndata_root = 'data/theirs'\nval_dataloader = None\n")
    cfg = Config.fromfile(str(child))
    propagate_data_root(cfg)
    assert cfg.train_dataloader.dataset.dataset.data_root == 'data/theirs/'
    assert cfg.val_evaluator[0].ann_file == 'data/theirs/val.json'


def test_only_whole_folders_are_replaced(cfg):
    cfg.val_evaluator[0].ann_file = 'data/mine2/val.json'
    cfg.merge_from_dict({'data_root': '/else/'})
    propagate_data_root(cfg)
    assert cfg.val_evaluator[0].ann_file == 'data/mine2/val.json'


def test_several_roots_and_none_to_replace(cfg, tmp_path):
    child = tmp_path / 'child.py'
    child.write_text("_base_ = './config.py'\ndata_root = 'data/theirs/'\n")
    with pytest.raises(ValueError, match='several other folders'):
        propagate_data_root(Config.fromfile(str(child)))


SCHEDULE = """
max_epochs = 8
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=150),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=4, end=max_epochs, T_max=4),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=0, T_max=max_epochs),
    dict(type='MultiStepLR', milestones=[4, 6], by_epoch=True)]
"""


@pytest.mark.parametrize('field', ['max_epochs', 'train_cfg.max_epochs'])
@pytest.mark.parametrize(
    'epochs, cosine, milestones',
    [
        (16, dict(begin=8, end=16, T_max=8), [8, 12]),
        (2, dict(begin=1, end=2, T_max=1), [1, 2]),
        (1, dict(begin=0, end=1, T_max=1), [1, 1]),
    ],
)
def test_epochs_reach_the_schedules(field, epochs, cosine, milestones, tmp_path):
    path = tmp_path / 'config.py'
    path.write_text(SCHEDULE)
    cfg = Config.fromfile(str(path))
    cfg.merge_from_dict({field: epochs})
    propagate_max_epochs(cfg)
    assert cfg.max_epochs == cfg.train_cfg.max_epochs == epochs
    warm_up, late, whole, steps = cfg.param_scheduler
    assert warm_up.end == 150 and {key: late[key] for key in cosine} == cosine
    assert whole.T_max == epochs and steps.milestones == milestones


def test_schedules_that_were_changed_as_well_stay(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text(SCHEDULE)
    cfg = Config.fromfile(str(path))
    cfg.merge_from_dict({'train_cfg.max_epochs': 16, 'param_scheduler.1.T_max': 5})
    before = cfg.param_scheduler.copy()
    propagate_max_epochs(cfg)
    assert cfg.param_scheduler == before and cfg.max_epochs == 16
    for text in (SCHEDULE, ''):  # nothing to do
        path.write_text(text)
        cfg = Config.fromfile(str(path))
        before = cfg.to_dict()
        propagate_max_epochs(cfg)
        assert cfg.to_dict() == before


@pytest.fixture
def runner(cfg, tmp_path):
    cfg.merge_from_dict(
        dict(
            model=dict(type='Linear', in_features=1, out_features=1),
            work_dir=str(tmp_path),
            default_scope='mmdet',
            train_cfg=dict(by_epoch=True, max_epochs=1),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
            val_cfg=dict(),
            test_cfg=dict(),
            test_dataloader=cfg.val_dataloader.copy(),
            test_evaluator=cfg.val_evaluator,
            experiment_name=tmp_path.name,
        )
    )
    return DetectionRunner.from_cfg(cfg)


@pytest.mark.parametrize('method', ['train', 'val', 'test'])
def test_missing_data_is_said_before_any_is_loaded(runner, method):
    runner.model.train_step = runner.model.val_step = runner.model.test_step = None
    with pytest.raises(FileNotFoundError, match='data/mine'):
        getattr(runner, method)()


def test_the_device_of_the_config_is_taken(runner, monkeypatch):
    from mmengine.runner import Runner

    monkeypatch.setattr(Runner, 'wrap_model', lambda self, wrapper, model: 'where MMEngine puts it')
    model = runner.model
    assert runner.wrap_model(None, model) == 'where MMEngine puts it'
    runner.cfg.device = 'cpu'
    assert runner.wrap_model(None, model) is model
