"""Ends a training in time, on a machine whose speed varies."""

import math
import time

from mmengine.dist import broadcast_object_list
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, Runner

from msda_plugin.registry import HOOKS

STATE = 'time_budget'  # entry of the message hub
RECENT = 3  # epochs whose speed counts


@HOOKS.register_module()
class TimeBudgetHook(Hook):
    """Ends a training within a number of minutes, with its learning rate schedule complete.

    ``max_epochs`` and ``param_scheduler`` of the config are the plan for the speed that was measured before the
    training. After every epoch, the hook counts the epochs that still fit into the time, at the speed of the last
    three, with their validations, and moves the end of the training and of the schedules that end with it. An epoch is
    the smallest unit, so a training may end up to one epoch early.

    The time runs from the first iteration to the end of the last validation. A resumed training goes on with the time
    that is left.

    Args:
        minutes: Minutes that the training may take.
        val_epochs: Expected duration of a validation, in epochs, until the first one is measured.

    Raises:
        ValueError: If ``minutes`` is not positive, or if the training has no ``EpochBasedTrainLoop``.
    """

    priority = 'VERY_HIGH'  # before CheckpointHook, which asks whether an epoch is the last one

    def __init__(self, minutes: float, val_epochs: float = 0.0) -> None:
        if not 0 < minutes < math.inf:
            raise ValueError(f'minutes must be positive, got {minutes}')
        self.minutes = minutes
        self.val_epochs = val_epochs
        self._used = 0.0  # seconds, before a resume
        self._resumed: int | None = None  # epochs that a resumed training was to have
        self._recent: list[float] = []  # seconds of epochs
        self._val_start: float | None = None  # of a validation after the last epoch
        self._validating = 0.0  # its seconds

    def before_train(self, runner: Runner) -> None:
        if not isinstance(runner.train_loop, EpochBasedTrainLoop):
            raise ValueError(f'TimeBudgetHook needs an EpochBasedTrainLoop, got {type(runner.train_loop).__name__}')
        if self._resumed is not None:
            _move_schedules(runner, self._resumed, runner.max_epochs)
            self._resumed = None
        self._last = time.monotonic()
        self._start = self._last - self._used

    def before_val_epoch(self, runner: Runner) -> None:
        self._val_start = time.monotonic()

    def before_train_epoch(self, runner: Runner) -> None:
        if self._val_start is not None and self._recent:  # with what other hooks did after the validation
            self._validating = time.monotonic() - self._val_start
            self.val_epochs = self._validating / self._epoch()
            self._val_start = None

    def after_train_epoch(self, runner: Runner) -> None:
        now = time.monotonic()
        self._recent = [*self._recent, now - self._last - self._validating][-RECENT:]
        self._last, self._validating = now, 0.0
        loop, done, seconds = runner.train_loop, runner.epoch + 1, self._epoch()
        agreed = [done + self._fitting(now - self._start, seconds, done, loop.val_interval)]
        broadcast_object_list(agreed)  # of the first process
        (epochs,) = agreed
        if epochs != loop.max_epochs:
            runner.logger.info(
                f'time budget: {epochs} epochs instead of {loop.max_epochs}, at {seconds:.1f} seconds an epoch',
                extra=dict(console=False),
            )
            _move_schedules(runner, loop.max_epochs, epochs)
            _set_length(loop, epochs)
        state = dict(seconds=now - self._start, epochs=epochs, epoch=seconds, val_epochs=self.val_epochs)
        runner.message_hub.update_info(STATE, state)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        state = checkpoint.get('message_hub', {}).get('runtime_info', {}).get(STATE)
        if not (runner._resume and state and isinstance(runner._train_loop, EpochBasedTrainLoop)):
            return
        # Now, so that messages about the resumed schedule are right.
        loop, done = runner.train_loop, checkpoint['meta']['epoch']
        self._used, self._resumed, self.val_epochs = state['seconds'], state['epochs'], state['val_epochs']
        _set_length(loop, done + self._fitting(self._used, state['epoch'], done, loop.val_interval))

    def _epoch(self) -> float:
        return max(sum(self._recent) / len(self._recent), 1e-6)  # seconds

    def _fitting(self, used: float, epoch: float, done: int, interval: int) -> int:
        """Number of epochs that still fit, with their validations and that after epoch ``done``."""
        left = (60 * self.minutes - used) / epoch
        fitting = 0
        while True:
            # Validations before the next epoch and after it, which may be the last one.
            validations = (done + fitting) // interval - (done - 1) // interval + 1
            if left < fitting + 1 + validations * self.val_epochs:
                return fitting
            fitting += 1


def _set_length(loop: EpochBasedTrainLoop, epochs: int) -> None:
    loop._max_epochs, loop._max_iters = epochs, epochs * len(loop.dataloader)


def _move_schedules(runner: Runner, before: int, epochs: int) -> None:
    """Let the schedules that end after epoch ``before`` end after ``epochs``; the begin of those that run stays."""
    for scheduler in runner.param_schedulers:
        length = 1 if scheduler.by_epoch else len(runner.train_dataloader)
        if scheduler.end != before * length:
            continue
        if scheduler._global_step < scheduler.begin:
            scheduler.begin = max(scheduler._global_step + 1, round(scheduler.begin * epochs / before))
        scheduler.end = max(epochs * length, scheduler.begin + 1)
        if hasattr(scheduler, 'T_max'):
            scheduler.T_max = scheduler.end - scheduler.begin
