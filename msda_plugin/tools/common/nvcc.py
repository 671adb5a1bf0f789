"""Finds the CUDA compiler. ``csrc/build.py`` uses it as well: the standard library is all it may import."""

import os
import shutil
from pathlib import Path


def find_nvcc() -> str | None:
    """The path of nvcc: from ``NVCC``, ``CUDA_HOME``, ``CUDA_PATH``, PATH or /usr/local/cuda; None if there is none."""
    homes = [Path(os.environ[key]) / 'bin' / 'nvcc' for key in ('CUDA_HOME', 'CUDA_PATH') if os.environ.get(key)]
    for candidate in (os.environ.get('NVCC'), *homes, 'nvcc', '/usr/local/cuda/bin/nvcc'):
        found = shutil.which(str(candidate)) if candidate else None
        if found:
            return found
    return None
