"""Ctrl-C stops a training between two iterations, never while a checkpoint is written."""

import os
import signal
import sys

from mmengine.hooks import Hook
from mmengine.runner import Runner

from msda_plugin.engine.checkpoint_files import last_checkpoint_of

INTERRUPTED = 130  # exit status after Ctrl-C, by the convention of shells


class _StopHook(Hook):
    """Raises ``KeyboardInterrupt`` after the current iteration once ``requested`` is set."""

    requested = False

    def _stop(self, *args, **kwargs) -> None:
        if self.requested:
            raise KeyboardInterrupt

    # With the lowest priority, these run after CheckpointHook.
    after_train_iter = after_train_epoch = after_val_iter = after_val_epoch = _stop


def train(runner: Runner) -> int:
    """Run ``runner.train()``; the first Ctrl-C stops it after the iteration, the second one immediately.

    Returns:
        The exit status: 0, or 130 after Ctrl-C, when a sentence on standard error says how to resume.
    """
    stop, process = _StopHook(), os.getpid()
    runner.register_hook(stop, priority='LOWEST')

    def request(number: int, frame: object) -> None:
        if os.getpid() != process:  # a data-loading worker, which inherits the handler
            return
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        print('\nCtrl-C: stopping after this iteration; again to stop immediately.', file=sys.stderr, flush=True)

    previous = signal.signal(signal.SIGINT, request)
    try:
        runner.train()
    except (KeyboardInterrupt, Exception):  # a worker that Ctrl-C killed raises another error
        if not stop.requested:
            raise
        print(f'msda_plugin train: {_message(runner)}', file=sys.stderr)
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, previous)
    return 0


def _message(runner: Runner) -> str:
    last = last_checkpoint_of(runner)
    return (
        f'stopped; the last checkpoint is {last}, and the same command with --resume resumes from it'
        if last
        else 'stopped; there is no checkpoint yet'
    )
