"""TensorBoard through MMEngine's visualization backend, with msda_plugin's configs."""

from pathlib import Path

import pytest
from mmdet.visualization import DetLocalVisualizer

from msda_plugin.tools import shapes, train

CONFIG = Path(__file__).parents[2] / 'configs/shapes/deformable-detr-two-stage_shunted-nano_1xb4-8e_shapes.py'


def test_training_writes_losses(tmp_path):
    pytest.importorskip('tensorboard', reason='tensorboard is not installed; pip install tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert shapes.main(['--out', str(tmp_path / 'data'), '--train', '8', '--val', '2', '--size', '64']) == 0
    DetLocalVisualizer._instance_dict.clear()  # one per process, with the folder of the last training
    assert (
        train.main(
            [
                str(CONFIG),
                '--work-dir',
                str(tmp_path / 'work'),
                '--cfg-options',
                f'data_root={tmp_path}/data/',
                'visualizer.vis_backends.0.type=TensorboardVisBackend',
                'train_cfg.max_epochs=1',
                'train_cfg.val_interval=1',
                'default_hooks.logger.interval=1',
                'train_dataloader.num_workers=0',
                'train_dataloader.persistent_workers=False',
                'val_dataloader.num_workers=0',
                'val_dataloader.persistent_workers=False',
            ]
        )
        == 0
    )
    (events,) = (tmp_path / 'work').glob('*/vis_data/events.out.tfevents.*')
    board = EventAccumulator(str(events))
    board.Reload()
    losses = board.Scalars('loss')
    assert [loss.step for loss in losses] == [1, 2] and all(loss.value > 0 for loss in losses)
    assert [accuracy.step for accuracy in board.Scalars('coco/bbox_mAP')] == [1]
