"""The compiled libraries under another torch: the operator's tests in the interpreter named by MSDA_OTHER_PYTHON.

That interpreter needs torch >= 2.10, numpy, pytest and hypothesis. This package comes by PYTHONPATH, with the libraries
that are built here (or those in MSDA_LIBRARY_DIR).
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
OTHER = os.environ.get('MSDA_OTHER_PYTHON')
FILES = ['test_operator.py', 'test_operator_checks.py', 'test_operator_torch.py', 'test_operator_backends.py']

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not OTHER, reason='MSDA_OTHER_PYTHON names no interpreter with another torch'),
]


def run(*arguments):
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONDONTWRITEBYTECODE': '1'}
    environment.pop('MSDA_OTHER_PYTHON')
    return subprocess.run([OTHER, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_operator_under_another_torch():
    code = (
        'import torch; from msda_plugin.ops import backend_for; '
        'print(torch.__version__, backend_for("cpu", torch.float32).name)'
    )
    done = run('-c', code)
    assert done.returncode == 0, done.stderr
    version, backend = done.stdout.split()
    assert version != torch.__version__, f'MSDA_OTHER_PYTHON has torch {version} as well'
    assert backend == 'cpu', done.stderr
    done = run('-m', 'pytest', '-p', 'no:cacheprovider', *(f'tests/ops/{name}' for name in FILES))
    print(f'torch {version}: {done.stdout.strip().splitlines()[-1]}')
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert int(re.search(r'(\d+) passed', done.stdout)[1]) > 100
