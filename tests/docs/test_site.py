"""The documentation builds without warnings, and the reference contains every public name."""

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = {  # page of docs/api -> package whose public names it documents
    'detector': 'engine.detector',
    'ops': 'ops',
    'layers': 'layers',
    'backbones': 'backbones',
    'necks': 'necks',
    'heads': 'heads',
    'detectors': 'detectors',
    'convert': 'convert',
    'hooks': 'engine.hooks',
    'visualization': 'visualization',
    'costs': 'costs',
}


def test_builds_and_has_every_public_name(tmp_path):
    for package in ('mkdocs', 'material', 'mkdocstrings'):
        pytest.importorskip(package, reason=f'{package} is not installed; pip install -r requirements/docs.txt')
    shutil.copytree(ROOT / 'docs', tmp_path / 'docs')
    shutil.copy(ROOT / 'mkdocs.yml', tmp_path)
    (tmp_path / 'msda_plugin').symlink_to(ROOT / 'msda_plugin')
    done = subprocess.run(
        [sys.executable, '-m', 'mkdocs', 'build', '--strict'], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, package in PAGES.items():
        page = (tmp_path / 'build/site/api' / name / 'index.html').read_text()
        module = importlib.import_module(f'msda_plugin.{package}')
        public = [name for name in module.__all__ if callable(getattr(module, name))]
        missing = [p for p in public if not re.search(rf'id="msda_plugin\.{re.escape(package)}(\.\w+)?\.{p}"', page)]
        assert public and not missing, f'docs/api/{name}.md lacks {missing}'
