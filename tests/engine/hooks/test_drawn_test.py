"""Drawn test images say their threshold."""

from types import SimpleNamespace

import mmcv
import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from msda_plugin.engine.hooks import drawn_test


@pytest.fixture
def captions(monkeypatch):
    said = []

    def draw_boxes(*args, caption, **options):
        said.append(caption)
        return original(*args, caption=caption, **options)

    original = drawn_test.draw_boxes
    monkeypatch.setattr(drawn_test, 'draw_boxes', draw_boxes)
    return said


def sample(path, scores):
    boxes = torch.tensor([[4.0, 4, 30, 30]] * len(scores)).reshape(-1, 4)
    made = DetDataSample(metainfo=dict(img_path=str(path)))
    made.pred_instances = InstanceData(
        bboxes=boxes, labels=torch.zeros(len(scores), dtype=torch.long), scores=torch.tensor(scores)
    )
    made.gt_instances = InstanceData(bboxes=torch.tensor([[4.0, 4, 30, 30]]), labels=torch.tensor([0]))
    return made


def test_captions(tmp_path, captions):
    init_default_scope('mmdet')
    visualizer = DetLocalVisualizer.get_instance('drawn_test')
    visualizer.dataset_meta = dict(classes=('ring',), palette=[(255, 0, 0)])
    paths = [tmp_path / name for name in ('a.png', 'b.png', 'c.png', 'd.jpg')]
    for path in paths:
        mmcv.imwrite(np.full((120, 160, 3), 90, np.uint8), str(path))
    hook = drawn_test.DrawnTestHook('drawn', score_thr=0.4)
    runner = SimpleNamespace(work_dir=str(tmp_path), timestamp='now')
    scores = ([0.9, 0.1], [0.25, 0.1], [], [0.5])
    samples = [sample(path, given) for path, given in zip(paths, scores, strict=True)]
    hook.after_test_iter(runner, 0, None, samples[:2])
    hook.after_test_iter(runner, 1, None, samples[2:])
    assert captions == [
        'left: true, right: predicted, score ≥ 0.4',
        'left: true, right: predicted, no score ≥ 0.4, highest 0.25',
        'left: true, right: predicted, no detections',
        'left: true, right: predicted, score ≥ 0.4',
    ]
    for path in paths:
        drawn = mmcv.imread(str(tmp_path / 'now' / 'drawn' / path.name))
        assert drawn.shape[0] > 120 and drawn.shape[1] == 320
        band = drawn[120:].astype(int)  # dark letters on white
        assert band.max() == 255 and (band < 120).any() and np.abs(band - band[..., :1]).max() < 40
        left, right = drawn[:120, :160].astype(int), drawn[:120, -160:].astype(int)
        assert np.abs(left - 90).max() > 40
        assert (np.abs(right - 90).max() > 40) == (path in (paths[0], paths[3]))
