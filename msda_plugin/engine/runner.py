"""MMEngine's runner, with what a config says checked before anything is built from it."""

import logging
import weakref
from collections.abc import Callable, Iterator
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
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch import nn

from msda_plugin import compat
from msda_plugin.engine.checkpoint_files import FULL, DiskFullError, atomic_write, is_whole, latest_whole_checkpoint
from msda_plugin.engine.config_check import check_schedule, check_weights
from msda_plugin.engine.data_check import check_config_data
from msda_plugin.registry import RUNNERS

STOCK_CHECKPOINT_HOOK = ('CheckpointHook', 'mmengine.CheckpointHook', mmengine.hooks.CheckpointHook)
VALIDATED = 'last_validation'  # in the message hub: the iteration of it
DATA_FIELDS = tuple(f'{split}_{part}' for split in ('train', 'val', 'test') for part in ('dataloader', 'evaluator'))


def propagate_data_root(cfg: Config) -> None:
    """Make a changed ``data_root`` reach the data sets and evaluators, in place.

    A config uses its ``data_root`` to write them when it is parsed; a value given later (``--cfg-options
    data_root=DIR``, a config that inherits, an edited copy of a config that a training left) reaches none of them. Here
    every path under the old root gets the new one. The old root is the one that all data sets share, or else the one
    that the config file names.

    Raises:
        ValueError: the data sets have several roots, and none is plainly the one to replace.
    """
    new = cfg.get('data_root')
    roots = {root for field in DATA_FIELDS for root in _find(cfg.get(field), 'data_root')}
    if not new or not roots or new.rstrip('/') in {root.rstrip('/') for root in roots}:
        return
    if len(roots) > 1 and cfg.filename and Path(cfg.filename).is_file():
        roots &= {Config.fromfile(cfg.filename).get('data_root')}
    if len(roots) != 1:
        raise ValueError(
            f"data_root is '{new}', but the data sets of the config start from several other folders; set "
            'the data_root of each data set, such as train_dataloader.dataset.data_root'
        )
    [old] = roots
    for field in DATA_FIELDS:
        if cfg.get(field) is not None:
            cfg[field] = _move(cfg[field], old.rstrip('/'), new.rstrip('/'))


def propagate_max_epochs(cfg: Config) -> None:
    """Make a changed number of epochs reach the training loop and the schedules, in place.

    ``--cfg-options train_cfg.max_epochs=N`` alone leaves the learning rate on the schedule of the old number, and
    ``max_epochs=N``, where a config has such a field, changes nothing at all. Here both change the loop, and the
    schedules by epoch are stretched to it; unless those were changed as well.
    """
    if not cfg.filename or not Path(cfg.filename).is_file() or not (cfg.get('train_cfg') or {}).get('max_epochs'):
        return
    written = Config.fromfile(cfg.filename)
    if not (written.get('train_cfg') or {}).get('max_epochs'):
        return
    old, new = written.train_cfg.max_epochs, cfg.train_cfg.max_epochs
    if new == old and cfg.get('max_epochs') != written.get('max_epochs'):
        new = cfg.max_epochs
    if new == old:
        return
    cfg.train_cfg.max_epochs = new
    if 'max_epochs' in cfg:
        cfg.max_epochs = new
    if cfg.get('param_scheduler') == written.get('param_scheduler'):
        schedulers = cfg.get('param_scheduler') or []
        for scheduler in schedulers if isinstance(schedulers, (list, tuple)) else [schedulers]:
            if scheduler.get('by_epoch', True):
                _stretch(scheduler, new / old)


def _stretch(scheduler: dict, ratio: float) -> None:
    """Scale the epochs of a schedule; its end stays after its beginning, and a decay has a length."""
    if scheduler.get('milestones'):
        scheduler['milestones'] = [max(1, round(ratio * epoch)) for epoch in scheduler['milestones']]
    begin, end = scheduler.get('begin', 0), scheduler.get('end')
    if end is not None:
        scheduler['end'] = max(1, round(ratio * end))
        scheduler['begin'] = min(round(ratio * begin), scheduler['end'] - 1)
    elif begin:
        scheduler['begin'] = int(ratio * begin)
    if scheduler.get('T_max'):
        scheduler['T_max'] = max(1, round(ratio * (begin + scheduler['T_max'])) - scheduler.get('begin', 0))


def _find(node: object, key: str) -> Iterator[str]:
    """Every value of `key` in nested dicts and lists."""
    if isinstance(node, dict):
        if node.get(key):
            yield node[key]
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for child in node:
            yield from _find(child, key)


def _move(node: object, old: str, new: str) -> object:
    """`node` with `new` instead of `old` in every path at or under `old`."""
    if isinstance(node, str):
        return new + node[len(old) :] if node == old or node.startswith(f'{old}/') else node
    if isinstance(node, dict):
        for key, value in node.items():
            node[key] = _move(value, old, new)
        return node
    if isinstance(node, (list, tuple)):
        return type(node)(_move(value, old, new) for value in node)
    return node


def _close_files(logger: MMLogger) -> None:
    for handler in [handler for handler in logger.handlers if isinstance(handler, logging.FileHandler)]:
        logger.removeHandler(handler)
        handler.close()


@RUNNERS.register_module()
class DetectionRunner(Runner):
    """The runner of this project's configs: ``runner_type = 'msda_plugin.DetectionRunner'``.

    A changed ``data_root`` reaches every data set and evaluator, a changed number of epochs the schedules, and data is
    checked before it is used: training and validation data when a training starts, test data when a test does. A field
    ``device`` of the config, such as 'cpu' or 'cuda:1', chooses another device than MMEngine would. With
    ``launcher='pytorch'`` and no GPU the processes meet over gloo.

    A training survives being killed. Checkpoints on a local disk are whole or not there, by `atomic_write` and
    `msda_plugin.CheckpointHook`, which is taken for MMEngine's; resuming goes on from the last whole one, and first
    makes up for a validation that was cut off. By `msda_plugin.EpochSeedHook`, which is added, a resumed training ends
    with the weights of one without a break, bit for bit where the kernels are deterministic, as those of the CPU are.
    """

    @classmethod
    def from_cfg(cls, cfg: Config) -> 'DetectionRunner':
        propagate_data_root(cfg)
        propagate_max_epochs(cfg)
        return super().from_cfg(cfg)

    def setup_env(self, env_cfg: dict) -> None:
        """Set up processes and their group; MMEngine's launcher presumes a GPU for each process."""
        compat.accept_sides_of_one_pixel()
        if self._launcher == 'pytorch' and get_device() == 'cpu' and not is_distributed():
            options = {key: value for key, value in env_cfg.get('dist_cfg', {}).items() if key != 'backend'}
            if 'timeout' in options:
                options['timeout'] = timedelta(seconds=options['timeout'])
            torch.distributed.init_process_group('gloo', **options)
        super().setup_env(env_cfg)

    def build_logger(self, log_level: int | str = 'INFO', log_file: str | None = None, **kwargs) -> MMLogger:
        """Build the logger; its file is closed when the runner is gone, which MMEngine leaves to the process's end."""
        logger = super().build_logger(log_level, log_file, **kwargs)
        weakref.finalize(self, _close_files, logger)
        return logger

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        if self.distributed and model_wrapper_cfg is None and get_device() == 'cpu':
            return MMDistributedDataParallel(
                model, broadcast_buffers=False, find_unused_parameters=self.cfg.get('find_unused_parameters', False)
            )
        device = self.cfg.get('device')
        if device and not self.distributed:
            if device.startswith('cuda'):
                torch.cuda.set_device(device)  # what MMEngine then means by 'cuda'
            else:
                return model.to(device)
        return super().wrap_model(model_wrapper_cfg, model)

    def build_train_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Build the training loop, which the schedule must fit.

        Raises:
            ValueError: It has no iteration, or fewer than the schedule needs.
        """
        loop = super().build_train_loop(loop)
        check_schedule(self.cfg, loop)
        return loop

    def register_default_hooks(self, hooks: dict[str, Hook | dict | None] | None = None) -> None:
        """Register MMEngine's default hooks, with our ``CheckpointHook`` for its own, and ``EpochSeedHook``."""
        hooks = dict(hooks or {})
        checkpoint = hooks.get('checkpoint', dict(type='CheckpointHook', interval=1))
        if isinstance(checkpoint, dict) and checkpoint.get('type') in STOCK_CHECKPOINT_HOOK:
            hooks['checkpoint'] = dict(checkpoint, type='msda_plugin.CheckpointHook')
        super().register_default_hooks(hooks)
        self.register_hook(dict(type='msda_plugin.EpochSeedHook'))

    def call_hook(self, fn_name: str, **kwargs) -> None:
        """Call this method of every hook; after ``before_train`` of the last one, run the validation that is due."""
        if fn_name == 'after_val_epoch':
            self.message_hub.update_info(VALIDATED, self.iter)
        super().call_hook(fn_name, **kwargs)
        if fn_name == 'before_train' and self._missed_validation():
            self.logger.info('The training was resumed from before a validation, which is run now.')
            self.val_loop.run()

    def _missed_validation(self) -> bool:
        """Whether the checkpoint that was resumed is from before the validation that follows it."""
        loop = self.train_loop
        if not (
            self._resume
            and self.iter
            and self.val_loop is not None
            and isinstance(loop, (EpochBasedTrainLoop, IterBasedTrainLoop))
        ):
            return False
        by_epoch = isinstance(loop, EpochBasedTrainLoop)
        done, last = (loop.epoch, loop.max_epochs) if by_epoch else (loop.iter, loop.max_iters)
        loop._decide_current_val_interval()
        due = done >= loop.val_begin and (done % loop.val_interval == 0 or done == last)
        return due and self.message_hub.runtime_info.get(VALIDATED) != self.iter

    @master_only
    def save_checkpoint(
        self,
        out_dir: str,
        filename: str,
        file_client_args: dict | None = None,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        meta: dict | None = None,
        by_epoch: bool = True,
        backend_args: dict | None = None,
    ) -> None:
        """Save a checkpoint, as MMEngine does; on a local disk its file is whole or not there."""
        arguments = dict(
            save_optimizer=save_optimizer, save_param_scheduler=save_param_scheduler, meta=meta, by_epoch=by_epoch
        )
        if file_client_args or backend_args or '://' in str(out_dir):
            super().save_checkpoint(out_dir, filename, file_client_args, backend_args=backend_args, **arguments)
        else:
            with atomic_write(Path(out_dir, filename)) as unfinished:
                super().save_checkpoint(out_dir, unfinished.name, **arguments)

    def find_resumed(self) -> str | None:
        """The checkpoint that will be resumed, if any: the named one, or the last whole one of the work dir.

        Raises:
            ValueError: the named one is not whole, or there are some in the work dir and none of them is.
        """
        if not self._resume:
            return None
        if self._load_from is not None:
            if Path(self._load_from).is_file() and not is_whole(self._load_from):
                raise ValueError(
                    f'the checkpoint {self._load_from} is not whole: its end is missing, or it is '
                    'damaged; resume from another one'
                )
            return self._load_from
        patterns = [
            hook.filename_tmpl.format('*') for hook in self.hooks if isinstance(hook, mmengine.hooks.CheckpointHook)
        ]
        self._load_from, broken = latest_whole_checkpoint(self.work_dir, patterns[0] if patterns else '*.pth')
        if broken:
            self.logger.warning(
                f'{", ".join(broken)} cannot be resumed, since not whole or not there: the training '
                f'goes on from {self._load_from} instead'
            )
        return self._load_from

    def check_data(self, *splits: str) -> None:
        """Check the data sets of these splits ('train', 'val', 'test'), each once.

        Raises:
            FileNotFoundError: a data root, an annotation file or images that are not there.
            ValueError: an annotation file that is not COCO, classes that it does not have, or a head for another
                number of classes.
        """
        checked = self.__dict__.setdefault('_checked_splits', set())
        check_config_data(self.cfg, [split for split in splits if split not in checked])
        checked.update(splits)

    def load_or_resume(self) -> None:
        """Load or resume the checkpoint: the one that is named, or the last whole one of the work dir.

        Raises:
            ValueError: it is for another number of classes, and a training is resumed from it or it is evaluated. Only
                a new training can start from it (`msda_plugin.heads.set_prediction`). Or no checkpoint that can be
                resumed is whole.
        """
        self.find_resumed()
        super().load_or_resume()
        new = [name for module in self.model.modules() for name in getattr(module, 'new_class_layers', ())]
        if new and (self._resume or not isinstance(self._train_loop, BaseLoop)):
            raise ValueError(
                f'the checkpoint is for another number of classes ({", ".join(new)} do not fit), and can '
                'neither be resumed nor evaluated: fine-tune from it with load_from and resume=False, or '
                'set num_classes to what it was trained with'
            )

    def resume(
        self,
        filename: str,
        resume_optimizer: bool = True,
        resume_param_scheduler: bool = True,
        map_location: str | Callable = 'default',
    ) -> None:
        """Resume a checkpoint, as MMEngine does, and with it the order of the data where the config gives no seed."""
        super().resume(filename, resume_optimizer, resume_param_scheduler, map_location)
        # The data loader was built before the seed was known, where the config gives none.
        sampler = self.train_dataloader.sampler
        if getattr(sampler, 'seed', None) is not None and not self._randomness_cfg.get('diff_rank_seed'):
            sampler.seed = self.seed

    def train(self) -> nn.Module:
        """Train.

        Raises:
            DiskFullError: Nothing more can be written; says what is kept.
        """
        self.check_data('train', 'val')
        check_weights(self.cfg)
        try:
            return super().train()
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise DiskFullError(self._disk_full(error)) from None

    def _disk_full(self, error: OSError) -> str:
        record = Path(self.work_dir, 'last_checkpoint')
        known = self.message_hub.runtime_info.get('last_ckpt')  # of this training, or of the one that it resumed
        last = record.read_text().strip() if known and record.is_file() else ''
        kept = (
            f'the last checkpoint, {last}, is whole: free some space, and go on from it with --resume'
            if last
            else 'there is no checkpoint yet: free some space, or name another folder with --work-dir'
        )
        return f'{error.filename or self.work_dir} cannot be written ({error.strerror}); {kept}'

    def val(self) -> dict:
        self.check_data('val')
        return super().val()

    def test(self) -> dict:
        self.check_data('test')
        return super().test()
