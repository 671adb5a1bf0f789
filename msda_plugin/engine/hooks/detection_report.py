"""The report of a test as an HTML page."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement

from msda_plugin.engine.detection_report import Detections, write_report
from msda_plugin.engine.messages import shown_path
from msda_plugin.registry import HOOKS


@HOOKS.register_module()
class DetectionReportHook(Hook):
    """Writes ``report.html`` after a test: accuracy of the classes, confusion matrix, worst mistakes.

    The page stands alone: images are in it. `TrainingReportHook` writes the same page after a training.

    Args:
        out_dir: Folder for the page; None: that of the log.
    """

    priority = 'LOWEST'  # after the metrics are logged

    def __init__(self, out_dir: str | None = None) -> None:
        self.out_dir = out_dir
        self._detections = Detections()

    def before_test_epoch(self, runner: Runner) -> None:
        self._detections = Detections()

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: Sequence[BaseDataElement] = ()
    ) -> None:
        self._detections.add(outputs)

    def after_test_epoch(self, runner: Runner, metrics: Mapping[str, float] | None = None) -> None:
        dataset = runner.test_loop.dataloader.dataset
        self._detections.gather(len(dataset))
        if not is_main_process():
            return
        checkpoint = runner.cfg.get('load_from')
        write_report(
            Path(self.out_dir or runner.log_dir, 'report.html'),
            runner,
            dataset,
            self._detections,
            facts={
                'config': shown_path(runner.cfg.filename) if runner.cfg.filename else None,
                'checkpoint': checkpoint,
            },
            curves=Path(checkpoint).parent / 'curves.png' if checkpoint else None,
        )
