"""Ctrl-C in a training: it ends between two iterations, never while a checkpoint is being written."""

import os
import signal
import sys
from pathlib import Path

from mmengine.hooks import Hook
from mmengine.runner import Runner

INTERRUPTED = 130  # the exit status of a command that Ctrl-C ended, by the shells' convention


class _StopHook(Hook):
    """Raises ``KeyboardInterrupt`` at the next place where nothing is half done, once ``requested`` is set."""

    requested = False

    def _stop(self, *args, **kwargs) -> None:
        if self.requested:
            raise KeyboardInterrupt

    # As lowest hook, each comes after the checkpoint of its moment is written.
    after_train_iter = after_train_epoch = after_val_iter = after_val_epoch = _stop


def train(runner: Runner) -> int:
    """``runner.train()``, which the first Ctrl-C ends after the iteration, and the second at once.

    Returns:
        The exit status: 0, or 130 after Ctrl-C, when a sentence on standard error says how to go on.
    """
    stop, process = _StopHook(), os.getpid()
    runner.register_hook(stop, priority='LOWEST')

    def request(number: int, frame: object) -> None:
        if os.getpid() != process:  # a worker of the data loader, which inherits this; the main process ends it
            return
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        print('\nCtrl-C: stopping after this iteration; once more stops at once.', file=sys.stderr, flush=True)

    previous = signal.signal(signal.SIGINT, request)
    try:
        runner.train()
    except (KeyboardInterrupt, Exception):  # a worker that Ctrl-C ended shows as some other error
        if not stop.requested:
            raise
        print(f'msda_plugin train: {_message(runner)}', file=sys.stderr)
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, previous)
    return 0


def _message(runner: Runner) -> str:
    known = runner.message_hub.runtime_info.get('last_ckpt')  # of this training, or of the one that it resumed
    record = Path(runner.work_dir, 'last_checkpoint')
    last = record.read_text().strip() if known and record.is_file() else ''
    return (
        f'stopped; the last checkpoint is {last}, and the same command with --resume goes on from it'
        if last
        else 'stopped; there is no checkpoint yet'
    )
