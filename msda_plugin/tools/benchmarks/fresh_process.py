"""Measuring in a process of its own, so that what ran before counts neither in its caches nor in its peak memory."""

import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

Result = TypeVar('Result')


def in_a_process(function: Callable[..., Result], *arguments: object) -> Result:
    """Call a function of a module in a fresh process, which Ctrl-C ends without a word of its own.

    Raises:
        RuntimeError: the function raised, or its process died, as it does where the memory runs out.
    """
    context = multiprocessing.get_context('spawn')
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(sender, function, arguments))
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the process inherits
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
            f'the process that measures ended with status {process.exitcode}'
            + (
                ': it was killed, for its memory perhaps; free some, or measure something smaller'
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


def peak_bytes() -> int:
    """The largest resident set of this process so far."""
    status = Path('/proc/self/status')
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith('VmHWM'))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
