"""Skips training steps whose loss or gradients are NaN or infinite."""

import functools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object, all_reduce, get_world_size
from mmengine.hooks import EMAHook, Hook
from mmengine.logging import HistoryBuffer
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from msda_plugin import compat
from msda_plugin.engine.checkpoint_files import TrainingStopped, last_checkpoint_of
from msda_plugin.engine.messages import listed
from msda_plugin.registry import HOOKS

MOST_ITERATIONS = 256  # of an optimizer step whose images are remembered


class NonFiniteError(TrainingStopped, FloatingPointError):
    """The training stopped because the loss or gradients stayed NaN or infinite; the message says how to go on."""


@HOOKS.register_module()
class SkipNonFiniteHook(Hook):
    """Skips an optimizer step whose loss or gradients are NaN or infinite, and logs its iteration and images.

    A skipped step leaves weights, optimizer, averaged weights (`EMAHook`), running statistics of normalization layers
    and the loss scale of mixed precision as they were, and its loss is not part of the logged means. With gradient
    accumulation, a step is all iterations that it accumulates. In a distributed training, all processes skip the same
    steps. The schedule of the learning rate goes on.

    With a dynamic loss scale, infinite gradients are how the scale is found: while it is 1 or more, a step that
    ``GradScaler`` skips for them is not counted.

    Cost: one number is read from the device before each optimizer step, where MMEngine reads the gradient norm, too;
    without ``clip_grad`` the norm is computed for this. Several processes exchange one number a step. Running
    statistics are copied before each step; frozen ones are not.

    `msda_plugin.DetectionRunner` adds this hook; ``default_hooks = dict(skip_non_finite=None)`` switches it off, and
    ``default_hooks = dict(skip_non_finite=dict(type='msda_plugin.SkipNonFiniteHook', stop_after=50))`` changes it.

    Args:
        stop_after: Number of skipped steps in a row that stop the training with `NonFiniteError`. The weights of the
            last good step are saved as ``stopped_iter_N.pth`` first.

    Raises:
        ValueError: If ``stop_after`` is less than 1.
    """

    priority = 'HIGH'  # after RuntimeInfoHook, which stores the losses; before EMAHook and LoggerHook

    def __init__(self, stop_after: int = 10) -> None:
        if stop_after < 1:
            raise ValueError(f'stop_after must be at least 1, got {stop_after}')
        self.stop_after = stop_after
        self._in_a_row = 0
        self._guards: list[_Guard] = []
        # (iteration, images, losses) of the iterations since the last optimizer step
        self._pending: deque[tuple[int, list[str], dict]] = deque(maxlen=MOST_ITERATIONS)
        self._statistics: _RunningStatistics | None = None
        self._undo = ExitStack()

    def before_train(self, runner: Runner) -> None:
        wrapper = runner.optim_wrapper
        wrappers = wrapper.optim_wrappers.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]
        sharded = get_world_size() > 1 and not isinstance(runner.model, DistributedDataParallel)
        self._undo.close()
        self._guards = [
            _Guard(one, self._restore_statistics, sharded, self._undo)
            for one in wrappers
            if isinstance(one, OptimWrapper)
        ]
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):
                self._skip_averaging(hook)
        self._undo.enter_context(compat.match_non_finite_predictions())

    def before_train_epoch(self, runner: Runner) -> None:
        if not self._pending:
            self._statistics = None  # layers may have been frozen since

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if self._statistics is None:
            self._statistics = _RunningStatistics(runner.model)
        if not self._pending:
            self._statistics.save()
        for guard in self._guards:
            guard.stepped, guard.skipped = False, ''

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        losses = {
            name: value.detach() if isinstance(value, Tensor) else value for name, value in (outputs or {}).items()
        }
        self._pending.append((runner.iter + 1, list(_image_paths(data_batch)), losses))
        if not any(guard.stepped for guard in self._guards):
            return  # gradients are accumulated
        skipped = next((guard.skipped for guard in self._guards if guard.skipped), '')
        if skipped:
            self._in_a_row += 1
            where, what, images = self._describe(skipped)
            _forget(runner, losses)
            runner.logger.warning(f'{where}: {what}; the step is skipped. Images: {images}')
            if self._in_a_row >= self.stop_after:
                raise self._stop(runner, where, what, images)
        else:
            self._in_a_row = 0
        self._pending.clear()

    def after_train(self, runner: Runner) -> None:
        self.close()

    def close(self) -> None:
        """Undo what `before_train` changed; `DetectionRunner` also calls it when a training fails."""
        self._undo.close()

    def _restore_statistics(self) -> None:
        if self._statistics is not None:
            self._statistics.restore()

    def _skip_averaging(self, hook: EMAHook) -> None:
        model = hook.ema_model
        update = model.update_parameters

        def update_parameters(source: nn.Module) -> None:
            if not any(guard.skipped for guard in self._guards):
                update(source)

        model.update_parameters = update_parameters
        self._undo.callback(delattr, model, 'update_parameters')

    def _describe(self, skipped: str) -> tuple[str, str, str]:
        """(iterations, what was not finite, images), of all processes."""
        records = [
            (iteration, images, [name for name, value in losses.items() if not _finite(value)])
            for iteration, images, losses in self._pending
        ]
        if get_world_size() > 1:
            records = [record for of_process in all_gather_object(records) for record in of_process]
        bad = [record for record in records if record[2]] or records
        iterations = sorted({iteration for iteration, _, _ in bad})
        names = dict.fromkeys(name for _, _, losses in bad for name in losses)
        where = f'iteration{"s" if len(iterations) > 1 else ""} {listed(iterations)}'
        what = f'NaN or infinite losses ({listed(names, 3)})' if names else f'NaN or infinite {skipped}'
        return where, what, listed(dict.fromkeys(name for _, images, _ in bad for name in images))

    def _stop(self, runner: Runner, where: str, what: str, images: str) -> NonFiniteError:
        self._undo.close()
        last = last_checkpoint_of(runner)
        name = f'stopped_iter_{runner.iter + 1}.pth'
        runner.save_checkpoint(runner.work_dir, name, by_epoch=False)
        resume = f'--resume continues from {last}' if last else 'there is no checkpoint to resume from yet'
        return NonFiniteError(
            f'stopped after {self._in_a_row} steps in a row with NaN or infinite losses or gradients (last: '
            f'{where}, {what}, images {images}); the weights of the last good step are in {runner.work_dir}/{name}; '
            f'{resume}; lower the learning rate, clip the gradients, train without --amp, or remove these images'
        )


class _Guard:
    """Guards one optimizer wrapper: its ``step`` does nothing if the loss or the gradients are not finite.

    Attributes:
        stepped: Whether ``step`` was called in this iteration.
        skipped: What was not finite, if the step was skipped.
    """

    def __init__(self, wrapper: OptimWrapper, on_skip: Callable[[], None], sharded: bool, undo: ExitStack) -> None:
        self.stepped, self.skipped = False, ''
        self._wrapper, self._on_skip, self._sharded = wrapper, on_skip, sharded
        self._bad_loss: Tensor | None = None  # on the device, of the iterations since the last step
        self._updated = False  # whether the optimizer was called in this step
        self._backward, self._step = wrapper.backward, wrapper.step
        wrapper.backward = self.backward
        # MMEngine's schedulers warn unless the step has the attribute that theirs has.
        wrapper.step = functools.wraps(wrapper.step)(lambda **kwargs: self.step(**kwargs))
        undo.callback(delattr, wrapper, 'backward')
        undo.callback(delattr, wrapper, 'step')
        undo.callback(wrapper.optimizer.register_step_pre_hook(self._before_update).remove)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        bad = loss.detach().isfinite().all().logical_not()
        self._bad_loss = bad if self._bad_loss is None else self._bad_loss | bad
        self._backward(loss, **kwargs)  # also of a bad loss, because other processes wait for the gradients

    def step(self, **kwargs: Any) -> None:
        self.stepped, self._updated = True, False
        bad, self._bad_loss = self._bad_loss, None
        if bad is not None and _in_any_process(bad):
            # The scale of mixed precision is not to blame, so GradScaler must not see these gradients.
            self._skip('loss')
            self._wrapper.zero_grad()
            return
        self._step(**kwargs)
        if self._scaler is not None and not self._updated and not self._can_lower_scale():
            self._skip('gradients')

    def _before_update(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        """Called by the optimizer before it updates the weights."""
        if self._scaler is not None:
            found = getattr(optimizer, 'found_inf', None)  # fused optimizers skip the update themselves
            self._updated = found is None or not found.item()
        elif self._bad_gradients(optimizer):
            optimizer.zero_grad()  # without gradients, the update changes nothing
            self._skip('gradients')

    def _skip(self, what: str) -> None:
        self.skipped = what
        self._on_skip()

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        scaler = getattr(self._wrapper, 'loss_scaler', None)
        return scaler if scaler is not None and scaler.is_enabled() else None

    def _can_lower_scale(self) -> bool:
        return self._wrapper._scale_update_param is None and self._scaler.get_scale() >= 1

    def _bad_gradients(self, optimizer: torch.optim.Optimizer) -> bool:
        wrapper = self._wrapper
        gradients = [p.grad for group in optimizer.param_groups for p in group['params'] if p.grad is not None]
        if not gradients:
            norm = torch.zeros(())
        elif wrapper.clip_grad_kwargs and wrapper.grad_name == 'grad_norm':
            norm = torch.tensor(wrapper.message_hub.get_scalar('train/grad_norm').current())  # computed by the clipping
        else:
            norm = torch.nn.utils.get_total_norm(gradients)
        bad = norm.isfinite().logical_not()
        # DistributedDataParallel gives all processes the same gradients.
        return _in_any_process(bad.to(gradients[0].device)) if self._sharded and gradients else bool(bad)


class _RunningStatistics:
    """A copy of the running statistics of a model's normalization layers in training mode."""

    def __init__(self, model: nn.Module) -> None:
        layers = [module for module in model.modules() if isinstance(module, _NormBase) and module.training]
        self._buffers = [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
        self._saved = [buffer.clone() for buffer in self._buffers]

    def save(self) -> None:
        _copy(self._saved, self._buffers)

    def restore(self) -> None:
        _copy(self._buffers, self._saved)


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def _in_any_process(flag: Tensor) -> bool:
    if get_world_size() > 1:
        flag = flag.float()
        all_reduce(flag, op='max')
    return bool(flag)


def _image_paths(batch: Any) -> Iterator[str]:
    """The paths of the images of a batch, which is nested for semi-supervised training."""
    if isinstance(batch, dict):
        batch = batch.values()
    if isinstance(batch, (list, tuple, type({}.values()))):
        for part in batch:
            yield from _image_paths(part)
    elif getattr(batch, 'img_path', None):
        yield str(batch.img_path)


def _finite(value: object) -> bool:
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    return not isinstance(value, float) or math.isfinite(value)


def _forget(runner: Runner, losses: dict) -> None:
    """Remove values that are not finite from the stored losses, whose means would be NaN for many iterations."""
    scalars = runner.message_hub.log_scalars
    for name in [f'train/{name}' for name in (*losses, 'grad_norm')]:
        if name in scalars:
            values, counts = scalars[name].data
            kept = np.isfinite(values)
            if kept.any():
                scalars[name] = HistoryBuffer(values[kept], counts[kept], scalars[name].max_length)
            else:
                del scalars[name]
