"""Runs trainings in forks of this process, which has imported everything, so that each starts within a second.

It reads requests from standard input, one line of JSON each, and answers each with a line when the training has ended.

Request: ``argv`` of ``python -m msda_plugin train``, or a list of them; ``log``, a file for the output; optionally
``fault``, a method of `Faults` with its arguments; ``kill_after``, seconds until SIGKILL; ``max_file_size`` in bytes;
``disk``, a folder to mount a small disk on, and its bytes; ``measure``, a file for memory, threads and open files.

Answer: ``status``, negative if a signal ended the training; ``session``, the session id that its data-loading processes
share; ``peak``, the maximum memory in bytes.
"""

import ctypes
import gc
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import mmdet.apis
import mmdet.datasets
import mmdet.evaluation
import mmdet.models
import mmdet.visualization  # noqa: F401
import mmengine.config
import numpy as np
import torch
import torch._dynamo  # imported by every optimizer
from mmengine.fileio import LocalBackend
from yapf.yapflib import yapf_api

import msda_plugin.detectors  # noqa: F401
from msda_plugin.engine.hooks import training_report
from msda_plugin.engine.runner import DetectionRunner
from msda_plugin.tools import train  # noqa: F401
from msda_plugin.tools.common import launch  # noqa: F401


class Faults:
    """Each method sends SIGKILL to this process at the ``count``-th event (from 1) of its kind."""

    def hook(self, count, name):
        """Before the runner calls this method of its hooks."""
        self._replace(
            DetectionRunner,
            'call_hook',
            count,
            lambda original, runner, fn_name, **kwargs: _die(),
            lambda runner, fn_name, **kwargs: fn_name == name,
        )

    def write(self, count, part):
        """After this part of a checkpoint, from 0 to 1, is written."""

        def write_a_part(original, backend, content, path):
            with open(path, 'wb') as file:
                file.write(content[: round(part * len(content))])
            _die()

        self._replace(LocalBackend, 'put', count, write_a_part)

    def rename(self, count, suffix, before):
        """Before or after a file is renamed to a name with this suffix."""

        def around(original, path, target):
            if not before:
                original(path, target)
            _die()

        self._replace(Path, 'replace', count, around, lambda path, target: str(target).endswith(suffix))

    def remove(self, count):
        """Before an outdated checkpoint is removed."""
        self._replace(LocalBackend, 'remove', count, lambda *args: _die())

    @staticmethod
    def _replace(owner, name, count, fatal, is_one=lambda *args, **kwargs: True):
        original, seen = getattr(owner, name), 0

        def method(*args, **kwargs):
            nonlocal seen
            seen += is_one(*args, **kwargs)
            if seen == count and is_one(*args, **kwargs):
                return fatal(original, *args, **kwargs)
            return original(*args, **kwargs)

        setattr(owner, name, method)


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


class Measurements:
    """(iteration, memory in bytes, threads, open files) of this process after each iteration."""

    def __init__(self):
        self.rows = []
        original = DetectionRunner.call_hook

        def call_hook(runner, fn_name, **kwargs):
            original(runner, fn_name, **kwargs)
            if fn_name == 'after_train_iter':
                self.take(runner.iter + 1)

        DetectionRunner.call_hook = call_hook

    def take(self, iteration):
        pages = int(Path('/proc/self/statm').read_text().split()[1])
        self.rows.append(
            (
                iteration,
                pages * resource.getpagesize(),
                len(os.listdir('/proc/self/task')),
                len(os.listdir('/proc/self/fd')),
            )
        )


def small_disk(folder, size):
    """Mount a tmpfs at ``folder`` for this process only; returns a path to the original folder below it.

    Raises:
        OSError: If the process may not create namespaces.
    """
    below = os.open(folder, os.O_DIRECTORY)
    libc, identity = ctypes.CDLL(None, use_errno=True), (os.getuid(), os.getgid())

    def call(name, *arguments):
        if getattr(libc, name)(*arguments):
            raise OSError(ctypes.get_errno(), f'{name} failed')

    call('unshare', 0x10000000 | 0x00020000)  # CLONE_NEWUSER, CLONE_NEWNS
    Path('/proc/self/setgroups').write_text('deny')
    for name, number in zip(('uid_map', 'gid_map'), identity, strict=True):
        Path(f'/proc/self/{name}').write_text(f'0 {number} 1')
    call('mount', b'tmpfs', os.fsencode(folder), b'tmpfs', 0, f'size={size}'.encode())
    return f'/proc/self/fd/{below}'


def stop_workers():
    """End the processes that load data; otherwise collecting a data loader waits 5 seconds for each of them."""
    for worker in multiprocessing.active_children():
        worker.terminate()
        worker.join()


def join_threads():
    """Wait for threads that are about to end, such as the queue feeders of a collected data loader."""
    for thread in threading.enumerate():
        if thread is not threading.main_thread():
            thread.join(timeout=5)  # one that has leaked goes on, and is counted


def child(request):
    os.setsid()
    with open(request['log'], 'ab') as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    if request.get('max_file_size'):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python sets it; a write that is too long fails instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (request['max_file_size'],) * 2)
    if request.get('fault'):
        kind, *arguments = request['fault']
        getattr(Faults(), kind)(*arguments)
    if request.get('disk'):
        folder, size = request['disk']
        below = small_disk(folder, size)
        status = train.main(request['argv'])
        shutil.copytree(folder, below, dirs_exist_ok=True)
        return status
    if not request.get('measure'):
        return train.main(request['argv'])
    measurements, statuses = Measurements(), []
    for argv in request['argv'] if isinstance(request['argv'][0], list) else [request['argv']]:
        statuses.append(train.main(argv))
        stop_workers()
        gc.collect()
        join_threads()
        measurements.take(0)
    Path(request['measure']).write_text(json.dumps(measurements.rows))
    return max(statuses)


def main():
    # The slowest parts of such a small training: formatting the config for each checkpoint, and drawing the curves.
    yapf_api.FormatCode = mmengine.config.config.FormatCode = lambda text, **options: (text, True)
    training_report.draw_curves = lambda *args, **kwargs: np.zeros((8, 8, 3), np.uint8)
    gc.collect()
    gc.freeze()  # the forks need not collect these objects
    print('ready', flush=True)
    for line in iter(sys.stdin.readline, ''):
        request = json.loads(line)
        process = os.fork()
        if process == 0:
            sys.exit(child(request))
        end = time.monotonic() + (request.get('kill_after') or float('inf'))
        done = 0
        while not done:
            done, status, usage = os.wait4(process, os.WNOHANG)
            if not done and time.monotonic() > end:
                os.kill(process, signal.SIGKILL)
                done, status, usage = os.wait4(process, 0)
            time.sleep(0.01)
        print(
            json.dumps(dict(status=os.waitstatus_to_exitcode(status), session=process, peak=usage.ru_maxrss * 1024)),
            flush=True,
        )


if __name__ == '__main__':
    main()
