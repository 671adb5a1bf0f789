import os
import subprocess
import sys

import pytest

from msda_plugin.acceleration import memory

SCRIPT = """
import resource, sys
import torch
from msda_plugin.acceleration import keep_freed_memory

assert keep_freed_memory() is (sys.argv[1] == 'kept')
for size in (10_001_000, 10_000_000):  # smaller, since glibc needs some bytes to align a tensor
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(size) for _ in range(4)]
    del tensors
pages = 160_000_000 / resource.getpagesize()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / pages)
"""
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(memory.SETTINGS)}


def new_pages(kept: bool, **environment: str) -> float:
    """The fraction of the pages of tensors that are new, though larger ones were freed just before."""
    arguments = [sys.executable, '-c', SCRIPT, 'kept' if kept else 'not kept']
    return float(subprocess.run(arguments, env=ENVIRONMENT | environment, check=True, capture_output=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='needs glibc')
def test_the_next_tensor_gets_the_freed_memory():
    assert new_pages(True) < 0.5


@pytest.mark.parametrize('variable', ['MALLOC_ARENA_MAX', 'GLIBC_TUNABLES'])
def test_the_settings_of_the_environment_stay(variable):
    value = 'glibc.malloc.arena_max=1' if variable == 'GLIBC_TUNABLES' else '1'
    assert new_pages(False, **{variable: value}) > 0.9


def test_another_system(monkeypatch):
    monkeypatch.setattr(memory.sys, 'platform', 'darwin')
    assert not memory.keep_freed_memory()


def test_a_library_without_settings(monkeypatch):
    monkeypatch.setattr(memory.os, 'environ', {})
    monkeypatch.setattr(memory.ctypes, 'CDLL', lambda name: object())
    assert not memory.keep_freed_memory()
