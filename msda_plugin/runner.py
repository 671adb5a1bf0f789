"""MMEngine's runner, with what a config says checked before anything is built from it."""
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import is_distributed
from mmengine.model import MMDistributedDataParallel
from mmengine.runner import BaseLoop, Runner
from torch import nn

from msda_plugin.data_check import check_config_data
from msda_plugin.registry import RUNNERS

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
        raise ValueError(f"data_root is '{new}', but the data sets of the config start from several other folders; set "
                         "the data_root of each data set, such as train_dataloader.dataset.data_root")
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
        return new + node[len(old):] if node == old or node.startswith(f'{old}/') else node
    if isinstance(node, dict):
        for key, value in node.items():
            node[key] = _move(value, old, new)
        return node
    if isinstance(node, (list, tuple)):
        return type(node)(_move(value, old, new) for value in node)
    return node


@RUNNERS.register_module()
class DetectionRunner(Runner):
    """The runner of this project's configs: ``runner_type = 'msda_plugin.DetectionRunner'``.

    A changed ``data_root`` reaches every data set and evaluator, a changed number of epochs the schedules, and data is
    checked before it is used: training and validation data when a training starts, test data when a test does. A field
    ``device`` of the config, such as 'cpu' or 'cuda:1', chooses another device than MMEngine would. With
    ``launcher='pytorch'`` and no GPU the processes meet over gloo.
    """

    @classmethod
    def from_cfg(cls, cfg: Config) -> 'DetectionRunner':
        propagate_data_root(cfg)
        propagate_max_epochs(cfg)
        return super().from_cfg(cfg)

    def setup_env(self, env_cfg: dict) -> None:
        """Set up processes and their group; MMEngine's launcher presumes a GPU for each process."""
        if self._launcher == 'pytorch' and get_device() == 'cpu' and not is_distributed():
            options = {key: value for key, value in env_cfg.get('dist_cfg', {}).items() if key != 'backend'}
            if 'timeout' in options:
                options['timeout'] = timedelta(seconds=options['timeout'])
            torch.distributed.init_process_group('gloo', **options)
        super().setup_env(env_cfg)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        if self.distributed and model_wrapper_cfg is None and get_device() == 'cpu':
            return MMDistributedDataParallel(
                model, broadcast_buffers=False,
                find_unused_parameters=self.cfg.get('find_unused_parameters', False))
        device = self.cfg.get('device')
        if device and not self.distributed:
            if device.startswith('cuda'):
                torch.cuda.set_device(device)  # what MMEngine then means by 'cuda'
            else:
                return model.to(device)
        return super().wrap_model(model_wrapper_cfg, model)

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
        """Load or resume the checkpoint, as MMEngine does.

        Raises:
            ValueError: it is for another number of classes, and a training is resumed from it or it is evaluated. Only
                a new training can start from it (`msda_plugin.heads.set_prediction`).
        """
        super().load_or_resume()
        new = [name for module in self.model.modules() for name in getattr(module, 'new_class_layers', ())]
        if new and (self._resume or not isinstance(self._train_loop, BaseLoop)):
            raise ValueError(f'the checkpoint is for another number of classes ({", ".join(new)} do not fit), and can '
                             'neither be resumed nor evaluated: fine-tune from it with load_from and resume=False, or '
                             'set num_classes to what it was trained with')

    def train(self) -> nn.Module:
        self.check_data('train', 'val')
        return super().train()

    def val(self) -> dict:
        self.check_data('val')
        return super().val()

    def test(self) -> dict:
        self.check_data('test')
        return super().test()
