"""MMEngine's runner with checks of data, weights and schedule, and trainings that survive being killed."""

import logging
import weakref
from datetime import timedelta
from pathlib import Path

import mmengine.hooks
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import is_distributed, master_only
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.model import MMDistributedDataParallel
from mmengine.runner import BaseLoop, Runner
from torch import nn

from msda_plugin import compat
from msda_plugin.acceleration import keep_freed_memory
from msda_plugin.engine.broken_image import broken_image_error
from msda_plugin.engine.checkpoint_files import check_classes, checkpoint_to_resume, disk_full_error, last_checkpoint
from msda_plugin.engine.config_check import check_schedule, check_weights
from msda_plugin.engine.data_check import check_config_data
from msda_plugin.engine.data_root import propagate_data_root
from msda_plugin.engine.hooks.console import hush, quietly
from msda_plugin.engine.hooks.skip_non_finite import SkipNonFiniteHook
from msda_plugin.engine.resumed_schedule import extend_schedule, warn_of_the_rest
from msda_plugin.files import FULL, atomic_write
from msda_plugin.registry import RUNNERS

STOCK_CHECKPOINT_HOOK = ('CheckpointHook', 'mmengine.CheckpointHook', mmengine.hooks.CheckpointHook)
DEFAULT_HOOKS = dict(
    console=dict(type='msda_plugin.ConsoleHook'),
    fine_tuning=dict(type='msda_plugin.FineTuningHook'),
    epoch_seed=dict(type='msda_plugin.EpochSeedHook'),
    missed_validation=dict(type='msda_plugin.MissedValidationHook'),
    skip_non_finite=dict(type='msda_plugin.SkipNonFiniteHook'),
)


def _close_files(logger: MMLogger) -> None:
    for handler in [handler for handler in logger.handlers if isinstance(handler, logging.FileHandler)]:
        logger.removeHandler(handler)
        handler.close()


@RUNNERS.register_module()
class DetectionRunner(Runner):
    """The runner of msda_plugin's configs: ``runner_type = 'msda_plugin.DetectionRunner'``.

    - Data, initial weights and schedule are checked before anything is loaded.
    - ``--cfg-options data_root=DIR`` applies to every dataset and evaluator.
    - The config field ``device`` ('cpu', 'cuda:1') selects the device. With ``launcher='pytorch'`` and no GPU the
      processes communicate with gloo.
    - On a CPU, the process keeps freed memory for the next tensors (`keep_freed_memory`).
    - The config is written to the work dir when a training starts. A test or validation leaves the work dir's config
      as it is.
    - Checkpoints on a local disk are written atomically; `msda_plugin.CheckpointHook` replaces MMEngine's. Resuming
      uses the last complete checkpoint, which must have the classes of the training data. The config in the work dir
      and in the checkpoints says how the training started: ``resume`` and ``load_from`` are those of the config file.
    - A resumed training that is longer than its schedule logs the learning rate it goes on with. With
      ``extends_schedule`` the schedule starts anew, without its warm-up, and covers the remaining epochs.
    - Four hooks are added: `FineTuningHook`, `EpochSeedHook`, `MissedValidationHook` and `SkipNonFiniteHook`.
      ``default_hooks = dict(epoch_seed=None)`` switches off the second one; ``fine_tuning``, ``missed_validation`` and
      ``skip_non_finite`` likewise.
    - The console shows one line an epoch (`ConsoleHook`), warnings, and messages of other code; the log file has
      everything. ``verbose = True`` in the config prints what is in the log file.
    - Checkpoints are read without running code from them (`msda_plugin.compat.load_checkpoints_strictly`), and mmcv
      accepts images that are one pixel wide. `msda_plugin.compat.restore` undoes both.
    """

    as_written: Config | None = None  # the config as its file has it, without command-line options
    verbose = False  # whether the console shows what is in the log file
    extends_schedule = False
    _starts_training = False

    @classmethod
    def from_cfg(cls, cfg: Config) -> 'DetectionRunner':
        compat.import_mmdet()
        as_written = Config.fromfile(cfg.filename) if cfg.filename and Path(cfg.filename).is_file() else None
        propagate_data_root(cfg, as_written)
        runner = super().from_cfg(cfg)
        runner.as_written = as_written
        if runner.verbose:  # the choice of a command, not of the trainings and tests from its config
            runner.cfg.verbose = (as_written or Config()).get('verbose', False)
        if cfg.get('resume'):
            start = as_written or Config()
            runner.cfg.resume, runner.cfg.load_from = start.get('resume', False), start.get('load_from')
        return runner

    def setup_env(self, env_cfg: dict) -> None:
        """Set up the processes; MMEngine's launcher requires a GPU for each of them."""
        if (self.cfg.get('device') or get_device()) == 'cpu':
            keep_freed_memory()
        if self._launcher == 'pytorch' and get_device() == 'cpu' and not is_distributed():
            options = {key: value for key, value in env_cfg.get('dist_cfg', {}).items() if key != 'backend'}
            if 'timeout' in options:
                options['timeout'] = timedelta(seconds=options['timeout'])
            torch.distributed.init_process_group('gloo', **options)
        super().setup_env(env_cfg)

    def build_logger(self, log_level: int | str = 'INFO', log_file: str | None = None, **kwargs) -> MMLogger:
        """Build the logger, whose file is closed with the runner, and install the replacements."""
        logger = super().build_logger(log_level, log_file, **kwargs)
        weakref.finalize(self, _close_files, logger)
        self.verbose = bool(self.cfg.get('verbose'))
        if not self.verbose:
            hush(logger)
        compat.load_checkpoints_strictly()
        compat.accept_sides_of_one_pixel()
        logger.info(
            'MMEngine now loads checkpoints with msda_plugin.safe_loading, which refuses code in them.',
            extra=dict(console=False),
        )
        return logger

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        if self.distributed and model_wrapper_cfg is None and get_device() == 'cpu':
            return MMDistributedDataParallel(
                model, broadcast_buffers=False, find_unused_parameters=self.cfg.get('find_unused_parameters', False)
            )
        device = self.cfg.get('device')
        if device and not self.distributed:
            if device.startswith('cuda'):
                # MMEngine moves the model to 'cuda', the current device.
                torch.cuda.set_device(torch.device(device).index or 0)
            else:
                return model.to(device)
        return super().wrap_model(model_wrapper_cfg, model)

    @quietly
    def build_train_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Build the training loop and check that the schedule fits it (`check_schedule`)."""
        loop = super().build_train_loop(loop)
        resumed = bool(self._resume and (self._load_from or last_checkpoint(self.work_dir)))
        check_schedule(self.cfg, loop, self.as_written, resumed=resumed)
        return loop

    @quietly
    def build_val_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        return super().build_val_loop(loop)

    @quietly
    def build_test_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        return super().build_test_loop(loop)

    def register_default_hooks(self, hooks: dict[str, Hook | dict | None] | None = None) -> None:
        hooks = {**DEFAULT_HOOKS, **(dict(console=None) if self.verbose else {}), **(hooks or {})}
        checkpoint = hooks.get('checkpoint', dict(type='CheckpointHook', interval=1))
        if isinstance(checkpoint, dict) and checkpoint.get('type') in STOCK_CHECKPOINT_HOOK:
            hooks['checkpoint'] = dict(checkpoint, type='msda_plugin.CheckpointHook')
        super().register_default_hooks({k: hook for k, hook in hooks.items() if hook or k not in DEFAULT_HOOKS})

    @master_only
    def save_checkpoint(
        self, out_dir: str, filename: str, file_client_args: dict | None = None, *, backend_args=None, **options
    ) -> None:
        """Save a checkpoint as MMEngine does; atomically on a local disk."""
        if file_client_args or backend_args or '://' in str(out_dir):
            super().save_checkpoint(out_dir, filename, file_client_args, backend_args=backend_args, **options)
        else:
            with atomic_write(Path(out_dir, filename)) as unfinished:
                super().save_checkpoint(out_dir, unfinished.name, **options)

    def find_resumed(self) -> str | None:
        """The checkpoint to resume, or None; ValueError if there are checkpoints, but none is complete."""
        if self._resume:
            hooks = [hook for hook in self.hooks if isinstance(hook, mmengine.hooks.CheckpointHook)]
            pattern = hooks[0].filename_tmpl.format('*') if hooks else '*.pth'
            self._load_from = checkpoint_to_resume(self, pattern)
            local = self._load_from and '://' not in self._load_from
            if local and self._train_loop is not None and self.__dict__.get('_checked') != self._load_from:
                check_classes(self._load_from, getattr(self.train_dataloader.dataset, 'metainfo', {}).get('classes'))
                self._checked = self._load_from
        return self._load_from if self._resume else None

    def load_or_resume(self) -> None:
        """Load or resume the checkpoint of the config.

        Raises:
            ValueError: If the checkpoint to resume is incomplete, has other classes than the training data, or leaves
                nothing to extend with ``extends_schedule``.
        """
        self.find_resumed()
        super().load_or_resume()
        if self._resume and self._starts_training and self.extends_schedule:
            extend_schedule(self)
        elif self._resume and self._starts_training:
            warn_of_the_rest(self)

    @master_only
    def dump_config(self) -> None:
        """Write the config to the work dir if a training starts; MMEngine also calls this before tests."""
        if self._starts_training:
            name = Path(self.cfg.filename).name if self.cfg.filename else f'{self.timestamp}.py'
            with atomic_write(Path(self.work_dir, name)) as unfinished:
                unfinished.write_text(self.cfg.dump(), encoding='utf-8')

    def check_data(self, *splits: str) -> None:
        """Check the datasets of these splits ('train', 'val', 'test') with `check_config_data`, each once."""
        checked = self.__dict__.setdefault('_checked_splits', set())
        check_config_data(self.cfg, [split for split in splits if split not in checked])
        checked.update(splits)

    @quietly
    def train(self) -> nn.Module:
        """Write the config to the work dir and train.

        Raises:
            TrainingStopped: If the disk is full (`DiskFullError`), an image cannot be read (`BrokenImageError`), or
                losses or gradients stay NaN or infinite (`NonFiniteError`).
        """
        self.check_data('train', 'val')
        check_weights(dict(model=self.cfg.get('model'), load_from=self._load_from))
        self._starts_training = True
        try:
            self.dump_config()
            return super().train()
        except Exception as error:
            if isinstance(error, OSError) and error.errno in FULL:
                raise disk_full_error(self, error) from None
            broken = broken_image_error(self, error)
            if broken is None:
                raise
            raise broken from None
        finally:
            for hook in self.hooks:
                if isinstance(hook, SkipNonFiniteHook):
                    hook.close()

    @quietly
    def val(self) -> dict:
        self.check_data('val')
        return super().val()

    @quietly
    def test(self) -> dict:
        self.check_data('test')
        return super().test()
