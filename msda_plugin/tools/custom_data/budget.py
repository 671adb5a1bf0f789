"""``train --data --minutes M``: measure the speed of the training, and plan one that ends in time.

`msda_plugin.TimeBudgetHook` corrects the plan during the training.
"""

import logging
import time
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO

import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.runner import Runner, set_random_seed

from msda_plugin import compat
from msda_plugin.engine.messages import counted
from msda_plugin.registry import HOOKS
from msda_plugin.tools.custom_data.recipe import Plan

PARTS = 20  # an epoch takes at most this fraction of the time
VALIDATIONS = 10
VALIDATION_SHARE = 0.1  # of the time, at most
WARM_UP, MEASURED = 2, 10  # iterations
MOST_SECONDS = 60.0  # of a measurement


@dataclass(frozen=True)
class Speed:
    """Seconds that an iteration of the training and one of the validation take."""

    train: float
    val: float


def measure_speed(cfg: Config) -> Speed:
    """Measure iterations of the training in ``cfg``, with its data, augmentation and optimizer, from random weights."""
    compat.import_mmdet()
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with redirect_stdout(StringIO()):  # of pycocotools
            return _measure(cfg)
    finally:
        logger.setLevel(level)


def _measure(cfg: Config) -> Speed:
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    set_random_seed(cfg.randomness.seed)
    device = cfg.get('device') or get_device()
    model = MODELS.build(cfg.model).to(device)
    for hook in cfg.get('custom_hooks') or []:
        if hook.get('type') == 'msda_plugin.AccelerateHook':
            HOOKS.build(hook).accelerate(model)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    model.train()
    train = _seconds(_batches(cfg.train_dataloader), lambda batch: model.train_step(batch, optimizer), device)
    model.eval()
    with torch.no_grad():
        val = _seconds(_batches(cfg.val_dataloader), model.val_step, device)
    return Speed(train, val)


def _batches(loader: dict) -> Iterable:
    """The batches of a data loader, again and again."""
    loader = Runner.build_dataloader(dict(loader, persistent_workers=False))
    while True:
        yield from loader


def _seconds(batches: Iterable, step: Callable[[object], object], device: str) -> float:
    """Mean duration of a step with the loading of its batch, after a warm-up."""
    start = began = time.perf_counter()
    for number, batch in enumerate(batches, 1):
        step(batch)
        if device.startswith('cuda'):
            torch.cuda.synchronize()
        now = time.perf_counter()
        if number <= WARM_UP:
            start = now
        if number == WARM_UP + MEASURED or (number > WARM_UP and now - began > MOST_SECONDS / 2):
            return (now - start) / (number - WARM_UP)


def plan_training(minutes: float, speed: Speed, num_images: int, batch_size: int, val_iterations: int) -> Plan:
    """Plan a training that takes ``minutes``, with its validations.

    Args:
        minutes: Minutes for training and validation.
        speed: From `measure_speed`.
        num_images: Number of training images.
        batch_size: Images per iteration.
        val_iterations: Iterations of a validation.

    Raises:
        ValueError: If the time is too short for an epoch of one iteration and a validation.
    """
    seconds, val_seconds = 60 * minutes, speed.val * val_iterations
    if seconds < speed.train + val_seconds:
        raise ValueError(
            f'--minutes leaves {max(seconds, 0):.0f} seconds for the training, but an iteration takes '
            f'{speed.train:.2g}, and a validation of {counted(val_iterations, "iteration")} {val_seconds:.2g} seconds; '
            'give more minutes, or fewer validation images'
        )
    iterations = -(-num_images // batch_size)
    part = max(1, int((seconds - val_seconds) / PARTS / speed.train))
    epoch_seconds = min(part, iterations) * speed.train
    validations = min(VALIDATIONS, max(1, int(VALIDATION_SHARE * seconds / val_seconds)))
    epochs = max(1, int((seconds - validations * val_seconds) / epoch_seconds))
    return Plan(
        epochs=epochs,
        val_interval=-(-epochs // validations),
        val_epochs=float(f'{val_seconds / epoch_seconds:.2g}'),
        epoch_images=part * batch_size if part < iterations else None,
    )


def earlier_plan(cfg: Config) -> Plan | None:
    """The plan in the config of a training with `msda_plugin.TimeBudgetHook`; None if it has none."""
    for hook in cfg.get('custom_hooks') or []:
        if hook.get('type') == 'msda_plugin.TimeBudgetHook':
            part = cfg.train_dataloader.sampler.get('num_samples')
            return Plan(cfg.train_cfg.max_epochs, cfg.train_cfg.val_interval, hook.val_epochs, part)
    return None
