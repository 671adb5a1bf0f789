"""A training of seconds: the shapes config made small, with dropout, drop path, flips and averaged weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

import msda_plugin.registry  # noqa: F401  lets torch.load read what MMEngine writes
from msda_plugin.engine.checkpoint_files import is_complete
from msda_plugin.tools.shapes import generate

ROOT = Path(__file__).resolve().parents[2]
MAIN_JOB = ROOT / 'configs/shapes/deformable-detr-two-stage_shunted-nano_1xb4-8e_shapes.py'
EPOCHS = 4
CONFIG = f"""
_base_ = {str(MAIN_JOB)!r}
model = dict(
    num_queries=10,
    backbone=dict(
        arch=dict(embed_dims=(8, 16, 32, 64), depths=(1, 1, 1, 1), num_heads=(2, 2, 4, 8)), drop_path_rate=0.2),
    neck=dict(in_channels=[16, 32, 64], out_channels=32),
    encoder=dict(num_layers=1, layer_cfg=dict(
        self_attn_cfg=dict(embed_dims=32, dropout=0.1),
        ffn_cfg=dict(embed_dims=32, feedforward_channels=64, ffn_drop=0.1))),
    decoder=dict(num_layers=1, layer_cfg=dict(
        self_attn_cfg=dict(embed_dims=32, dropout=0.1), cross_attn_cfg=dict(embed_dims=32, dropout=0.1),
        ffn_cfg=dict(embed_dims=32, feedforward_channels=64, ffn_drop=0.1))),
    positional_encoding=dict(num_feats=16), bbox_head=dict(embed_dims=32), test_cfg=dict(max_per_img=10))
max_epochs = {EPOCHS}
train_cfg = dict(max_epochs=max_epochs, val_interval=2)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=5),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=1, end=max_epochs, T_max=3, convert_to_iter_based=True)]
default_hooks = dict(logger=dict(interval=1))
custom_hooks = [dict(type='EMAHook', momentum=0.1), dict(type='msda_plugin.TrainingReportHook')]
val_dataloader = dict(batch_size=2)
"""


def make_data(folder, train=12, val=4):
    generate(str(folder), train=train, val=val, size=(64, 64), seed=1)
    return folder


def arguments(folder, work_dir, *options):
    """Arguments of ``train`` for the small training on ``folder``, with further ``--cfg-options``."""
    config = Path(folder).parent / 'small.py'
    if not config.is_file():
        config.write_text(CONFIG)
    return [str(config), '--work-dir', str(work_dir), '--cfg-options', f'data_root={folder}/', *options]


class TrainingServer:
    """Starts trainings one after another, see training_server.py."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name('training_server.py'))],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(os.environ, OMP_NUM_THREADS='1', PYTHONHASHSEED='random'),
        )
        self.sessions = []
        while (line := self.process.stdout.readline().strip()) != 'ready':
            assert line or self.process.poll() is None, 'the server did not start'

    def run(self, argv, log, **what_happens):
        """Train; returns the answer of the server."""
        self.process.stdin.write(json.dumps(dict(argv=argv, log=str(log), **what_happens)) + '\n')
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        self.sessions.append(answer['session'])
        return answer

    def close(self):
        # Closing the pipe might not end it: a forked process of another test may hold the same pipe.
        self.process.terminate()
        self.process.wait(30)


def processes_of(sessions):
    """Ids of the running processes of these sessions."""
    found = []
    for folder in Path('/proc').glob('[0-9]*'):
        try:
            state, _, _, session = (folder / 'stat').read_text().rpartition(')')[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(session) in sessions and state != 'Z':
            found.append(int(folder.name))
    return found


def files_of(work_dir):
    """Names of the files in a work dir."""
    return sorted(path.name for path in Path(work_dir).iterdir() if path.is_file())


def broken_checkpoints(work_dir):
    """Names of incomplete checkpoints, among them the one in last_checkpoint."""
    record = Path(work_dir, 'last_checkpoint')
    paths = [*Path(work_dir).glob('*.pth'), *([Path(record.read_text())] if record.exists() else [])]
    return sorted({path.name for path in paths if not is_complete(path)})


def differences(first, second):
    """Where two checkpoints differ in their weights, averaged weights, optimizer or schedules."""
    parts = ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers')
    one, other = (torch.load(path, map_location='cpu', weights_only=True) for path in (first, second))
    leaves = [dict(_leaves({part: content.get(part) for part in parts})) for content in (one, other)]
    assert len(leaves[0]) > 50
    return sorted(
        name
        for name in leaves[0].keys() | leaves[1].keys()
        if name not in leaves[0] or name not in leaves[1] or not _equal(leaves[0][name], leaves[1][name])
    )


def _equal(one, other):
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def _leaves(node, name=''):
    if isinstance(node, dict):
        for key, child in node.items():
            yield from _leaves(child, f'{name}/{key}')
    elif isinstance(node, (list, tuple)):
        for index, child in enumerate(node):
            yield from _leaves(child, f'{name}/{index}')
    else:
        yield name, node
