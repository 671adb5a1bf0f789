"""Every config trains with `mim train … --launcher pytorch` in two processes, one of which never sees an object.

    python -m pytest tests/reliability/test_processes_configs.py --long -s

There are two iterations, because DistributedDataParallel reports unused parameters of the first in the second.
tests/test_distributed.py launches the main job in the same way.
"""

import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.registry import init_default_scope

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = [*sorted((ROOT / 'configs').glob('[!_]*/*.py')), *sorted((ROOT / 'projects').glob('*/configs/*.py'))]
BOXES = [[8, 12, 32, 48], [30, 5, 60, 45]]  # (x, y, width, height) in every second image
BIN = Path(sys.executable).parent
MIM = shutil.which('mim', path=str(BIN))
pytestmark = [pytest.mark.slow, pytest.mark.skipif(MIM is None, reason='mim is not installed')]


def write_data(folder, classes, size):
    """Write four images: the first process gets those with two objects each, the second those without objects."""
    (folder / 'images').mkdir(parents=True)
    height, width = size
    generator = np.random.default_rng(0)
    annotations = []
    for index in range(4):
        cv2.imwrite(str(folder / f'images/{index}.png'), generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for (x, y, w, h), label in zip(BOXES, (0, len(classes) - 1), strict=True):
            if index % 2 == 0:
                annotations.append(
                    dict(
                        id=len(annotations) + 1,
                        image_id=index,
                        category_id=label + 1,
                        bbox=[x, y, w, h],
                        area=w * h,
                        iscrowd=0,
                        segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]],
                    )
                )
    images = [dict(id=index, file_name=f'{index}.png', width=width, height=height) for index in range(4)]
    categories = [dict(id=label + 1, name=name) for label, name in enumerate(classes)]
    (folder / 'ann.json').write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))


def small(path, folder):
    """Write the config with random weights and small generated data; model and optimizer stay as they are."""
    helpers = runpy.run_path(str(ROOT / 'tests/test_configs.py'))
    init_default_scope('mmdet')
    cfg = Config.fromfile(str(path))
    cfg.model = helpers['without_pretrained'](cfg.model)
    cfg.model.get('data_preprocessor', {}).pop('batch_augments', None)  # pads to the size of the whole data set
    wrapped = cfg.train_dataloader.dataset
    dataset = wrapped.get('dataset', wrapped)
    metainfo = dataset.get('metainfo') or dict(classes=DATASETS.get(dataset.type).METAINFO['classes'])
    two_stage = cfg.model.get('as_two_stage') and cfg.model.num_queries > 100
    size = helpers['SIZE_TWO_STAGE' if two_stage else 'SIZE']
    write_data(folder, metainfo['classes'], size)

    cfg.train_dataloader = dict(
        batch_size=1,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dict(
            type=dataset.type,
            metainfo=metainfo,
            data_root=f'{folder}/',
            ann_file='ann.json',
            data_prefix=dict(img='images/'),
            filter_cfg=None,
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='LoadAnnotations', with_bbox=True, with_mask='mask_head' in cfg.model.get('roi_head', {})),
                dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape')),
            ],
        ),
    )
    for split in ('val', 'test'):
        cfg[f'{split}_dataloader'] = cfg[f'{split}_evaluator'] = cfg[f'{split}_cfg'] = None
    cfg.data_root = f'{folder}/'
    cfg.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1)
    cfg.param_scheduler = None
    cfg.optim_wrapper.type = 'OptimWrapper'  # MMEngine's AmpOptimWrapper needs a GPU
    cfg.default_hooks.checkpoint = None  # would write gigabytes
    cfg.default_hooks.logger.interval = 1
    cfg.custom_hooks = [hook for hook in cfg.get('custom_hooks') or () if hook['type'] == 'msda_plugin.AccelerateHook']
    cfg.dump(folder / path.name)
    return folder / path.name


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_config_in_two_processes(path, long_run, tmp_path):
    if not long_run:
        pytest.skip('needs --long')
    names = {distribution.metadata['Name'] for distribution in metadata.distributions()}
    package = 'onedl-mmdetection' if 'onedl-mmdetection' in names else 'mmdet'
    config = small(path, tmp_path / 'data')
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PATH': os.pathsep.join([str(BIN), os.environ['PATH']])}
    if path.is_relative_to(ROOT / 'projects'):
        environment['PYTHONPATH'] = str(path.parents[1])
    done = subprocess.run(
        [
            MIM,
            'train',
            package,
            str(config),
            '--launcher',
            'pytorch',
            '--gpus',
            '2',
            '--port',
            str(port),
            '--work-dir',
            str(tmp_path / 'work'),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-4000:]
    losses = [float(loss) for loss in re.findall(r'Epoch\(train\) +\[1\]\[[12]/2\].* loss: ([\d.]+)', output)]
    assert len(losses) == 2, output[-4000:]  # nan and inf do not match
    print(f'{path.stem}: losses {losses}')
