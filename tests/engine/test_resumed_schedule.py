"""A training that is resumed with more epochs: what it says, and its learning rates with ``extends_schedule``."""

import math

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel

from msda_plugin.engine.runner import DetectionRunner

ITERATIONS = 4  # per epoch
WARM_UP = dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=3)


class Toy(BaseModel):
    def __init__(self):
        super().__init__()
        self.number = torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, inputs, mode='tensor', **kwargs):
        return dict(loss=self.number**2)


class Rates(Hook):
    def __init__(self):
        self.rates, self.first_buffer = [], None

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        group = runner.optim_wrapper.param_groups[0]
        if not self.rates:
            buffer = runner.optim_wrapper.optimizer.state[group['params'][0]].get('momentum_buffer')
            self.first_buffer = None if buffer is None else buffer.clone()
        self.rates.append(group['lr'])


def train(folder, schedulers, length, resume=False, extend=False, written=None, by_epoch=True):
    """Train; returns the learning rate of each iteration, the log, the runner and the hook."""
    loop = dict(by_epoch=True, max_epochs=length) if by_epoch else dict(by_epoch=False, max_iters=length)
    cfg = Config(dict(param_scheduler=schedulers, train_cfg=loop))
    hook = Rates()
    runner = DetectionRunner(
        Toy(),
        str(folder),
        train_dataloader=dict(
            batch_size=1,
            num_workers=0,
            dataset=[dict(inputs=torch.zeros(1))] * ITERATIONS,
            sampler=dict(type='DefaultSampler' if by_epoch else 'InfiniteSampler', shuffle=False),
        ),
        train_cfg=cfg.train_cfg.copy(),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9)),
        param_scheduler=cfg.param_scheduler,
        custom_hooks=[hook],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1, by_epoch=by_epoch)),
        resume=resume,
        cfg=cfg,
        experiment_name=f'{folder.name}_{length}_{resume}_{extend}',
    )
    runner.as_written = Config(dict(train_cfg=dict(max_epochs=written or length, max_iters=written or length)))
    runner.extends_schedule = extend
    said = []
    runner.logger.addFilter(lambda record: said.append(record.getMessage()) or True)
    runner.train()
    return hook.rates, said, runner, hook


def cosine(length, **fields):
    return dict(type='CosineAnnealingLR', begin=0, end=length, T_max=length, eta_min_ratio=0.02, **fields)


def annealed(steps):
    """The learning rates of one cosine over this number of steps."""
    return [0.1 * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2) for step in range(steps)]


def test_by_iteration_without_the_warm_up(tmp_path):
    schedule = [WARM_UP, cosine(2, convert_to_iter_based=True)]
    first, _, _, _ = train(tmp_path, schedule, 2)
    assert first[0] == pytest.approx(0.001)
    buffer = torch.load(tmp_path / 'epoch_2.pth', weights_only=False)['optimizer']['state'][0]['momentum_buffer']
    rates, said, runner, hook = train(tmp_path, schedule, 5, resume=True, extend=True)
    assert rates == pytest.approx(annealed(3 * ITERATIONS))
    assert torch.equal(hook.first_buffer, buffer)  # the momentum is that of the checkpoint
    (line,) = [line for line in said if 'starts anew' in line]
    assert 'resuming after epoch 2 of 5' in line and 'over the last 3 epochs, from the learning rate 0.1' in line
    # The schedule of the config is that of the start.
    assert runner.cfg.param_scheduler[1].end == 2


def test_killed_and_resumed_again_it_continues(tmp_path):
    schedule = [WARM_UP, cosine(2, convert_to_iter_based=True)]
    train(tmp_path, schedule, 2)
    train(tmp_path, schedule, 5, resume=True, extend=True)
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_3.pth'))
    rates, said, _, _ = train(tmp_path, schedule, 5, resume=True)
    assert rates == pytest.approx(annealed(3 * ITERATIONS)[ITERATIONS:])
    assert not [line for line in said if '--extend' in line]


def test_by_epoch(tmp_path):
    train(tmp_path, [cosine(2)], 2)
    rates, _, _, _ = train(tmp_path, [cosine(2)], 6, resume=True, extend=True)
    assert rates[::ITERATIONS] == pytest.approx(annealed(4)) and rates[0] == rates[ITERATIONS - 1]


def test_a_config_that_already_has_the_new_length(tmp_path):
    """As ``train --data --epochs N`` writes it."""
    train(tmp_path, [WARM_UP, cosine(2, convert_to_iter_based=True)], 2)
    longer = [WARM_UP, cosine(5, convert_to_iter_based=True)]
    rates, _, _, _ = train(tmp_path, longer, 5, resume=True, extend=True)
    assert rates == pytest.approx(annealed(3 * ITERATIONS))


def test_milestones_are_stretched(tmp_path):
    schedule = [dict(type='MultiStepLR', milestones=[1], gamma=0.1)]
    train(tmp_path, schedule, 2)
    rates, _, _, _ = train(tmp_path, schedule, 6, resume=True, extend=True, written=2)
    assert rates[::ITERATIONS] == pytest.approx([0.1, 0.1, 0.01, 0.01])


def test_a_schedule_after_the_warm_up_starts_at_once(tmp_path):
    schedule = [
        dict(WARM_UP, end=ITERATIONS),
        dict(type='CosineAnnealingLR', begin=1, end=3, T_max=2, eta_min_ratio=0.02, convert_to_iter_based=True),
    ]
    train(tmp_path, schedule, 3)
    rates, _, _, _ = train(tmp_path, schedule, 5, resume=True, extend=True)
    assert rates == pytest.approx(annealed(2 * ITERATIONS))


def test_by_iterations_of_the_training(tmp_path):
    schedule = [dict(cosine(6), by_epoch=False)]
    train(tmp_path, schedule, 6, by_epoch=False)
    rates, _, _, _ = train(tmp_path, schedule, 10, resume=True, extend=True, by_epoch=False)
    assert rates == pytest.approx(annealed(4))


def test_without_extend_the_rate_is_said_first(tmp_path):
    schedule = [WARM_UP, cosine(2, convert_to_iter_based=True)]
    first, _, _, _ = train(tmp_path, schedule, 2)
    rates, said, _, _ = train(tmp_path, schedule, 4, resume=True)
    assert rates == pytest.approx([first[-1]] * 2 * ITERATIONS)
    (line,) = [line for line in said if '--extend' in line]
    assert (
        f'resuming after epoch 2 of 4: the schedule has ended, and the learning rate stays at {first[-1]:.3g}' in line
    )
    assert f'({first[-1] / 0.1:.0%} of 0.1)' in line and 'over the last 2 epochs' in line


def test_a_schedule_that_ends_later(tmp_path):
    schedule = [cosine(4, convert_to_iter_based=True)]
    train(tmp_path, schedule, 4)
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_2.pth'))
    _, said, _, _ = train(tmp_path, schedule, 6, resume=True)
    (line,) = [line for line in said if '--extend' in line]
    assert 'resuming after epoch 2 of 6: the schedule ends after epoch 4' in line and '0.051' in line
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_2.pth'))
    _, said, _, _ = train(tmp_path, schedule, 4, resume=True)
    assert not [line for line in said if '--extend' in line]  # as long as the schedule


def test_nothing_is_left(tmp_path):
    train(tmp_path, [cosine(2)], 2)
    rates, said, _, _ = train(tmp_path, [cosine(2)], 2, resume=True)
    assert rates == []
    (line,) = [line for line in said if 'nothing is left to train' in line]
    assert 'already ended with epoch 2' in line and 'set a higher train_cfg.max_epochs (--epochs with --data)' in line
    with pytest.raises(ValueError, match='--extend needs a longer training: the checkpoint is at epoch 2, .* epoch 2'):
        train(tmp_path, [cosine(2)], 2, resume=True, extend=True)


def test_schedules_that_cannot_be_extended(tmp_path):
    restarts = [dict(type='CosineRestartLR', periods=[1, 1], restart_weights=[1, 0.5], eta_min=0.01)]
    train(tmp_path / 'a', restarts, 2)
    with pytest.raises(ValueError, match=r'cannot change the length of param_scheduler.0 \(CosineRestartLR\)'):
        train(tmp_path / 'a', restarts, 4, resume=True, extend=True)
    train(tmp_path / 'b', None, 1)
    with pytest.raises(ValueError, match='--extend needs param_scheduler, a list of schedulers'):
        train(tmp_path / 'b', None, 2, resume=True, extend=True)
