"""Measurements in a fresh process, unaffected by the caches and the peak memory of earlier ones."""

import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar('Result')


def in_a_process(function: Callable[..., Result], *arguments: object) -> Result:
    """Call a module-level function in a fresh process, which ignores Ctrl-C and ends with the caller.

    Raises:
        RuntimeError: If the function raises or its process dies, for example when memory runs out.
    """
    context = multiprocessing.get_context('spawn')
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(sender, function, arguments))
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by the process
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, previous)
    sender.close()
    try:
        result, error = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f'the measuring process ended with status {process.exitcode}'
            + (
                ': it was killed, perhaps because memory ran out; free some memory or measure something smaller'
                if process.exitcode == -signal.SIGKILL
                else ''
            )
        ) from None
    finally:
        process.terminate()
        process.join()
    if error:
        raise RuntimeError(error)
    return result


def _call(sender: Connection, function: Callable, arguments: tuple) -> None:
    try:
        sender.send((function(*arguments), None))
    except Exception as error:
        sender.send((None, f'{type(error).__name__}: {error}'))
        if os.environ.get('MSDA_TRACEBACK') == '1':
            raise


def peak_bytes(device: str = 'cpu') -> int:
    """Peak memory so far: allocations on a GPU, else the resident set of this process."""
    if torch.device(device).type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    if Path('/proc/self/status').exists():
        return status_bytes('VmHWM')
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def status_bytes(key: str) -> int:
    """An entry of Linux's ``/proc/self/status``, in bytes."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024
