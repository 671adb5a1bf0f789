"""Keeps at least one complete checkpoint to resume from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mmengine.hooks
from mmengine.dist import is_main_process
from mmengine.runner import Runner

from msda_plugin.files import atomic_write, remove_unfinished
from msda_plugin.registry import HOOKS

OUTDATED = 'outdated_ckpts'  # entry of the message hub, which each checkpoint stores


@HOOKS.register_module()
class CheckpointHook(mmengine.hooks.CheckpointHook):
    """MMEngine's hook, with the same arguments and file names, for trainings that may be killed at any moment.

    - A superseded checkpoint (``max_keep_ckpts``, a former best one) is removed after the new one is written. If the
      training is killed in between, the next start removes it.
    - ``last_checkpoint`` is replaced atomically, after the checkpoint that it names is written.
    - The next start removes the unfinished files of a killed training.

    `msda_plugin.DetectionRunner` writes checkpoints atomically, and uses this hook instead of MMEngine's.
    """

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        # A killed training may have left them; paths in other folders belong to other trainings.
        outdated = [
            path
            for path in runner.message_hub.runtime_info.get(OUTDATED, ())
            if Path(path).parent == Path(self.out_dir)
        ]
        self.file_backend = _RemovesLater(self.file_backend, outdated)
        runner.message_hub.update_info(OUTDATED, self.file_backend.outdated)
        if is_main_process():
            for folder in (self.out_dir, runner.work_dir):
                remove_unfinished(folder)
            self.file_backend.remove_outdated()

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        self.file_backend.remove_outdated()

    def after_train_epoch(self, runner: Runner) -> None:
        super().after_train_epoch(runner)
        self.file_backend.remove_outdated()

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float]) -> None:
        super().after_val_epoch(runner, metrics)
        self.file_backend.remove_outdated()

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        """Save the checkpoint of this epoch or iteration, then name it in ``last_checkpoint``."""
        name = self.filename_tmpl.format(step)
        if self.max_keep_ckpts > 0 and step not in self.keep_ckpt_ids:
            if len(self.keep_ckpt_ids) == self.max_keep_ckpts and is_main_process():
                self.file_backend.remove(
                    self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(self.keep_ckpt_ids[0]))
                )
            self.keep_ckpt_ids.append(step)  # a deque of max_keep_ckpts, which drops the oldest
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process():
            with atomic_write(Path(runner.work_dir, 'last_checkpoint')) as unfinished:
                unfinished.write_text(self.last_ckpt)


class _RemovesLater:
    """A file backend of MMEngine that defers ``remove`` and ``rmtree`` until `remove_outdated`."""

    def __init__(self, backend: Any, outdated: Sequence[str]) -> None:
        self.backend = backend
        self.outdated = list(outdated)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def remove(self, path: str) -> None:
        self.outdated.append(path)

    rmtree = remove

    def remove_outdated(self) -> None:
        while self.outdated:
            path = self.outdated.pop()
            if self.backend.isfile(path):
                self.backend.remove(path)
            elif self.backend.isdir(path):
                self.backend.rmtree(path)
