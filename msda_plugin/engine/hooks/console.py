"""What a training or test prints: one line an epoch, and a progress bar on a terminal. The log file has everything."""

import functools
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta

from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.logging.logger import MMFormatter
from mmengine.runner import BaseLoop, IterBasedTrainLoop, Runner
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from msda_plugin import compat
from msda_plugin.engine.messages import counted, plain_metrics, short_metric, shown_path
from msda_plugin.registry import HOOKS

LIBRARIES = ('mmengine', 'mmcv', 'mmdet')
SHOWN_FUNCTIONS = ('resume', 'scale_lr')  # of MMEngine's runner
# MMEngine warns of its own code.
HIDDEN_WARNINGS = ('"FileClient" will be deprecated', '"HardDiskBackend" is the alias')
REFRESH = 0.1  # seconds between two updates of the progress bar
ROWS = 20  # of the table of classes, before it gets another column


class ConsoleFilter(logging.Filter):
    """Passes warnings, and messages of other code than MMEngine, mmcv and MMDetection.

    A record's attribute ``console`` (``logger.info(text, extra=dict(console=False))``) decides before that.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            return not record.getMessage().startswith(HIDDEN_WARNINGS)
        shown = record.funcName in SHOWN_FUNCTIONS or record.module == 'early_stopping_hook'
        return getattr(record, 'console', shown or not _is_of_a_library(record.pathname))


class _ConsoleFormatter(MMFormatter):
    """MMEngine's format for warnings and errors, and the bare message for the rest."""

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record) if record.levelno >= logging.WARNING else record.getMessage()


def _is_of_a_library(path: str) -> bool:
    modules = filter(None, map(sys.modules.get, LIBRARIES))
    return path.startswith(tuple(os.path.dirname(module.__file__) + os.sep for module in modules))


def hush(logger: MMLogger) -> None:
    """Let the logger print only what `ConsoleFilter` passes, without time and level. Its log file is not changed."""
    for handler in _printing(logger):
        if not any(isinstance(present, ConsoleFilter) for present in handler.filters):
            handler.addFilter(ConsoleFilter())
            handler.setFormatter(_ConsoleFormatter(datefmt='%m/%d %H:%M:%S'))


def _printing(logger: MMLogger) -> list[logging.StreamHandler]:
    return [
        handler
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)
    ]


def quietly(method: Callable) -> Callable:
    """Decorator for methods of a runner: what pycocotools prints goes to the log file, and the progress bar is closed.

    It does nothing for a runner whose ``verbose`` is true.
    """

    @functools.wraps(method)
    def run(runner: Runner, *args, **kwargs):
        if runner.verbose:
            return method(runner, *args, **kwargs)
        with compat.redirect_pycocotools(lambda text: runner.logger.info(text, extra=dict(console=False))):
            try:
                return method(runner, *args, **kwargs)
            finally:
                for hook in getattr(runner, '_hooks', ()):
                    if isinstance(hook, ConsoleHook):
                        hook.close_bar()

    return run


@HOOKS.register_module()
class ConsoleHook(Hook):
    """Prints one line an epoch and one a validation, and the AP of every class at the end.

    On a terminal, a progress bar shows the loss and the time that is left. A training by iterations gets a line at each
    validation. The AP of classes needs ``classwise=True`` of MMDetection's ``CocoMetric``. With several processes only
    the first one prints. The log file does not get these lines: MMEngine's are in it.

    `msda_plugin.DetectionRunner` adds this hook, and prints nothing else of MMEngine but warnings, unless the config
    has ``verbose = True``.
    """

    priority = 'LOWEST'  # after LoggerHook and the hooks that save

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._streams: list[tuple[logging.StreamHandler, object]] = []
        self._drawn = 0.0  # time.monotonic() of the last update
        self._start = self._start_iter = 0
        self._metrics: dict[str, float | None] = {}  # of the last validation

    # ---- training ---------------------------------------------------------------------------------------------------
    def before_train(self, runner: Runner) -> None:
        loop = runner.train_loop
        length = f'{loop.max_iters} iterations'
        if not _by_iter(loop):
            length = f'{counted(loop.max_epochs, "epoch")} of {counted(len(loop.dataloader), "iteration")}'
        batch, processes = loop.dataloader.batch_size, get_world_size()
        parts = [length, _images(loop), f'batch size {batch}' if batch else '']
        if processes > 1:
            parts.append(f'{processes} processes')
        _print(f'Training: {", ".join(filter(None, parts))}. Log: {_log_file(runner)}')
        self._start_iter = runner.iter

    def before_train_epoch(self, runner: Runner) -> None:
        loop = runner.train_loop
        self._start, self._start_iter = time.monotonic(), runner.iter
        if _by_iter(loop):
            self._open_bar(runner, 'Training', loop.max_iters, completed=runner.iter)
        else:
            self._open_bar(runner, f'Epoch {runner.epoch + 1}/{loop.max_epochs}', len(loop.dataloader))

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: Mapping | None = None
    ) -> None:
        self._advance(batch_idx + 1, lambda: '  '.join(filter(None, (_loss(runner, 10), _left(runner)))))

    def after_train_epoch(self, runner: Runner) -> None:
        self.close_bar()
        if not _by_iter(runner.train_loop):
            self._print_progress(runner, f'Epoch {runner.epoch + 1}/{runner.train_loop.max_epochs}')
        elif runner.iter > self._start_iter:
            self._print_progress(runner, f'Iteration {runner.iter}/{runner.train_loop.max_iters}')

    def _print_progress(self, runner: Runner, what: str) -> None:
        scalars = runner.message_hub.log_scalars
        by_iter = _by_iter(runner.train_loop)
        iterations = runner.iter - self._start_iter if by_iter else len(runner.train_loop.dataloader)
        rate = f'lr {scalars["train/lr"].current():.1e}' if 'train/lr' in scalars else ''
        seconds = time.monotonic() - self._start
        _print('  '.join(filter(None, (what, _loss(runner, iterations), rate, _duration(seconds), _left(runner)))))
        self._start, self._start_iter = time.monotonic(), runner.iter

    def after_train(self, runner: Runner) -> None:
        self.close_bar()
        _print_classes(self._metrics)

    # ---- validation and test ----------------------------------------------------------------------------------------
    def before_val_epoch(self, runner: Runner) -> None:
        self.close_bar()
        loop = runner._train_loop
        if isinstance(loop, BaseLoop) and _by_iter(loop) and runner.iter > self._start_iter:
            self._print_progress(runner, f'Iteration {runner.iter}/{loop.max_iters}')
        self._open_bar(runner, 'Validating', len(runner.val_loop.dataloader))

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: object = None) -> None:
        self._advance(batch_idx + 1)

    def after_val_epoch(self, runner: Runner, metrics: Mapping[str, float] | None = None) -> None:
        self.close_bar()
        self._metrics = plain_metrics(metrics or {})
        indent = '  ' if isinstance(runner._train_loop, BaseLoop) else ''
        _print(f'{indent}validation: {_summary(self._metrics)}')
        if isinstance(runner._train_loop, BaseLoop) and _by_iter(runner._train_loop):
            self._start = time.monotonic()
            self._open_bar(runner, 'Training', runner.train_loop.max_iters, completed=runner.iter)

    def before_test_epoch(self, runner: Runner) -> None:
        self._start = time.monotonic()
        self._open_bar(runner, 'Testing', len(runner.test_loop.dataloader))

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: object = None
    ) -> None:
        self._advance(batch_idx + 1)

    def after_test_epoch(self, runner: Runner, metrics: Mapping[str, float] | None = None) -> None:
        self.close_bar()
        plain = plain_metrics(metrics or {})
        images, seconds = _images(runner.test_loop), time.monotonic() - self._start
        _print(f'Test{" on " + images if images else ""} in {_duration(seconds)}: {_summary(plain)}')
        _print_classes(plain, validation=False)

    # ---- the progress bar -------------------------------------------------------------------------------------------
    def _open_bar(self, runner: Runner, title: str, total: int, completed: int = 0) -> None:
        self.close_bar()
        if not (is_main_process() and sys.stdout.isatty()):
            return
        columns = (
            TextColumn('{task.description}'),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn('{task.fields[note]}'),
        )
        # Without a thread that refreshes: data-loading processes are forked, and would inherit its locks.
        self._bar = Progress(*columns, auto_refresh=False, transient=True)
        self._bar.add_task(title, total=total, completed=completed, note='')
        before = sys.stdout
        self._bar.start()
        # Warnings, like everything that is printed, then appear above the bar.
        self._streams = [(handler, handler.stream) for handler in _printing(runner.logger) if handler.stream is before]
        for handler, _ in self._streams:
            handler.setStream(sys.stdout)

    def _advance(self, completed: int, note: Callable[[], str] = str) -> None:
        if self._bar is not None and time.monotonic() - self._drawn >= REFRESH:
            self._drawn = time.monotonic()
            self._bar.update(self._bar.task_ids[0], completed=completed, note=note(), refresh=True)

    def close_bar(self) -> None:
        """Remove the progress bar from the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        for handler, stream in self._streams:
            handler.setStream(stream)
        self._streams = []


def _print(text: str) -> None:
    if is_main_process():
        print(text, flush=True)


def _by_iter(loop: BaseLoop) -> bool:
    return isinstance(loop, IterBasedTrainLoop)


def _images(loop: BaseLoop) -> str:
    """'3 images'; '' if the dataset has no length."""
    dataset = loop.dataloader.dataset
    return counted(len(dataset), 'image') if hasattr(dataset, '__len__') else ''


def _duration(seconds: float) -> str:
    """'0:12', '1:02:03'."""
    return re.sub(r'^0:0?(?=\d+:)', '', str(timedelta(seconds=round(seconds))))


def _loss(runner: Runner, iterations: int) -> str:
    """The loss, averaged over the last iterations."""
    scalars = runner.message_hub.log_scalars
    return f'loss {scalars["train/loss"].mean(iterations):.3f}' if 'train/loss' in scalars else ''


def _left(runner: Runner) -> str:
    """The time left, from MMEngine's IterTimerHook."""
    eta = runner.message_hub.runtime_info.get('eta')
    return f'ETA {_duration(eta)}' if eta else ''


def _log_file(runner: Runner) -> str:
    return shown_path(runner.logger.log_file) if runner.logger.log_file else 'none'


def _summary(metrics: Mapping[str, float | None]) -> str:
    """'AP 0.617, AP50 0.786, AP75 0.727'; all metrics if there is no AP."""
    main = [name for name in metrics if re.fullmatch(r'(.*/)?(bbox|segm)_mAP(_50|_75)?', name)]
    names = main or [name for name in metrics if not name.endswith('_precision')]
    return ', '.join(f'{short_metric(name)} {_number(metrics[name])}' for name in names) or 'no metrics'


def _number(value: float | None) -> str:
    return '–' if value is None else f'{value:.3f}'


def _print_classes(metrics: Mapping[str, float | None], validation: bool = True) -> None:
    """Print the AP of every class as a table, in as many columns as needed."""
    classes = {name.removesuffix('_precision'): value for name, value in metrics.items() if name.endswith('_precision')}
    if not classes:
        return
    width = max(map(len, classes))
    cells = [f'  {name:<{width}}  {_number(value):>5}' for name, value in classes.items()]
    rows = -(-len(cells) // -(-len(cells) // ROWS))
    title = 'AP per class, last validation:' if validation else 'AP per class:'
    _print('\n'.join([title, *(''.join(cells[row::rows]) for row in range(rows))]))
