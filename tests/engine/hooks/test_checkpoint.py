"""A killed training leaves a complete checkpoint, and the next start cleans up its folder."""

import os

import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.structures import BaseDataElement

from msda_plugin.engine.checkpoint_files import DiskFullError, is_complete
from msda_plugin.engine.hooks import CheckpointHook, EpochSeedHook, FineTuningHook, MissedValidationHook
from msda_plugin.engine.runner import DetectionRunner


class Toy(BaseModel):
    def __init__(self):
        super().__init__()
        self.number = torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, inputs, mode='tensor', **kwargs):
        return dict(loss=self.number**2 * torch.rand(())) if mode == 'loss' else [BaseDataElement()]


class Rising(BaseMetric):
    """Every validation is better than the one before."""

    default_prefix = 'coco'

    def process(self, data_batch, data_samples):
        pass

    def evaluate(self, size):
        self.value = getattr(self, 'value', 0) + 1
        return {'coco/AP': self.value}

    def compute_metrics(self, results):
        raise NotImplementedError


class Stop(Exception):
    pass


class StopAt(Hook):
    """Records the existing checkpoints at each call of one hook method; raises at the last call."""

    priority = 'LOWEST'

    def __init__(self, name, times):
        self.seen, self.times = [], times
        setattr(self, name, self.call)

    def call(self, runner, *args, **kwargs):
        self.seen.append(checkpoints(runner.work_dir))
        if len(self.seen) == self.times:
            raise Stop


def checkpoints(folder):
    return sorted(name for name in os.listdir(folder) if name.endswith('.pth'))


def loader():
    return dict(
        batch_size=1,
        num_workers=0,
        dataset=[dict(inputs=torch.zeros(1))] * 2,
        sampler=dict(type='DefaultSampler', shuffle=False),
    )


def make_runner(folder, *hooks, resume=False, keep=1, epochs=3, save_best='coco/AP', seed=None, **fields):
    make_runner.count = getattr(make_runner, 'count', 0) + 1
    return DetectionRunner(
        Toy(),
        str(folder),
        train_dataloader=loader(),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        val_dataloader=loader(),
        val_cfg=dict(),
        val_evaluator=Evaluator([Rising()]),
        resume=resume,
        cfg=Config({}),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        custom_hooks=hooks,
        randomness=dict(seed=seed),
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=keep, save_best=save_best, rule='greater')
        ),
        experiment_name=f'{folder.name}_{make_runner.count}',
        **fields,
    )


def test_the_runner_adds_its_hooks(tmp_path):
    hooks = make_runner(tmp_path).hooks
    assert [type(hook) for hook in hooks if type(hook).__name__ == 'CheckpointHook'] == [CheckpointHook]
    assert {EpochSeedHook, FineTuningHook, MissedValidationHook} <= {type(hook) for hook in hooks}
    runner = make_runner(tmp_path)
    runner._hooks = []
    runner.register_default_hooks(dict(checkpoint=None, epoch_seed=None))
    assert not {'CheckpointHook', 'EpochSeedHook'} & {type(hook).__name__ for hook in runner.hooks}
    assert any(isinstance(hook, MissedValidationHook) for hook in runner.hooks)


def test_old_checkpoints_are_removed_after_the_new_one_is_written(tmp_path):
    writing = StopAt('before_save_checkpoint', None)
    make_runner(tmp_path, writing).train()
    # In each epoch: the checkpoint; after the validation the best one, and the checkpoint with that known.
    assert writing.seen[3] == ['best_coco_AP_epoch_1.pth', 'epoch_1.pth']
    assert writing.seen[4] == ['best_coco_AP_epoch_1.pth', 'epoch_2.pth']
    assert writing.seen[5] == ['best_coco_AP_epoch_1.pth', 'best_coco_AP_epoch_2.pth', 'epoch_2.pth']
    assert checkpoints(tmp_path) == ['best_coco_AP_epoch_3.pth', 'epoch_3.pth']
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'epoch_3.pth')


def test_killed_before_outdated_checkpoints_are_removed(tmp_path, monkeypatch):
    from msda_plugin.engine.hooks import checkpoint

    (tmp_path / '.epoch_9.pth.123.tmp').write_text('half')
    runner = make_runner(tmp_path, epochs=2, save_best=None)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint._RemovesLater, 'remove_outdated', lambda self: None)
        runner.train()
    assert checkpoints(tmp_path) == ['epoch_1.pth', 'epoch_2.pth']
    assert not (tmp_path / '.epoch_9.pth.123.tmp').exists()
    make_runner(tmp_path, epochs=2, save_best=None, resume=True).train()
    assert checkpoints(tmp_path) == ['epoch_2.pth']


def test_a_missed_validation_runs_after_a_resume(tmp_path):
    with pytest.raises(Stop):
        make_runner(tmp_path, StopAt('before_val', 2), keep=2).train()
    assert checkpoints(tmp_path) == ['best_coco_AP_epoch_1.pth', 'epoch_1.pth', 'epoch_2.pth']
    validations = StopAt('after_val_epoch', None)
    runner = make_runner(tmp_path, validations, keep=2, resume=True)
    runner.val_evaluator.metrics[0].value = 1
    runner.train()
    assert len(validations.seen) == 2 and 'best_coco_AP_epoch_2.pth' in validations.seen[0]
    again = StopAt('after_val_epoch', None)
    make_runner(tmp_path, again, keep=2, resume=True).train()  # at its end, and evaluated
    assert again.seen == []


@pytest.mark.parametrize('seed', [4, None])
def test_a_resumed_training_ends_with_the_same_weights(tmp_path, seed):
    complete, parts = tmp_path / 'complete', tmp_path / 'parts'
    first = make_runner(complete, seed=seed)
    first.train()
    with pytest.raises(Stop):
        make_runner(parts, StopAt('after_train_iter', 3), seed=first.seed).train()
    resumed = make_runner(parts, resume=True, seed=seed)
    resumed.train()
    assert resumed.seed == first.seed and resumed.train_dataloader.sampler.seed == first.seed
    assert torch.equal(first.model.number, resumed.model.number)


def test_a_damaged_checkpoint(tmp_path):
    make_runner(tmp_path, keep=-1, save_best=None).train()
    last = tmp_path / 'epoch_3.pth'
    last.write_bytes(last.read_bytes()[:-9])
    named = make_runner(tmp_path, resume=True, load_from=str(last))
    with pytest.raises(ValueError, match='epoch_3.pth is incomplete or damaged'):
        named.train()
    runner = make_runner(tmp_path, resume=True, keep=-1, save_best=None)
    said = []
    runner.logger.warning = said.append
    runner.train()
    assert [line for line in said if 'epoch_3.pth' in line and 'resuming from' in line and 'epoch_2.pth' in line]
    assert is_complete(last)


def test_a_full_disk_ends_in_one_sentence(tmp_path, monkeypatch):
    from mmengine.fileio import LocalBackend

    def put(self, content, path):
        if 'epoch_2' in str(path):
            raise OSError(28, 'No space left on device')
        original(self, content, path)

    original = LocalBackend.put
    monkeypatch.setattr(LocalBackend, 'put', put)
    with pytest.raises(DiskFullError) as raised:
        make_runner(tmp_path, save_best=None).train()
    sentence = str(raised.value)
    assert sentence.startswith(f'cannot write {tmp_path}/epoch_2.pth (No space left on device); the last')
    assert f'{tmp_path}/epoch_1.pth, is complete' in sentence and '--resume' in sentence
    assert checkpoints(tmp_path) == ['epoch_1.pth'] and '\n' not in sentence


def test_other_errors_are_not_changed(tmp_path, monkeypatch):
    runner = make_runner(tmp_path)
    monkeypatch.setattr(runner, 'save_checkpoint', lambda *args, **kwargs: open(tmp_path / 'not/there', 'wb'))
    with pytest.raises(FileNotFoundError):
        runner.train()
