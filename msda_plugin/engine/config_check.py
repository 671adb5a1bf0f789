"""Checks initial weights, fields and schedule of a config before training starts. Every error says how to fix it.

Without these checks, MMEngine reports a missing checkpoint only after everything is set up, and follows a schedule that
is longer than the training as far as it gets, without a warning.
"""

import logging
import math
from collections.abc import Iterator
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import get_world_size
from mmengine.logging import print_log
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, IterBasedTrainLoop
from torch.utils.data import DataLoader

from msda_plugin.engine.checkpoint_files import no_file
from msda_plugin.engine.config_walk import walk

SPLITS = ('train', 'val', 'test')
GROUPS = (
    ('train_dataloader', 'train_cfg', 'optim_wrapper'),
    *((f'{split}_dataloader', f'{split}_cfg', f'{split}_evaluator') for split in ('val', 'test')),
)
# Field -> smallest value, largest value, type.
NUMBERS = {
    **{f'train_cfg.{name}': (1, math.inf, int) for name in ('max_epochs', 'max_iters', 'val_interval')},
    'train_cfg.val_begin': (0, math.inf, int),
    **{f'{split}_dataloader.batch_size': (1, math.inf, int) for split in SPLITS},
    **{f'{split}_dataloader.num_workers': (0, math.inf, int) for split in SPLITS},
    'optim_wrapper.optimizer.lr': (0, math.inf, float),
    'optim_wrapper.optimizer.weight_decay': (0, math.inf, float),
    'optim_wrapper.accumulative_counts': (1, math.inf, int),
    **{f'default_hooks.{hook}.interval': (-1, math.inf, int) for hook in ('checkpoint', 'logger')},
    'randomness.seed': (0, 2**32 - 1, int),
}


# ---- weights --------------------------------------------------------------------------------------------------------
def check_weights(cfg: Config | dict) -> None:
    """Check that the checkpoints in ``load_from`` and in every ``init_cfg`` of the model exist.

    URLs and other remote checkpoints (``torchvision://…``) are skipped.

    Raises:
        FileNotFoundError: If a checkpoint does not exist.
    """
    pretrained = (
        (f'{where}.checkpoint', node.get('checkpoint'))
        for where, node in walk(cfg.get('model'), 'model')
        if isinstance(node, dict) and node.get('type') == 'Pretrained'
    )
    for where, path in [('load_from', cfg.get('load_from')), *pretrained]:
        if isinstance(path, str) and path and '://' not in path and not Path(path).is_file():
            raise FileNotFoundError(
                f'the checkpoint {path} of {where} {no_file(path)}; put it there, or name its file '
                f'with --cfg-options {where}=FILE'
            )


# ---- fields ---------------------------------------------------------------------------------------------------------
def check_fields(cfg: Config) -> None:
    """Check the fields of a config that people change most, from the epochs to the seed.

    Raises:
        ValueError: If a number is of another type, too small or too large; if the log level is unknown; or if only
            some of the fields of training, validation or test are set.
    """
    for group in GROUPS:
        missing = [name for name in group if cfg.get(name) is None]
        if 0 < len(missing) < len(group):
            present = ', '.join(name for name in group if name not in missing)
            raise ValueError(
                f'the config has {present}, but {", ".join(missing)} is missing; set all of {", ".join(group)}, or '
                'none of them'
            )
    level = cfg.get('log_level', 'INFO')
    if isinstance(level, str) and not isinstance(logging.getLevelName(level), int):
        raise ValueError(f"log_level must be DEBUG, INFO, WARNING or ERROR, got '{level}'")
    for field, (minimum, maximum, kind) in NUMBERS.items():
        *path, last = field.split('.')
        node = cfg
        for part in path:
            node = node.get(part) if hasattr(node, 'get') else None
        value = node.get(last) if hasattr(node, 'get') else None
        if value is None:
            continue
        number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        if not number or not minimum <= value <= maximum or value == math.inf:
            what = 'a whole number' if kind is int else 'a number'
            limits = f'of {minimum} or more' if maximum == math.inf else f'from {minimum} to {maximum}'
            raise ValueError(
                f'{field} must be {what} {limits}, got {value!r}; set it with --cfg-options {field}=NUMBER'
            )
        if last == 'num_workers' and value == 0 and node.get('persistent_workers'):
            where = '.'.join(path)
            raise ValueError(
                f'{field} is 0, but persistent_workers is True; set {where}.persistent_workers=False as well'
            )


# ---- schedule -------------------------------------------------------------------------------------------------------
def check_schedule(cfg: Config, loop: BaseLoop, as_written: Config | None = None, *, resumed: bool = False) -> None:
    """Check that the training has iterations, and that its learning rate schedule and its validation fit it.

    A schedule is never changed. If the training was made shorter than in the config's file (``--cfg-options
    train_cfg.max_epochs=1``), it is a trial: a schedule that is too long is a warning. If it was made longer, a
    schedule that ends earlier is a warning, too, unless a checkpoint is resumed, which has its own schedule.

    Args:
        cfg: The config.
        loop: Its training loop. Only MMEngine's two loops are checked.
        as_written: The config as its file has it, if there is one.
        resumed: Whether a checkpoint is resumed.

    Raises:
        ValueError: If there is no iteration, if there is no validation, if a schedule begins or ends after the
            training, or if ``max_epochs`` was changed outside of ``train_cfg``.
    """
    if not isinstance(loop, (EpochBasedTrainLoop, IterBasedTrainLoop)):
        return
    by_epoch = isinstance(loop, EpochBasedTrainLoop)
    field = 'max_epochs' if by_epoch else 'max_iters'
    length = getattr(loop, field)
    if length < 1:
        raise ValueError(f'train_cfg.{field} is {length}, so that nothing is trained; set it to 1 or more')
    if not len(loop.dataloader if by_epoch else loop.dataloader.dataset):  # the latter's samplers may be infinite
        raise ValueError(_no_iteration(loop.dataloader))
    as_written = as_written or Config()
    before = (as_written.get('train_cfg') or {}).get(field) or 0
    unit = 'epoch' if by_epoch else 'iteration'
    if field in as_written and cfg.get(field) != as_written.get(field) and length == before:
        raise ValueError(
            f'{field}={cfg.get(field)} has no effect, because the config file uses {field} only while it is parsed; '
            f'set train_cfg.{field}={cfg.get(field)}, and the fields of param_scheduler that depend on it'
        )
    for problem in _problems(cfg, loop, field, unit, length):
        if length >= before:
            raise ValueError(problem)
        print_log(problem, logger='current', level=logging.WARNING)
    if 0 < before < length and not resumed:
        for problem in _early_ends(cfg, unit, before, length):
            print_log(problem, logger='current', level=logging.WARNING)


def _no_iteration(dataloader: DataLoader) -> str:
    images, processes = len(dataloader.dataset), get_world_size()
    if not images:
        return (
            'train_dataloader.dataset has no image, so that nothing is trained; its filter_cfg may leave out all '
            'of them, as images without boxes or too small'
        )
    batch = getattr(dataloader.batch_sampler, 'batch_size', None) or dataloader.batch_size
    shared = f' in each of {processes} processes' if processes > 1 else ''
    return (
        f'train_dataloader.batch_size is {batch}{shared} and drop_last is on, but there are {images} images: no '
        'batch is ever full, and nothing is trained; set train_dataloader.batch_size='
        f'{max(images // processes, 1)} or less, or drop_last=False'
    )


def _problems(cfg: Config, loop: BaseLoop, field: str, unit: str, length: int) -> Iterator[str]:
    """A sentence for each part of the schedule that does not fit into the training."""
    iterations = len(loop.dataloader) if unit == 'epoch' else 1  # per unit of the training
    if cfg.get('val_dataloader') and loop.val_begin > length:
        yield (
            f'train_cfg.val_begin is {loop.val_begin}, but the training ends with {unit} {length}: it is never '
            f'validated; set train_cfg.val_begin={length} or less'
        )
    for place, kind, scheduler in _schedulers(cfg):
        its_unit = 'epoch' if scheduler.get('by_epoch', True) else 'iteration'
        if its_unit == 'epoch' and unit == 'iteration':
            continue
        per_unit = iterations if its_unit != unit else 1
        total = length * per_unit
        epochs = f' ({length} epochs of {iterations})' if its_unit != unit else ''
        ends = f'the training ends with {its_unit} {total}{epochs}'
        begin = scheduler.get('begin', 0)
        if begin >= total:
            yield (
                f'{place} ({kind}) begins after {its_unit} {begin}, but {ends}; set train_cfg.{field}='
                f'{begin // per_unit + 1} or more, or {place}.begin={total - 1} or less'
            )
            continue
        if _is_warm_up(kind) and scheduler.get('end') and scheduler.get('start_factor', scheduler.get('factor', 0)) < 1:
            span = scheduler['end'] - begin
            if span * (iterations if scheduler.get('convert_to_iter_based') else 1) == 1:
                yield (
                    f'{place} ({kind}) is one {its_unit} long, from begin={begin} to end={scheduler["end"]}: the '
                    f'learning rate stays at its first value; set {place}.end={begin + 2} or more, or remove it '
                    'from param_scheduler'
                )
                continue
        for key, value, start in _ends(kind, scheduler):
            if start + value > total:
                after = f', counted from {its_unit} {start}' if start else ''
                yield (
                    f'{place} ({kind}) has {key}={value}{after}, but {ends}: the learning rate never gets there; '
                    f'set train_cfg.{field}={-(-(start + value) // per_unit)} or more, or {place}.{key}='
                    f'{total - start} or less'
                )


def _early_ends(cfg: Config, unit: str, before: int, length: int) -> Iterator[str]:
    """A sentence for each annealing that ends where the training of the config's file ends, in a longer training."""
    for place, kind, scheduler in _schedulers(cfg):
        begin, period = scheduler.get('begin', 0), scheduler.get('T_max')
        if period and scheduler.get('by_epoch', True) == (unit == 'epoch') and begin + period == before:
            end = f' {place}.end={length}' if scheduler.get('end') else ''
            yield (
                f'{place} ({kind}) anneals the learning rate until {unit} {before}, but the training ends with {unit} '
                f'{length}; to anneal until then, set {place}.T_max={length - begin}{end}'
            )


def _schedulers(cfg: Config) -> Iterator[tuple[str, str, dict]]:
    """(path, name of the type, config) of each scheduler."""
    schedulers = cfg.get('param_scheduler') or []
    for index, scheduler in enumerate(schedulers if isinstance(schedulers, (list, tuple)) else [schedulers]):
        if isinstance(scheduler, dict) and 'type' in scheduler:  # else it is built, or there are several optimizers
            kind = scheduler['type']
            yield f'param_scheduler.{index}', kind if isinstance(kind, str) else kind.__name__, scheduler


def _ends(kind: str, scheduler: dict) -> Iterator[tuple[str, int, int]]:
    """(field, its last value, where it counts from) for each field that must fit into the training."""
    begin = scheduler.get('begin', 0)
    if scheduler.get('milestones'):
        yield 'milestones', max(scheduler['milestones']), begin
    if scheduler.get('T_max'):
        yield 'T_max', scheduler['T_max'], begin
    if scheduler.get('end') and _is_warm_up(kind):
        yield 'end', scheduler['end'], 0


def _is_warm_up(kind: str) -> bool:
    return kind.rpartition('.')[2].startswith(('Linear', 'Constant'))
