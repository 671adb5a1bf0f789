import pytest
from mmengine.config import Config

from msda_plugin import compat
from msda_plugin.engine.data_root import propagate_data_root
from msda_plugin.engine.runner import DetectionRunner

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


def propagate(cfg):
    propagate_data_root(cfg, Config.fromfile(cfg.filename))


@pytest.mark.parametrize('given', ['/somewhere/else', '/somewhere/else/'])
def test_data_root_applies_to_datasets_and_evaluators(cfg, given):
    cfg.merge_from_dict({'data_root': given})
    propagate(cfg)
    assert cfg.train_dataloader.dataset.dataset.data_root == '/somewhere/else/'
    assert [d.data_root for d in cfg.val_dataloader.dataset.datasets] == ['/somewhere/else/', 'data/other/']
    assert cfg.val_evaluator[0].ann_file == '/somewhere/else/val.json'


def test_data_root_as_written_changes_nothing(cfg):
    before = cfg.to_dict()
    propagate(cfg)
    assert cfg.to_dict() == before


def test_a_config_that_inherits_may_change_the_root(cfg, tmp_path):
    child = tmp_path / 'child.py'
    child.write_text("_base_ = './config.py'\ndata_root = 'data/theirs'\nval_dataloader = None\n")
    cfg = Config.fromfile(str(child))
    propagate(cfg)
    assert cfg.train_dataloader.dataset.dataset.data_root == 'data/theirs/'
    assert cfg.val_evaluator[0].ann_file == 'data/theirs/val.json'


def test_only_complete_folder_names_are_replaced(cfg):
    cfg.val_evaluator[0].ann_file = 'data/mine2/val.json'
    cfg.merge_from_dict({'data_root': '/else/'})
    propagate(cfg)
    assert cfg.val_evaluator[0].ann_file == 'data/mine2/val.json'


def test_several_roots_without_the_one_of_the_file(cfg, tmp_path):
    child = tmp_path / 'child.py'
    child.write_text("_base_ = './config.py'\ndata_root = 'data/theirs/'\n")
    with pytest.raises(ValueError, match='several other roots'):
        propagate(Config.fromfile(str(child)))


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


def test_the_config_file_is_read_once(cfg, runner, monkeypatch):
    read = []
    original = Config.fromfile
    monkeypatch.setattr(Config, 'fromfile', lambda *args, **kwargs: read.append(args) or original(*args, **kwargs))
    cfg.data_root = '/somewhere/else/'
    cfg.experiment_name += '_again'
    runner = DetectionRunner.from_cfg(cfg)
    runner._train_dataloader = dict(batch_size=1, dataset=[1, 2], sampler=dict(type='DefaultSampler'))
    runner.build_train_loop(dict(by_epoch=True, max_epochs=1))
    assert len(read) == 1 and runner.as_written.data_root == 'data/mine/'
    assert runner.cfg.val_evaluator[0].ann_file == '/somewhere/else/val.json'


def test_the_runner_replaces_loaders_and_logs_it(runner):
    from mmengine.runner import checkpoint

    compat.restore()
    before = checkpoint.load_from_local
    said = []
    runner.logger.addFilter(lambda record: said.append(record.getMessage()) or True)
    runner.build_logger()
    assert checkpoint.load_from_local is compat.load_from_local is not before
    assert [line for line in said if 'loads checkpoints with msda_plugin.safe_loading' in line]
    compat.restore()
    assert checkpoint.load_from_local is before


@pytest.mark.parametrize('method', ['train', 'val', 'test'])
def test_missing_data_is_reported_before_loading(runner, method):
    runner.model.train_step = runner.model.val_step = runner.model.test_step = None
    with pytest.raises(FileNotFoundError, match='data/mine'):
        getattr(runner, method)()


def test_the_device_of_the_config_is_used(runner, monkeypatch):
    from mmengine.runner import Runner

    monkeypatch.setattr(Runner, 'wrap_model', lambda self, wrapper, model: 'where MMEngine puts it')
    model = runner.model
    assert runner.wrap_model(None, model) == 'where MMEngine puts it'
    runner.cfg.device = 'cpu'
    assert runner.wrap_model(None, model) is model
