"""Several processes on one machine, over gloo: the same gradients as one process, and a training by the launchers."""

import json
import os
import shutil
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from msda_plugin.tools import shapes

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / 'configs/shapes/deformable-detr-two-stage_shunted-nano_1xb4-8e_shapes.py'
STEP = ROOT / 'tests/distributed_step.py'
SMALL = [
    'train_cfg.max_epochs=1',
    'train_cfg.val_interval=1',
    'train_dataloader.batch_size=2',
    *(
        f'{split}_dataloader.{option}'
        for split in ('train', 'val')
        for option in ('num_workers=0', 'persistent_workers=False')
    ),
]
BIN = Path(sys.executable).parent
MIM = shutil.which('mim', path=str(BIN))
pytestmark = pytest.mark.slow


def run(*command):
    # mim starts the `python` of its own environment by name.
    path = os.pathsep.join([str(BIN), os.environ['PATH']])
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PATH': path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def free_port():
    with socket.socket() as free:
        free.bind(('localhost', 0))
        return free.getsockname()[1]


def launch(processes, *command):
    return run(
        sys.executable,
        '-m',
        'torch.distributed.run',
        f'--nproc_per_node={processes}',
        f'--master_port={free_port()}',
        *command,
    )


@pytest.mark.parametrize('processes, images, wrappers', [(2, 2, ['ddp', 'fsdp', 'fully_shard']), (4, 4, ['ddp'])])
def test_gradients_equal_those_of_one_process(processes, images, wrappers, tmp_path):
    """With the whole model or a part in each; one whose images have no objects takes part like any other."""
    run(sys.executable, STEP, CONFIG, images, tmp_path / 'alone.pth')
    launch(processes, STEP, CONFIG, images, tmp_path / 'together.pth', *wrappers)
    alone = torch.load(tmp_path / 'alone.pth')['alone']
    together = torch.load(tmp_path / 'together.pth')
    assert list(together) == wrappers
    largest = max(grad.abs().max() for grad in alone.values())
    assert largest > 0
    for wrapper, grads in together.items():
        assert grads.keys() == alone.keys(), wrapper
        for name, grad in alone.items():
            assert (grads[name] - grad).abs().max() <= 1e-5 * largest, (wrapper, name)


@pytest.mark.parametrize(
    'launcher', ['torchrun', pytest.param('mim', marks=pytest.mark.skipif(MIM is None, reason='mim is not installed'))]
)
def test_trains_by_the_launcher(launcher, tmp_path):
    shapes.main(['--out', str(tmp_path / 'data'), '--train', '8', '--val', '3'])
    options = ['--work-dir', tmp_path / 'work', '--cfg-options', f'data_root={tmp_path / "data"}/', *SMALL]
    if launcher == 'torchrun':
        launch(2, '-m', 'msda_plugin', 'train', CONFIG, '--launcher', 'pytorch', *options)
    else:
        names = {distribution.metadata['Name'] for distribution in metadata.distributions()}
        package = 'onedl-mmdetection' if 'onedl-mmdetection' in names else 'mmdet'
        run(MIM, 'train', package, CONFIG, '--launcher', 'pytorch', '--gpus', 2, '--port', free_port(), *options)
    report = json.loads((tmp_path / 'work/metrics.json').read_text())
    assert report['final']['iter'] == 2  # 8 images, 2 processes, batch 2
    assert (tmp_path / 'work/epoch_1.pth').is_file()
