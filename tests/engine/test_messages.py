import numpy as np
import pytest

from msda_plugin.engine.messages import plain_metrics, short_metric


def test_metric_names():
    assert plain_metrics({'coco/bbox_mAP': np.float64(0.5), 'coco/text': 'x'}) == {'bbox_mAP': 0.5}
    assert plain_metrics({'a/AP': 0.1, 'b/AP': 0.2}) == {'a/AP': 0.1, 'b/AP': 0.2}
    assert plain_metrics({'coco/AP': float('inf'), 'coco/n': 2}) == {'AP': None, 'n': 2.0}


@pytest.mark.parametrize(
    'name, short', [('bbox_mAP', 'AP'), ('bbox_mAP_50', 'AP50'), ('segm_mAP_75', 'mask AP75'), ('accuracy', 'accuracy')]
)
def test_short_metric(name, short):
    assert short_metric(name) == short
