from pathlib import Path

import pytest
from mmengine.config import Config

from msda_plugin.engine.nms import NMS, set_nms, supports_nms

SHAPES = Path(__file__).parents[2] / 'configs' / 'shapes'
OURS = SHAPES / 'deformable-detr-two-stage_shunted-nano_1xb4-8e_shapes.py'
MMDETS = SHAPES / 'mmdet-deformable-detr-two-stage_r18_1xb4-4e_shapes.py'


def model(path=OURS):
    return Config.fromfile(path).model


def test_the_main_job_has_it():
    assert model().test_cfg.nms == NMS


def test_off_and_on():
    cfg = model()
    set_nms(cfg, False)
    assert cfg.test_cfg.nms is None and cfg.test_cfg.max_per_img == 100
    set_nms(cfg, True)
    assert cfg.test_cfg.nms == NMS and cfg.test_cfg.nms is not NMS


def test_a_threshold_of_the_config_is_kept():
    cfg = model()
    cfg.test_cfg.nms.iou_threshold = 0.5
    set_nms(cfg, True)
    assert cfg.test_cfg.nms.iou_threshold == 0.5


def test_a_config_without_test_cfg():
    cfg = model()
    cfg.test_cfg = None
    set_nms(cfg, True)
    assert cfg.test_cfg == dict(nms=NMS)


@pytest.mark.parametrize('enabled', [True, False])
def test_other_heads_are_refused(enabled):
    cfg = model(MMDETS)
    assert not supports_nms(cfg)
    with pytest.raises(ValueError, match='the heads of this config: DeformableDETRHead'):
        set_nms(cfg, enabled)


def test_a_model_without_heads():
    assert not supports_nms(Config(dict(model=dict(type='ResNet'))).model)
