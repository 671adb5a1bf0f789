"""A process that dies, raises or stalls ends the training of all processes, with a message that names it.

python -m pytest tests/reliability/test_processes_faults.py --long -s
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from msda_plugin.tools.shapes import generate

CONFIG = Path(__file__).resolve().parents[2] / 'configs/shapes/deformable-detr-two-stage_shunted-nano_1xb4-8e_shapes.py'
HOOK = '''
import os
import signal
from pathlib import Path

from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class FaultHook(Hook):
    """Records the process ids; one process fails after the second iteration."""

    def __init__(self, fault, rank, folder):
        self.fault, self.rank, self.folder = fault, rank, Path(folder)

    def before_train(self, runner):
        (self.folder / f'process{get_rank()}').write_text(str(os.getpid()))

    def after_train_iter(self, runner, *args, **kwargs):
        if get_rank() == self.rank and runner.iter == 1:
            (self.folder / 'fault').touch()
            if self.fault == 'raise':
                raise RuntimeError('this process cannot continue')
            os.kill(os.getpid(), getattr(signal, self.fault))
'''
TIMEOUT = 15  # seconds that a process waits for another one, instead of half an hour
FAULTS = {  # fault: message, and maximum seconds until the job ends
    'SIGKILL': (r'Signal 9 \(SIGKILL\) received by PID {pid}', 60),
    'raise': (r'\[rank{rank}\]: RuntimeError: this process cannot continue', 60),
    # The launcher waits half a minute for processes to exit.
    'SIGSTOP': (r'(?i)timed? ?out', TIMEOUT + 120),
}
pytestmark = pytest.mark.slow


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize('processes, rank', [(2, 1), (2, 0), (4, 2)])
@pytest.mark.parametrize('fault', FAULTS)
def test_failing_process_ends_the_training(fault, processes, rank, long_run, tmp_path):
    if not long_run and (fault, processes, rank) != ('SIGKILL', 2, 1):
        pytest.skip('needs --long')
    message, bound = FAULTS[fault]
    (tmp_path / 'fault_hook.py').write_text(HOOK)
    generate(str(tmp_path / 'data'), train=4 * processes, val=1, size=(64, 64))
    config = tmp_path / 'config.py'
    config.write_text(
        f"_base_ = '{CONFIG}'\ncustom_imports = dict(imports=['fault_hook'])\n"
        f"custom_hooks = [dict(type='FaultHook', fault='{fault}', rank={rank}, folder='{tmp_path}')]\n"
        f'env_cfg = dict(dist_cfg=dict(timeout={TIMEOUT if fault == "SIGSTOP" else 1800}))\n'
        'train_dataloader = dict(batch_size=1, num_workers=0, persistent_workers=False)\n'
        'val_dataloader = dict(num_workers=0, persistent_workers=False)\n'
    )
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    job = subprocess.Popen(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            f'--nproc_per_node={processes}',
            f'--master_port={port}',
            '-m',
            'msda_plugin',
            'train',
            str(config),
            '--launcher',
            'pytorch',
            '--work-dir',
            str(tmp_path / 'work'),
            '--cfg-options',
            f'data_root={tmp_path / "data"}/',
            'train_cfg.max_epochs=1',
        ],
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output = job.communicate(timeout=600)[0]
    finally:
        if job.poll() is None:  # it hangs: end all of its processes
            os.killpg(job.pid, signal.SIGKILL)
    ended = time.time()

    assert (tmp_path / 'fault').is_file(), output[-4000:]
    took = ended - (tmp_path / 'fault').stat().st_mtime
    pids = [int((tmp_path / f'process{index}').read_text()) for index in range(processes)]
    assert job.returncode != 0
    assert re.search(message.format(pid=pids[rank], rank=rank), output), output[-4000:]
    assert re.search(rf'rank +: {rank} \(local_rank: {rank}\)', output), output[-4000:]
    assert took < bound
    assert not any(alive(pid) for pid in pids)
    print(f'{fault} of process {rank} of {processes}: the job ended {took:.1f} s later')
