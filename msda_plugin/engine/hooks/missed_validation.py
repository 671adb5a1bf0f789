"""Runs a validation that was due when the resumed training was killed."""

from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner

from msda_plugin.registry import HOOKS

LAST_VALIDATION = 'last_validation'  # entry of the message hub: the iteration


def forget_validation(runner: Runner) -> None:
    """Let `MissedValidationHook` repeat the last validation, because its result was lost."""
    runner.message_hub.pop_info(LAST_VALIDATION, None)


@HOOKS.register_module()
class MissedValidationHook(Hook):
    """Runs a validation that was due at the resumed checkpoint, but not finished when the training was killed.

    It runs before the first epoch, or before the end if no epoch is left. `msda_plugin.DetectionRunner` adds this hook;
    ``default_hooks = dict(missed_validation=None)`` switches it off.
    """

    priority = 'VERY_HIGH'  # before CheckpointHook, which saves the message hub after a validation

    def __init__(self) -> None:
        self._done = False

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        runner.message_hub.update_info(LAST_VALIDATION, runner.iter)

    def before_train_epoch(self, runner: Runner) -> None:
        if not self._done and self._missed(runner):
            runner.logger.info('The training was killed before a validation, which runs now.')
            runner.val_loop.run()
        self._done = True

    after_train = before_train_epoch

    @staticmethod
    def _missed(runner: Runner) -> bool:
        loop = runner.train_loop
        if not (
            runner._resume
            and runner.iter
            and runner.val_loop is not None
            and isinstance(loop, (EpochBasedTrainLoop, IterBasedTrainLoop))
        ):
            return False
        by_epoch = isinstance(loop, EpochBasedTrainLoop)
        done, last = (loop.epoch, loop.max_epochs) if by_epoch else (loop.iter, loop.max_iters)
        loop._decide_current_val_interval()
        due = done >= loop.val_begin and (done % loop.val_interval == 0 or done == last)
        return due and runner.message_hub.runtime_info.get(LAST_VALIDATION) != runner.iter
