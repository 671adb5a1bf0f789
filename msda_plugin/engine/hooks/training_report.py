"""Report of a training: metrics, curves, images and next steps."""

import copy
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import mmcv
import numpy as np
import torch
from mmengine.dist import is_main_process
from mmengine.evaluator import Evaluator
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import IterBasedTrainLoop, Runner
from mmengine.structures import BaseDataElement
from torch.utils.data import DataLoader, Dataset

from msda_plugin.engine.detection_report import Detections, write_report
from msda_plugin.engine.hooks.missed_validation import forget_validation
from msda_plugin.engine.messages import plain_metrics, short_metric, shown_path
from msda_plugin.files import FULL, atomic_write
from msda_plugin.registry import HOOKS
from msda_plugin.visualization import draw_curves, draw_sheet, write_png

NEXT_STEPS = (
    'test it:             python -m msda_plugin test {config} {checkpoint}',
    'see all test images: python -m msda_plugin test {config} {checkpoint} --show-dir pictures',
    'on your own image:   python -m msda_plugin demo IMAGE --model {checkpoint}',
    'on your own data:    python -m msda_plugin train --data DIR',
)


@HOOKS.register_module()
class TrainingReportHook(Hook):
    """Writes a report of the training to its work dir.

    - ``metrics.json``: final and best accuracy; each validation with its epoch, iteration and seconds since the start;
      number of parameters; duration. It is updated after each validation, and continued by a resumed training.
    - ``curves.png``: losses by iteration, accuracy by epoch and minutes. It is updated with ``metrics.json``.
    - ``predictions.png``: the first validation images with true and predicted boxes, drawn at the end.
    - ``report.html``: a page on the best validation of this process, written at the end: accuracy of the classes,
      precision and recall, confusion matrix, worst mistakes as images, curves, settings.

    With ``num_train_images`` each validation also measures the AP on training images, as ``train_bbox_mAP``,
    ``train_bbox_mAP_50`` and ``train_bbox_mAP_75``: where it rises and the AP of the validation falls, the detector
    overfits. The images are a fixed random sample, and go through the validation's pipeline. The closing message names
    both if they are far apart at the end.

    At the end, the logger prints the accuracy, the files and the next steps. The hook does nothing between validations.
    Its errors are logged and do not stop the training.

    Args:
        num_images: Number of images in ``predictions.png``; 0 writes no such file.
        score_thr: Minimum score of its predicted boxes.
        monitor: The metric that selects the best validation, higher is better; without the prefix of the dataset
            (``coco/``). The curves show it, and ``{monitor}_50`` and ``{monitor}_75`` if they exist.
        num_train_images: Number of training images whose AP is measured at each validation; 0 measures none.
        page: Whether to write ``report.html``.
        next_steps: Lines of the closing message, with the placeholders ``{config}``, ``{checkpoint}`` (the best one,
            otherwise the last) and ``{work_dir}``.

    Raises:
        ValueError: If a line of ``next_steps`` has another placeholder, or ``num_images`` or ``num_train_images`` is
            negative.
    """

    priority = 'LOWEST'  # after CheckpointHook and LoggerHook

    def __init__(
        self,
        num_images: int = 8,
        score_thr: float = 0.3,
        monitor: str = 'bbox_mAP',
        next_steps: Sequence[str] = NEXT_STEPS,
        num_train_images: int = 0,
        page: bool = True,
    ) -> None:
        for name, number in dict(num_images=num_images, num_train_images=num_train_images).items():
            if number < 0:
                raise ValueError(f'{name} must not be negative, got {number}')
        for line in next_steps:
            try:
                line.format(config='', checkpoint='', work_dir='')
            except (KeyError, IndexError, ValueError):
                raise ValueError(
                    'next_steps may contain the placeholders {config}, {checkpoint} and {work_dir} only, '
                    f"got '{line}'"
                ) from None
        self.num_images = num_images
        self.score_thr = score_thr
        self.monitor = monitor
        self.next_steps = tuple(next_steps)
        self.num_train_images = num_train_images
        self._train_sample: tuple[DataLoader, Evaluator] | None = None
        self._start: float | None = None  # time.monotonic(); None outside a training
        self._history: list[dict] = []
        self.page = page
        self._detections: Detections | None = None  # of the validation that runs; None if they cannot be collected
        self._kept: tuple[dict, Detections | None] | None = None  # the best validation, with its entry in the history

    def before_train(self, runner: Runner) -> None:
        self._history = self._earlier(runner) if runner.iter > 0 else []
        if runner.iter > 0 and all(entry['iter'] != runner.iter for entry in self._history):
            forget_validation(runner)  # the training was killed after the checkpoint, before the report
        self._start = time.monotonic() - (self._history[-1]['seconds'] if self._history else 0.0)

    def before_val_epoch(self, runner: Runner) -> None:
        self._detections = Detections() if self.page else None

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: Sequence[BaseDataElement] = ()
    ) -> None:
        if self._start is None or self._detections is None:
            return
        detections, self._detections = self._detections, None  # None stays after an error
        with _survive(runner, 'report.html'):
            detections.add(outputs)
            self._detections = detections

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        if self._start is None:
            return
        if self._detections is not None:
            self._detections.gather(len(runner.val_dataloader.dataset))
        metrics = plain_metrics(metrics or {})
        if self.num_train_images:
            with _survive(runner, 'the AP on training images'):
                metrics |= self._train_metrics(runner)
        # A validation that is repeated after a resume may already be in the report.
        self._history = [entry for entry in self._history if entry['iter'] != runner.iter]
        self._history.append(dict(epoch=runner.epoch, iter=runner.iter, seconds=self._seconds(), **metrics))
        if self._kept is None or self._kept[0] is not self._best():
            self._kept = self._history[-1], self._detections
        if is_main_process():
            with _survive(runner, 'metrics and curves'):
                self._write(runner, finished=False)

    def after_train(self, runner: Runner) -> None:
        seconds = self._seconds()
        written = []
        if is_main_process():
            with _survive(runner, 'metrics and curves'):
                written += self._write(runner, finished=True)
        # On every rank, because a sharded model needs all of them.
        with _survive(runner, 'the images of predictions'):
            sheet = self._predictions(runner)
            if sheet is not None and is_main_process():
                path = Path(runner.work_dir, 'predictions.png')
                write_png(path, sheet)
                written.append(path)
        if is_main_process():
            with _survive(runner, 'report.html'):
                written += self._write_page(runner)
            runner.logger.info(self._message(runner, seconds, written))
        self._start = None

    # ---- training images --------------------------------------------------------------------------------------------
    def _train_metrics(self, runner: Runner) -> dict[str, float | None]:
        """The AP on the sample of training images; the log gets it, too."""
        if self._train_sample is None:
            dataset = _TrainSample(
                runner.train_dataloader.dataset, runner.val_dataloader.dataset.pipeline, self.num_train_images
            )
            loader = runner.build_dataloader(
                dict(
                    batch_size=runner.val_dataloader.batch_size or 1,
                    num_workers=0,
                    dataset=dataset,
                    sampler=dict(type='DefaultSampler', shuffle=False),
                    collate_fn=runner.val_dataloader.collate_fn,
                )
            )
            evaluator = Evaluator(dict(type='mmdet.CocoMetric', metric='bbox', prefix='train'))
            evaluator.dataset_meta = dataset.metainfo
            self._train_sample = loader, evaluator
        loader, evaluator = self._train_sample
        with _evaluating(runner):
            for batch in loader:
                evaluator.process(data_samples=runner.model.val_step(batch), data_batch=batch)
        found = {
            f'train_{name}': value
            for name, value in plain_metrics(evaluator.evaluate(len(loader.dataset))).items()
            if re.fullmatch(r'bbox_mAP(_50|_75)?', name)
        }
        if is_main_process() and found:
            reached = ', '.join(f'{short_metric(name[6:])} {value:.3f}' for name, value in found.items())
            runner.logger.info(f'  on {len(loader.dataset)} training images: {reached}')
            runner.visualizer.add_scalars(found, step=runner.epoch)
        return found

    # ---- metrics and curves -----------------------------------------------------------------------------------------
    def _seconds(self) -> float:
        return round(time.monotonic() - self._start, 2)

    def _earlier(self, runner: Runner) -> list[dict]:
        """The validations up to this iteration, from the report of the training that is resumed."""
        path = Path(runner.work_dir, 'metrics.json')
        if not path.is_file():
            return []
        with _survive(runner, 'the earlier metrics.json'):
            return [entry for entry in json.loads(path.read_text())['history'] if entry['iter'] <= runner.iter]
        return []

    def _best(self) -> dict | None:
        candidates = [entry for entry in self._history if entry.get(self.monitor) is not None]
        return max(candidates, key=lambda entry: entry[self.monitor], default=None)

    def _write(self, runner: Runner, finished: bool) -> list[Path]:
        """Write metrics.json and curves.png; return their paths."""
        metrics_path, curves_path = (Path(runner.work_dir, name) for name in ('metrics.json', 'curves.png'))
        parameters = list(runner.model.parameters())
        last, best = (_checkpoint(runner, prefix) for prefix in ('last_ckpt', 'best_ckpt'))
        report = dict(
            finished=finished,
            final=self._history[-1] if self._history else None,
            best=self._best(),
            num_params=sum(p.numel() for p in parameters),
            num_trainable_params=sum(p.numel() for p in parameters if p.requires_grad),
            train_seconds=self._seconds(),
            config=_config(runner),
            last_checkpoint=last,
            best_checkpoint=best,
            history=self._history,
        )
        with atomic_write(metrics_path) as unfinished:
            unfinished.write_text(json.dumps(report, indent=1) + '\n')

        losses = _losses(runner)
        names = {self.monitor + suffix: short_metric(self.monitor) + suffix[1:] for suffix in ('', '_50', '_75')}
        accuracy, trained = (
            {
                short: [math.nan if entry.get(name) is None else entry[name] for entry in self._history]
                for name, short in ((prefix + name, short) for name, short in names.items())
                if any(entry.get(name) is not None for entry in self._history)
            }
            for prefix in ('', 'train_')
        )
        if not losses and not accuracy:
            return [metrics_path]
        progress = 'iter' if isinstance(runner.train_loop, IterBasedTrainLoop) else 'epoch'
        positions = {
            dict(iter='iteration').get(progress, progress): [entry[progress] for entry in self._history],
            'minutes': [entry['seconds'] / 60 for entry in self._history],
        }
        curves = draw_curves(losses, accuracy, positions, train_accuracy=trained, title=runner.experiment_name)
        write_png(curves_path, curves)
        return [metrics_path, curves_path]

    # ---- images -----------------------------------------------------------------------------------------------------
    def _predictions(self, runner: Runner) -> np.ndarray | None:
        """An image of true and predicted boxes; None if there is no validation data."""
        if runner.val_loop is None or not self.num_images:
            return None
        loader = runner.val_loop.dataloader
        dataset, class_names = loader.dataset, loader.dataset.metainfo['classes']
        images, truths, predictions = [], [], []
        with _evaluating(runner):
            for index in range(min(self.num_images, len(dataset))):
                (found,) = runner.model.val_step(loader.collate_fn([dataset[index]]))
                found = found.pred_instances.cpu().numpy()
                predictions.append((found.bboxes, found.labels, found.scores))
                # Boxes in pixels of the original image, which the pipeline may have changed in the sample.
                info = dataset.get_data_info(index)
                objects = [instance for instance in info['instances'] if not instance.get('ignore_flag')]
                truths.append(
                    (
                        np.array([instance['bbox'] for instance in objects], float).reshape(-1, 4),
                        np.array([instance['bbox_label'] for instance in objects], int),
                    )
                )
                images.append(mmcv.imread(info['img_path'], channel_order='rgb'))
        return draw_sheet(images, truths, predictions, class_names, score_thr=self.score_thr) if images else None

    # ---- the page ---------------------------------------------------------------------------------------------------
    def _write_page(self, runner: Runner) -> list[Path]:
        """Write report.html; return its path. There is none without a validation in this process."""
        if self._kept is None or self._kept[1] is None:
            return []
        entry, detections = self._kept
        path = Path(runner.work_dir, 'report.html')
        top = _checkpoint(runner, 'best_ckpt') if entry is self._best() else None
        last = _checkpoint(runner, 'last_ckpt') if entry is self._history[-1] else None
        write_report(
            path,
            runner,
            runner.val_dataloader.dataset,
            detections,
            facts={
                'config': _config(runner),
                'checkpoint': top or last,
                'validation': f'after epoch {entry["epoch"]}, iteration {entry["iter"]}',
                'training images': len(runner.train_dataloader.dataset),
                'training time': f'{self._seconds() / 60:.1f} minutes',
            },
            curves=Path(runner.work_dir, 'curves.png'),
        )
        return [path]

    # ---- the closing message ----------------------------------------------------------------------------------------
    def _message(self, runner: Runner, seconds: float, written: Sequence[Path]) -> str:
        final, best = self._history[-1] if self._history else {}, self._best()
        reached = ', '.join(
            f'{short_metric(name)} {value:.3f}'
            for name, value in final.items()
            if name in (self.monitor, f'{self.monitor}_50') and value is not None
        )
        lines = [f'Training finished after {seconds / 60:.1f} minutes{": " + reached if reached else ""}.']
        if best is not None and best is not final:
            lines.append(
                f'Best: {short_metric(self.monitor)} {best[self.monitor]:.3f}, after epoch {best["epoch"]}, '
                f'iteration {best["iter"]}.'
            )
        lines += _overfitting(final.get(f'train_{self.monitor}'), final.get(self.monitor), short_metric(self.monitor))
        last, top = (_checkpoint(runner, prefix) for prefix in ('last_ckpt', 'best_ckpt'))
        what = {
            'metrics.json': 'metrics',
            'curves.png': 'curves',
            'predictions.png': 'true and predicted boxes',
            'report.html': 'report, for a browser',
        }
        files = {
            'best checkpoint': top,
            'last checkpoint': last,
            **{what[path.name]: shown_path(path) for path in written},
        }
        lines += [f'  {name + ":":<26}{path}' for name, path in files.items() if path]
        lines.append('Next steps:')
        values = dict(
            config=_config(runner) or 'CONFIG',
            checkpoint=top or last or 'CHECKPOINT',
            work_dir=shown_path(runner.work_dir),
        )
        lines += [f'  {line.format(**values)}' for line in self.next_steps]
        return '\n'.join(lines)


def _overfitting(trained: float | None, validated: float | None, name: str) -> list[str]:
    """A sentence if the accuracy on training images is much higher than on validation images."""
    if trained is None or validated is None or trained < max(validated + 0.1, 1.5 * validated):
        return []
    return [
        f'Overfitting: {name} {trained:.3f} on training images, but {validated:.3f} on validation images. More '
        'training images help most, then published weights (python -m msda_plugin models).'
    ]


class _TrainSample(Dataset):
    """A fixed random sample of a training dataset, loaded by the pipeline of the validation, with its true boxes."""

    def __init__(self, dataset: Dataset, pipeline: Callable[[dict], dict], number: int) -> None:
        while hasattr(dataset, 'dataset'):  # wrappers that repeat or mix images
            dataset = dataset.dataset
        chosen = np.random.default_rng(0).permutation(len(dataset))[:number]
        self.dataset, self.pipeline, self.chosen = dataset, pipeline, sorted(chosen.tolist())
        self.metainfo = dataset.metainfo

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> dict:
        info = self.dataset.get_data_info(self.chosen[index])
        sample = self.pipeline(copy.deepcopy(info))
        # The datasets of a concatenation may use the same ids.
        sample['data_samples'].set_metainfo(dict(img_id=index, instances=info['instances']))
        return sample


@contextmanager
def _survive(runner: Runner, what: str) -> Iterator[None]:
    """Log an error instead of stopping the training."""
    try:
        yield
    except Exception as error:
        known = isinstance(error, OSError) and error.errno in FULL  # no traceback for a full disk
        runner.logger.error(f'The training report lacks {what}: {type(error).__name__}: {error}', exc_info=not known)


@contextmanager
def _evaluating(runner: Runner) -> Iterator[None]:
    """Set up the model as in a validation: evaluation mode, no gradients, averaged weights of an EMAHook."""
    training = runner.model.training
    with ExitStack() as stack, torch.no_grad():
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):
                hook.before_val_epoch(runner)
                stack.callback(hook.after_val_epoch, runner)
        runner.model.eval()
        stack.callback(runner.model.train, training)
        yield


def _losses(runner: Runner) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(iterations, values) of the total loss and its main parts, from MMEngine's message hub."""
    losses = {}
    for name, buffer in runner.message_hub.log_scalars.items():
        if re.fullmatch(r'train/loss(_\w+)?', name):
            values = np.asarray(buffer.data[0], float)
            losses[name.removeprefix('train/')] = np.arange(runner.iter - len(values), runner.iter) + 1, values
    return dict(sorted(losses.items(), key=lambda item: item[0] != 'loss'))


def _checkpoint(runner: Runner, prefix: str) -> str | None:
    """The checkpoint in the entry of the message hub with this prefix, if the file still exists."""
    for name, path in runner.message_hub.runtime_info.items():
        if name.startswith(prefix) and path and Path(path).exists():
            return shown_path(path)
    return None


def _config(runner: Runner) -> str | None:
    """The config that the runner dumped to the work dir, otherwise the original file."""
    original = runner.cfg.filename
    if not original:
        return None
    dumped = Path(runner.work_dir, Path(original).name)
    return shown_path(dumped if dumped.is_file() else original)
