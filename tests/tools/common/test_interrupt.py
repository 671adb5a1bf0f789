"""Ctrl-C stops a training between two iterations; the checkpoint of the last epoch is complete."""

import os
import signal

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner

from msda_plugin.tools.common import interrupt


class Toy(BaseModel):
    def __init__(self):
        super().__init__()
        self.number = torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, inputs, mode='tensor', **kwargs):
        return dict(loss=self.number**2)


class PressCtrlC(Hook):
    def __init__(self, at, times=1, error=None):
        self.at, self.times, self.error = at, times, error

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.at:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)
            if self.error:
                raise self.error


def make_runner(folder, hook):
    loader = dict(
        batch_size=1,
        num_workers=0,
        dataset=[dict(inputs=torch.zeros(1))] * 4,
        sampler=dict(type='DefaultSampler', shuffle=False),
    )
    return Runner(
        Toy(),
        str(folder),
        train_dataloader=loader,
        train_cfg=dict(by_epoch=True, max_epochs=5),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        custom_hooks=[hook],
        cfg=Config({}),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
        experiment_name=folder.name,
    )


def test_the_iteration_is_finished_and_the_message_says_how_to_resume(tmp_path, capsys):
    runner = make_runner(tmp_path, PressCtrlC(at=6))
    before = signal.getsignal(signal.SIGINT)
    assert interrupt.train(runner) == 130
    assert runner.iter == 6 and runner.epoch == 1  # counted from 0: the seventh iteration has run, in epoch 2
    said = capsys.readouterr().err
    assert 'stopping after this iteration' in said
    assert f'stopped; the last checkpoint is {tmp_path}/epoch_1.pth' in said
    assert '--resume' in said and signal.getsignal(signal.SIGINT) is before


def test_the_message_without_a_checkpoint(tmp_path, capsys):
    (tmp_path / 'last_checkpoint').write_text('of/an/earlier/training.pth')
    assert interrupt.train(make_runner(tmp_path, PressCtrlC(at=1))) == 130
    assert 'there is no checkpoint yet' in capsys.readouterr().err


def test_twice_stops_immediately(tmp_path, capsys):
    hook = PressCtrlC(at=6, times=2)
    assert interrupt.train(make_runner(tmp_path, hook)) == 130
    assert 'again to stop immediately' in capsys.readouterr().err


def test_errors_caused_by_ctrl_c_have_no_traceback(tmp_path, capsys):
    died = RuntimeError('DataLoader worker (pid 1) exited unexpectedly')
    assert interrupt.train(make_runner(tmp_path, PressCtrlC(at=6, error=died))) == 130
    with pytest.raises(RuntimeError, match='exited unexpectedly'):
        interrupt.train(make_runner(tmp_path, PressCtrlC(at=6, times=0, error=died)))


def test_status_0_without_ctrl_c(tmp_path):
    assert interrupt.train(make_runner(tmp_path, Hook())) == 0
    assert (tmp_path / 'epoch_5.pth').is_file()
