"""The notebook runs top to bottom and is stored without outputs."""

import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest
from mmdet.visualization import DetLocalVisualizer

NOTEBOOK = Path(__file__).parents[2] / 'docs' / 'tutorial.ipynb'


@pytest.fixture
def cells():
    return [cell for cell in json.loads(NOTEBOOK.read_text())['cells'] if cell['cell_type'] == 'code']


def test_has_no_outputs(cells):
    assert cells and all(not cell['outputs'] and cell['execution_count'] is None for cell in cells)


def test_runs_top_to_bottom(cells, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    monkeypatch.setattr(plt, 'show', lambda: plt.close('all'))
    DetLocalVisualizer._instance_dict.clear()  # MMEngine keeps one per process, with the last work dir
    namespace = {}
    with matplotlib.rc_context({'backend': 'agg'}):
        for cell in cells:
            exec(compile(''.join(cell['source']), f'{NOTEBOOK.name}[{cell["id"]}]', 'exec'), namespace)
