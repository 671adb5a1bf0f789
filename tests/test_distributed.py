"""Several processes on one machine, over gloo: the same gradients as one process, and a training by the launcher."""
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from msda_plugin.tools import shapes

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / 'configs/shapes/deformable-detr-two-stage_shunted-nano_1xb4-8e_shapes.py'
pytestmark = pytest.mark.slow


def launch(processes, *command):
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', f'--nproc_per_node={processes}', f'--master_port={port}',
         *map(str, command)], env=dict(os.environ, OMP_NUM_THREADS='1'), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize('processes, images', [(2, 2), (4, 4)])
def test_gradients_equal_those_of_one_process(processes, images, tmp_path):
    """A process whose image has no objects takes part like any other."""
    grads = []
    for number in (1, processes):
        launch(number, ROOT / 'tests/distributed_step.py', CONFIG, images, tmp_path / f'{number}.pth')
        grads.append(torch.load(tmp_path / f'{number}.pth'))
    alone, together = grads
    assert alone.keys() == together.keys()
    largest = max(grad.abs().max() for grad in alone.values())
    assert largest > 0
    for name, grad in alone.items():
        assert (together[name] - grad).abs().max() <= 1e-5 * largest, name


def test_trains_by_the_launcher(tmp_path):
    shapes.main(['--out', str(tmp_path / 'data'), '--train', '8', '--val', '3'])
    launch(2, '-m', 'msda_plugin.tools.train', CONFIG, '--launcher', 'pytorch', '--work-dir', tmp_path / 'work',
           '--cfg-options', 'train_cfg.max_epochs=1', 'train_cfg.val_interval=1', f'data_root={tmp_path / "data"}/',
           'train_dataloader.batch_size=2', 'train_dataloader.num_workers=0',
           'train_dataloader.persistent_workers=False', 'val_dataloader.num_workers=0',
           'val_dataloader.persistent_workers=False')
    report = json.loads((tmp_path / 'work/metrics.json').read_text())
    assert report['final']['iter'] == 2  # 8 images, 2 processes, batch 2
    assert (tmp_path / 'work/epoch_1.pth').is_file()
