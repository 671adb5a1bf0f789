"""Memory that the process keeps for its next tensors."""

import ctypes
import os
import sys

MALLOPT = {-3: 1 << 30, -1: 1 << 30, -2: 1 << 26}  # mallopt(3): M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD, in bytes
SETTINGS = ('MALLOC_', 'GLIBC_TUNABLES', 'LD_PRELOAD')


def keep_freed_memory() -> bool:
    """Make the C library keep freed memory for the next tensors on the CPU.

    glibc returns large freed blocks to the system, which clears every page again for the next tensor. Models for large
    images spend much of their time in this. The setting is for the whole process and its later forks: they hold the
    peak of their memory until they end.

    Returns:
        Whether freed memory is kept. It is not with a C library other than glibc, or if environment variables choose an
        allocator or its settings (``LD_PRELOAD``, ``GLIBC_TUNABLES``, ``MALLOC_…``).
    """
    if not sys.platform.startswith('linux') or any(name.startswith(SETTINGS) for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)  # musl has none
    return mallopt is not None and all([mallopt(parameter, value) == 1 for parameter, value in MALLOPT.items()])
