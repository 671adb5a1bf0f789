"""Images of a test with true and predicted boxes, and their score threshold."""

import os
import warnings
from collections.abc import Sequence

import mmcv
import numpy as np
from mmdet.structures import DetDataSample
from mmengine.hooks import Hook
from mmengine.runner import Runner

from msda_plugin.registry import HOOKS
from msda_plugin.visualization import draw_boxes, score_caption


@HOOKS.register_module()
class DrawnTestHook(Hook):
    """Draws test images with true and predicted boxes as MMDetection does, with the score threshold below each image.

    If no prediction reaches the threshold, the line below the image gives the highest score.

    Args:
        test_out_dir: Folder for the images, below the folder of the log.
        score_thr: Minimum score of the predicted boxes.
    """

    def __init__(self, test_out_dir: str, score_thr: float = 0.3) -> None:
        self.score_thr = score_thr
        self._drawing = HOOKS.build(
            dict(type='mmdet.DetVisualizationHook', draw=True, test_out_dir=test_out_dir, score_thr=score_thr)
        )

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict, outputs: Sequence[DetDataSample]
    ) -> None:
        for sample in outputs:
            with warnings.catch_warnings():
                # Of boxes at the edge of the image.
                warnings.filterwarnings('ignore', '.* is out of bounds', UserWarning)
                self._drawing.after_test_iter(runner, batch_idx, data_batch, [sample])
            scores = np.asarray(sample.pred_instances.get('scores', np.empty(0)))
            # The image as drawn: reading it back from a JPEG file would lose quality.
            image = draw_boxes(
                self._drawing._visualizer.get_image(),
                np.empty((0, 4)),
                np.empty(0),
                (),
                caption=f'left: true, right: predicted, {score_caption(scores, self.score_thr)}',
            )
            path = os.path.join(self._drawing.test_out_dir, os.path.basename(sample.img_path))
            mmcv.imwrite(image[..., ::-1], path)
