"""MMDetection's detectors on an mmcv without compiled operators find what they find on a compiled one."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
CONFIGS = (
    'retinanet/retinanet_r18_fpn_1x_coco.py',
    'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    'yolox/yolox_tiny_8xb8-300e_coco.py',
    'dcnv2/faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py',
    'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
    'dino/dino-4scale_r50_8xb2-12e_coco.py',
    'mask2former/mask2former_r50_8xb2-lsj-50e_coco.py',
)


@pytest.fixture(scope='module')
def predictions(tmp_path_factory):
    """A function that runs detections.py on the compiled mmcv or on a copy without compiled operators."""
    compiled = importlib.util.find_spec('mmcv._ext')
    if compiled is None or compiled.origin.endswith('.py'):
        pytest.skip('mmcv has no compiled operators to compare with')
    folder = tmp_path_factory.mktemp('predictions')
    ignored = shutil.ignore_patterns('_ext*', '__pycache__', 'csrc', '.mim')
    shutil.copytree(Path(compiled.origin).parent, folder / 'site' / 'mmcv', ignore=ignored)

    def run(with_compiled, *configs):
        path = [str(HERE.parents[1])] if with_compiled else [str(folder / 'site'), str(HERE.parents[1])]
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(path), OMP_NUM_THREADS='1')
        if not with_compiled:
            subprocess.run([sys.executable, '-m', 'msda_plugin', 'mmcv-ops', 'install'], env=environment, check=True)
        out = folder / f'{"compiled" if with_compiled else "substitute"}.npz'
        subprocess.run([sys.executable, HERE / 'detections.py', out, *configs], env=environment, check=True)
        return dict(np.load(out))

    return run


@pytest.mark.slow
def test_detections_and_losses_are_equal(predictions):
    expected, found = predictions(True, *CONFIGS), predictions(False, *CONFIGS)
    assert not [f'{name}: {value}' for name, value in expected.items() if name.endswith(':error')]
    assert found.keys() == expected.keys()
    for config in CONFIGS:
        assert expected[f'{config}:scores'].size > 0
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-3, err_msg=name)


@pytest.mark.slow
def test_families_that_predict_with_compiled_operators_predict_without(request, predictions):
    """One config of each of MMDetection's families; half an hour of CPU time, so only in the long form."""
    if not request.config.getoption('--long'):
        pytest.skip('takes half an hour; --long runs it')
    expected, found = predictions(True), predictions(False)
    failed = {name: str(value) for name, value in found.items() if name.endswith(':error') and name not in expected}
    assert not failed
    differ = []
    for name, value in expected.items():
        if not name.endswith(':error') and (
            found[name].shape != value.shape or not np.allclose(found[name], value, 1e-4, 1e-3, equal_nan=True)
        ):
            differ.append(name)
    assert not differ
