import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS

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


def test_an_unnumbered_gpu_is_the_first_one(runner, monkeypatch):
    from mmengine.runner import Runner

    chosen = []
    monkeypatch.setattr(Runner, 'wrap_model', lambda self, wrapper, model: model)
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
    for device in ('cuda', 'cuda:1'):
        runner.cfg.device = device
        runner.wrap_model(None, runner.model)
    assert chosen == [0, 1]


@pytest.mark.parametrize('device, calls', [(None, 1), ('cpu', 1), ('cuda', 0)])
def test_freed_memory_is_kept_on_a_cpu(runner, device, calls, monkeypatch):
    called = []
    monkeypatch.setattr('msda_plugin.engine.runner.keep_freed_memory', lambda: called.append(1))
    monkeypatch.setattr('msda_plugin.engine.runner.get_device', lambda: 'cpu')
    runner.cfg.device = device
    runner.setup_env({})
    assert len(called) == calls


# ---- the config in the work dir -------------------------------------------------------------------------------------
@MODELS.register_module(force=True)
class RunnerToy(BaseModel):
    def __init__(self):
        super().__init__()
        self.number = torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, inputs, mode='tensor', **kwargs):
        return dict(loss=self.number**2) if mode == 'loss' else [inputs]


@DATASETS.register_module(force=True)
class RunnerToyImages(torch.utils.data.Dataset):
    def __init__(self, classes):
        self.metainfo = dict(classes=tuple(classes))

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return dict(inputs=torch.zeros(1))


@METRICS.register_module(force=True)
class RunnerToyMetric(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(1)

    def compute_metrics(self, results):
        return dict(images=len(results))


TOY = """
runner_type = 'msda_plugin.DetectionRunner'
model = dict(type='RunnerToy')
train_dataloader = dict(batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='RunnerToyImages', classes=['cat', 'dog']))
test_dataloader = train_dataloader
train_cfg = dict(by_epoch=True, max_epochs=1)
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1))
test_cfg = dict()
test_evaluator = dict(type='RunnerToyMetric')
default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1))
load_from = 'pretrained.pth'
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A function that builds a runner of the config toy.py, with the work dir ``work``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'toy.py').write_text(TOY)
    torch.save(RunnerToy().state_dict(), 'pretrained.pth')
    names = (f'{tmp_path.name}_{number}' for number in range(99))

    def build(path='toy.py', **fields):
        cfg = Config.fromfile(path)
        cfg.merge_from_dict(dict(fields, work_dir='work', experiment_name=next(names)))
        return DetectionRunner.from_cfg(cfg)

    return build


def test_only_a_training_writes_the_config(toy, tmp_path):
    saved = tmp_path / 'work/toy.py'
    toy(load_from='pretrained.pth').test()
    assert not saved.exists()
    toy().train()
    before = saved.read_text()
    toy('work/toy.py', load_from='work/epoch_1.pth').test()  # as `mim test` builds it
    assert saved.read_text() == before
    assert [path.name for path in (tmp_path / 'work').glob('*.py')] == ['toy.py']


def test_after_a_resume_the_config_says_how_the_training_started(toy, tmp_path):
    toy().train()
    started = torch.load('work/epoch_1.pth', weights_only=False)['meta']['cfg']
    (tmp_path / 'pretrained.pth').unlink()  # not needed to resume
    runner = toy(**{'resume': True, 'load_from': None, 'train_cfg.max_epochs': 2})
    assert runner._resume and runner._load_from is None
    runner.train()
    resumed = torch.load('work/epoch_2.pth', weights_only=False)['meta']['cfg']
    saved = Config.fromfile('work/toy.py')
    for text in (started, resumed):
        cfg = Config.fromstring(text, '.py')
        assert (cfg.load_from, cfg.get('resume', False)) == ('pretrained.pth', False)
        assert cfg.model == saved.model and cfg.train_dataloader == saved.train_dataloader
    assert (saved.load_from, saved.resume, saved.train_cfg.max_epochs) == ('pretrained.pth', False, 2)


@pytest.mark.parametrize('classes', [['cat', 'dog', 'bird'], ['cat', 'mouse'], ['dog', 'cat']])
def test_other_classes_are_not_resumed(toy, classes):
    toy().train()
    fields = {'resume': True, 'load_from': None, 'train_cfg.max_epochs': 2}
    with pytest.raises(
        ValueError, match=rf'other classes .*: 2 \(cat, dog\), .* have {len(classes)} \({", ".join(classes)}'
    ):
        toy(**fields, **{'train_dataloader.dataset.classes': classes}).train()
    toy(**fields).train()


def test_weights_alone_are_not_resumed(toy):
    with pytest.raises(
        ValueError, match='pretrained.pth is not the checkpoint of a training, .* --cfg-options load_from='
    ):
        toy(resume=True).train()
