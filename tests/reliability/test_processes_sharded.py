"""MMEngine's FSDP trains the detector in two processes and writes a full checkpoint.

    python -m pytest tests/reliability/test_processes_sharded.py --long -s

tests/test_distributed.py compares its gradients with those of one process.
"""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

from msda_plugin.registry import MODELS

CONFIG = Path(__file__).resolve().parents[2] / 'configs/shapes/deformable-detr-two-stage_shunted-nano_1xb4-8e_shapes.py'


@pytest.mark.slow
def test_fsdp_strategy_trains_and_saves(long_run, tmp_path):
    if not long_run:
        pytest.skip('needs --long')
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--nproc_per_node=2',
            f'--master_port={port}',
            str(Path(__file__).with_name('sharded_training.py')),
            str(CONFIG),
            str(tmp_path),
        ],
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-4000:]
    losses = re.findall(r'Epoch\(train\) +\[1\]\[[12]/2\].*? loss: ([\d.]+)', output)
    assert len(losses) == 2, output[-4000:]
    init_default_scope('mmdet')
    model = MODELS.build(Config.fromfile(str(CONFIG)).model)
    state = torch.load(tmp_path / 'epoch_1.pth', weights_only=True)['state_dict']
    assert all(value.isfinite().all() for value in state.values())
    model.load_state_dict(state)
    print(f'losses {losses} of two processes with half of the parameters each')
