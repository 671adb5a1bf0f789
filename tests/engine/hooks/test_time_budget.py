"""A training within a time, on a machine whose speed varies. The clock is simulated."""

import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import HOOKS as ROOT_HOOKS

from msda_plugin.engine.hooks import TimeBudgetHook, time_budget
from msda_plugin.engine.runner import DetectionRunner

ITERATIONS = 4  # per epoch
VALIDATION = 3.0  # seconds


class Toy(BaseModel):
    def __init__(self):
        super().__init__()
        self.number = torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, inputs, mode='tensor', **kwargs):
        return dict(loss=self.number**2) if mode == 'loss' else [0]


class Metric(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        return dict(ap=0.0)


class Clock(Hook):
    """Lets time pass: ``speed(epoch)`` seconds an iteration, and ``VALIDATION`` a validation."""

    def __init__(self, speed, stop_after=None):
        self.now, self.speed, self.stop_after, self.rates, self.validated = 1000.0, speed, stop_after, [], []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.now += self.speed(runner.epoch)
        self.rates.append(runner.optim_wrapper.param_groups[0]['lr'])

    def after_val_epoch(self, runner, metrics=None):
        self.now += VALIDATION
        self.validated.append(runner.epoch)

    def before_train_epoch(self, runner):
        if runner.epoch == self.stop_after:
            raise KeyboardInterrupt


def train(folder, monkeypatch, speed, seconds=100.0, epochs=20, begin=0, resume=False, stop_after=None):
    """A training that was planned as ``epochs`` of 4 seconds with two validations."""
    clock = Clock(speed, stop_after)
    monkeypatch.setattr(time_budget.time, 'monotonic', lambda: clock.now)
    schedule = dict(
        type='CosineAnnealingLR', begin=begin, end=epochs, T_max=epochs - begin, eta_min_ratio=0.01, by_epoch=True
    )
    cfg = Config(dict(train_cfg=dict(by_epoch=True, max_epochs=epochs, val_interval=epochs // 2)))
    loader = dict(
        batch_size=1,
        num_workers=0,
        dataset=[dict(inputs=torch.zeros(1))] * ITERATIONS,
        sampler=dict(type='DefaultSampler', shuffle=False),
    )
    runner = DetectionRunner(
        Toy(),
        str(folder),
        train_dataloader=loader,
        val_dataloader=dict(loader, dataset=loader['dataset'][:1]),
        train_cfg=cfg.train_cfg.copy(),
        val_cfg=dict(),
        val_evaluator=[Metric()],
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=1.0)),
        param_scheduler=[dict(schedule, convert_to_iter_based=True)],
        custom_hooks=[clock, dict(type='msda_plugin.TimeBudgetHook', minutes=seconds / 60, val_epochs=VALIDATION / 4)],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
        resume=resume,
        cfg=cfg,
        experiment_name=f'{folder.name}_{resume}',
    )
    if stop_after is None:
        runner.train()
    else:
        with pytest.raises(KeyboardInterrupt):
            runner.train()
    return clock, runner


def test_a_right_plan_stays(tmp_path, monkeypatch):
    clock, runner = train(tmp_path, monkeypatch, lambda epoch: 1.0, seconds=87)
    assert runner.epoch == 20 and clock.now - 1000 == 86.0 and clock.validated == [10, 20]


@pytest.mark.parametrize('begin', [0, 10])
@pytest.mark.parametrize(
    'speed, fewest, most',
    [
        (lambda epoch: 0.25, 60, 100),
        (lambda epoch: 3.0, 6, 8),
        (lambda epoch: 1.0 if epoch < 8 else 2.0, 12, 15),
        (lambda epoch: 2.0 if epoch < 8 else 0.5, 16, 30),
        (lambda epoch: 1.0 + (epoch % 3) / 2, 12, 18),
    ],
    ids=('faster', 'slower', 'slower-later', 'faster-later', 'varying'),
)
def test_ends_in_time_with_a_complete_schedule(tmp_path, monkeypatch, speed, fewest, most, begin):
    clock, runner = train(tmp_path, monkeypatch, speed, begin=begin)
    assert fewest <= runner.epoch <= most
    assert clock.validated[-1] == runner.epoch
    longest = max(ITERATIONS * speed(epoch) for epoch in range(runner.epoch))
    assert 100 - longest - VALIDATION <= clock.now - 1000 <= 100 + (longest if fewest == 12 else 0)
    rates = clock.rates
    assert max(rates) == rates[0] == 1.0 and rates[-1] < 0.1
    assert all(later <= earlier + 1e-9 for earlier, later in zip(rates, rates[1:], strict=False))
    assert runner.train_loop.max_iters == len(rates) == ITERATIONS * runner.epoch


def test_time_for_less_than_an_epoch(tmp_path, monkeypatch):
    clock, runner = train(tmp_path, monkeypatch, lambda epoch: 100.0)
    assert runner.epoch == 1 and clock.validated == [1]


def test_resumed_training_has_the_time_that_is_left(tmp_path, monkeypatch):
    first, _ = train(tmp_path, monkeypatch, lambda epoch: 2.0, stop_after=6)
    second, runner = train(tmp_path, monkeypatch, lambda epoch: 2.0, resume=True)
    used = (first.now - 1000) + (second.now - 1000)
    assert 100 - 8 - 2 * VALIDATION <= used <= 100 and runner.epoch == len(first.rates + second.rates) // ITERATIONS
    assert second.rates[0] < first.rates[-1] and second.rates[-1] < 0.1


def test_more_minutes_for_a_finished_training(tmp_path, monkeypatch):
    _, before = train(tmp_path, monkeypatch, lambda epoch: 1.0, seconds=50)
    clock, runner = train(tmp_path, monkeypatch, lambda epoch: 1.0, seconds=100, resume=True)
    assert runner.epoch > before.epoch and clock.now - 1000 <= 51


def test_wrong_use(tmp_path):
    assert ROOT_HOOKS.get('msda_plugin.TimeBudgetHook') is TimeBudgetHook
    with pytest.raises(ValueError, match='minutes must be positive, got 0'):
        TimeBudgetHook(minutes=0)
