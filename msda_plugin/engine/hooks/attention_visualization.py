"""Logs figures of the attention during validation, always of the same images."""

from collections.abc import Sequence
from contextlib import ExitStack

import mmcv
from mmdet.structures import DetDataSample
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from msda_plugin.registry import HOOKS
from msda_plugin.visualization import Recording, draw_query, record_attention


@HOOKS.register_module()
class AttentionVisualizationHook(Hook):
    """Logs figures of the attention for the first images of the validation data.

    A figure has a panel with the boxes of all decoder layers, and a panel for each attention layer. Its query is the
    highest-scoring detection, or the center of the image if nothing is detected or the model has no decoder. Figures
    are logged as ``attention_0``, ``attention_1`` … (the index of the image) at the training step, by the visualizer
    backends that support images. Attention is recorded for these images only.

    Args:
        num_images: Number of images per validation.
        interval: Log figures in every ``interval``-th validation, starting with the first.
        layers: Layers to draw: parts of their names, patterns with ``*``, or 'all'. None: the last block of each
            backbone stage, and all other layers.

    Raises:
        ValueError: If ``num_images`` or ``interval`` is less than 1; in the first validation, if the model has no
            supported attention layer, or a pattern matches no layer.

    Example:
        >>> custom_hooks = [dict(type='msda_plugin.AttentionVisualizationHook', num_images=2)]
    """

    def __init__(self, num_images: int = 2, interval: int = 1, layers: Sequence[str] | None = None) -> None:
        if num_images < 1 or interval < 1:
            raise ValueError(f'num_images and interval must be at least 1, got {num_images} and {interval}')
        self.num_images = num_images
        self.interval = interval
        self.layers = layers
        self._validations = 0
        self._drawn = 0  # images drawn in this validation
        self._recording: Recording | None = None
        self._stop = ExitStack()

    def before_val_epoch(self, runner: Runner) -> None:
        self._stop.close()  # removes hooks of an interrupted validation
        self._recording = None
        due = self._validations % self.interval == 0
        self._validations += 1
        self._drawn = 0 if due and is_main_process() else self.num_images

    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        if self._drawn < self.num_images:
            model = runner.model.module if is_model_wrapper(runner.model) else runner.model
            self._recording = self._stop.enter_context(record_attention(model))

    def after_val_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | None = None,
        outputs: Sequence[DetDataSample] | None = None,
    ) -> None:
        if self._recording is None:
            return
        self._stop.close()
        recording, self._recording = self._recording, None
        class_names = runner.val_loop.dataloader.dataset.metainfo['classes']
        for index, sample in enumerate(outputs[: self.num_images - self._drawn]):
            image = mmcv.imread(sample.img_path, channel_order='rgb')
            if recording.boxes is not None and len(sample.pred_instances):
                query = recording.at_detection(0, sample, class_names, self.layers, index)
            else:
                query = recording.at_point((image.shape[1] / 2, image.shape[0] / 2), sample, self.layers, index)
            figure = draw_query(image, query, title=f'image {self._drawn}, iteration {runner.iter}')
            runner.visualizer.add_image(f'attention_{self._drawn}', figure, step=runner.iter)
            self._drawn += 1
