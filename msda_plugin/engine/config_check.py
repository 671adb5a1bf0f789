"""Says what is wrong with a config's initial weights and schedule before training starts, in one sentence.

What MMEngine makes of them otherwise: a missing checkpoint is missed after everything is set up; a schedule that the
training does not get through is followed as far as it goes, without a word, at a rate that was never meant.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import get_world_size
from mmengine.logging import print_log
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, IterBasedTrainLoop
from torch.utils.data import DataLoader


# ---- weights --------------------------------------------------------------------------------------------------------
def check_weights(cfg: Config) -> None:
    """Check that the files which a model starts from, ``load_from`` and those of every ``init_cfg``, are there.

    What is fetched (a URL, ``torchvision://…``) is not asked for.

    Raises:
        FileNotFoundError: One is not.
    """
    for where, path in [('load_from', cfg.get('load_from')), *_pretrained(cfg.get('model'), 'model')]:
        if path and '://' not in path and not Path(path).is_file():
            raise FileNotFoundError(
                f'the checkpoint {path} of {where} does not exist; put it there, or name its file '
                f'with --cfg-options {where}=FILE'
            )


def _pretrained(node: object, where: str) -> Iterator[tuple[str, str]]:
    """(place in the config, checkpoint) of each ``init_cfg`` that loads one."""
    if isinstance(node, dict):
        if node.get('type') == 'Pretrained' and isinstance(node.get('checkpoint'), str):
            yield f'{where}.checkpoint', node['checkpoint']
        for key, child in node.items():
            yield from _pretrained(child, f'{where}.{key}')
    elif isinstance(node, (list, tuple)):
        for index, child in enumerate(node):
            yield from _pretrained(child, f'{where}.{index}')


# ---- schedule -------------------------------------------------------------------------------------------------------
def check_schedule(cfg: Config, loop: BaseLoop) -> None:
    """Check that the training has iterations, and as many as its schedule and its validation need.

    Args:
        cfg: The config. Where its file asks for more epochs or iterations than it does now (``--cfg-options
            train_cfg.max_epochs=1``), the training is a trial: a schedule that does not fit is logged, not refused.
        loop: The training loop that was built from it. Loops other than MMEngine's two are passed over.

    Raises:
        ValueError: There is no iteration, no validation, or a schedule that begins or ends after the training.
    """
    if not isinstance(loop, (EpochBasedTrainLoop, IterBasedTrainLoop)):
        return
    by_epoch = isinstance(loop, EpochBasedTrainLoop)
    field = 'max_epochs' if by_epoch else 'max_iters'
    length = getattr(loop, field)
    if length < 1:
        raise ValueError(f'train_cfg.{field} is {length}, so that nothing is trained; set it to 1 or more')
    if not len(loop.dataloader if by_epoch else loop.dataloader.dataset):  # samplers of the latter may have no end
        raise ValueError(_no_iteration(loop.dataloader))
    problems = list(_problems(cfg, loop, 'epoch' if by_epoch else 'iteration', length))
    trial = _length_in_file(cfg, field) > length
    for problem in problems:
        if not trial:
            raise ValueError(problem)
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


def _problems(cfg: Config, loop: BaseLoop, unit: str, length: int) -> Iterator[str]:
    """A sentence on each part of the schedule that does not fit into the training."""
    lengths = {unit: length, 'iteration': loop.max_iters}
    epochs = f' ({length} epochs of {len(loop.dataloader)})' if unit == 'epoch' else ''
    if cfg.get('val_dataloader') and loop.val_begin > length:
        yield (
            f'train_cfg.val_begin is {loop.val_begin}, but the training ends with {unit} {length}: it is never '
            f'validated; set train_cfg.val_begin={length} or less'
        )
    schedulers = cfg.get('param_scheduler') or []
    for index, scheduler in enumerate(schedulers if isinstance(schedulers, (list, tuple)) else [schedulers]):
        if not isinstance(scheduler, dict) or 'type' not in scheduler:
            continue  # built already, or one for each of several optimizers
        its_unit = 'epoch' if scheduler.get('by_epoch', True) else 'iteration'
        total = lengths.get(its_unit)
        if total is None:  # by epoch, in a training that goes by iterations
            continue
        place = f'param_scheduler.{index}'
        kind = scheduler['type'] if isinstance(scheduler['type'], str) else scheduler['type'].__name__
        ends = f'the training ends with {its_unit} {total}{epochs if its_unit == "iteration" else ""}'
        begin = scheduler.get('begin', 0)
        if begin >= total:
            yield (
                f'{place} ({kind}) begins after {its_unit} {begin}, but {ends}; set {place}.begin to less, or leave '
                'it out'
            )
            continue
        for key, value, start in _ends(kind, scheduler):
            if start + value > total:
                after = f', counted from {its_unit} {start}' if start else ''
                yield (
                    f'{place} ({kind}) has {key}={value}{after}, but {ends}: the learning rate never gets there; '
                    f'train longer, or set {place}.{key} to {total - start} or less'
                )


def _ends(kind: str, scheduler: dict) -> Iterator[tuple[str, int, int]]:
    """(field, its last value, where it counts from) of what a scheduler still has to come to."""
    begin = scheduler.get('begin', 0)
    if scheduler.get('milestones'):
        yield 'milestones', max(scheduler['milestones']), begin
    if scheduler.get('T_max'):
        yield 'T_max', scheduler['T_max'], begin
    if scheduler.get('end') and kind.rpartition('.')[2].startswith(('Linear', 'Constant')):  # warm-ups
        yield 'end', scheduler['end'], 0


def _length_in_file(cfg: Config, field: str) -> int:
    """Epochs or iterations of the config as its file has it; 0 if there is no file, or no such number in it."""
    if not cfg.filename or not Path(cfg.filename).is_file():
        return 0
    return (Config.fromfile(cfg.filename).get('train_cfg') or {}).get(field) or 0
