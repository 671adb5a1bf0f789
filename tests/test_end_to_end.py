"""The main job in small, as users start it: train, resume and test by `mim`, and by the package's own commands."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

from msda_plugin.tools.shapes import generate

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / 'configs/shapes/rtdetr_r18vd-nano_1xb4-7e_shapes.py'
SMALL = [
    'train_cfg.val_interval=1',
    'default_hooks.logger.interval=2',
    'train_dataloader.num_workers=0',
    'train_dataloader.persistent_workers=False',
    'val_dataloader.num_workers=0',
    'val_dataloader.persistent_workers=False',
    'test_dataloader.num_workers=0',
    'test_dataloader.persistent_workers=False',
]


def mmdet_distribution():
    names = {dist.metadata['Name'] for dist in metadata.distributions()}
    return 'onedl-mmdetection' if 'onedl-mmdetection' in names else 'mmdet'


def run(*command):
    # mim starts the `python` of its own environment by name.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])
    environment = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'} | {'PATH': path}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def logged(work_dir):
    """The last log file of a work dir."""
    return max(work_dir.glob('*/*.log')).read_text()


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'shapes'
    generate(str(folder), train=16, val=4, size=(128, 128), seed=1)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(shutil.which('mim', path=str(Path(sys.executable).parent)) is None, reason='mim is not installed')
@pytest.mark.skipif(
    mmdet_distribution() == 'mmdet' and find_spec('pkg_resources') is None,
    reason='openmim imports pkg_resources, which setuptools 82 and newer do not have',
)
def test_mim_trains_resumes_and_tests(data, tmp_path):
    mim, package = Path(sys.executable).parent / 'mim', mmdet_distribution()
    options = ['--work-dir', tmp_path, '--cfg-options', f'data_root={data}', *SMALL]
    run(mim, 'train', package, CONFIG, *options, 'train_cfg.max_epochs=1')
    assert (tmp_path / 'epoch_1.pth').is_file()

    log = run(mim, 'train', package, CONFIG, '--resume', *options, 'train_cfg.max_epochs=2')
    assert 'resumed epoch: 1' in log and (tmp_path / 'epoch_2.pth').is_file()
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    assert metrics['finished'] and [entry['epoch'] for entry in metrics['history']] == [1, 2]
    for name in ('curves.png', 'predictions.png'):
        assert (tmp_path / name).stat().st_size > 10_000

    before = (tmp_path / CONFIG.name).read_text()
    assert 'resume = False' in before and 'load_from = None' in before
    log = run(mim, 'test', package, CONFIG, '--checkpoint', tmp_path / 'epoch_2.pth', *options)
    assert 'AP50 ' in log and 'coco/bbox_mAP_50' in logged(tmp_path)
    assert (tmp_path / CONFIG.name).read_text() == before


def test_own_commands_train_and_test(data, tmp_path):
    options = ['--work-dir', tmp_path, '--cfg-options', f'data_root={data}', *SMALL]
    run(sys.executable, '-m', 'msda_plugin', 'train', CONFIG, *options, 'train_cfg.max_epochs=1')
    config = tmp_path / CONFIG.name
    before = config.read_text()
    # The config that a training leaves behind is complete: it tests by itself, with the data where it was.
    log = run(
        sys.executable,
        *('-m', 'msda_plugin', 'test', config, tmp_path / 'epoch_1.pth'),
        *('--show-dir', 'pictures', '--out', tmp_path / 'predictions.pkl'),
    )
    assert 'AP50 ' in log and 'AP per class' in log and (tmp_path / 'predictions.pkl').is_file()
    assert 'coco/bbox_mAP_50' in logged(tmp_path / 'test')
    # It stays as it was, so that a later training from it starts like the first one.
    assert config.read_text() == before and list(tmp_path.glob('*.py')) == [config]
    files = dict(re.findall(r'^(metrics|log|images|predictions): +(\S+)$', log, re.MULTILINE))
    assert 'coco/bbox_mAP_50' in json.loads(Path(files['metrics']).read_text())
    assert len(list(Path(files['images']).iterdir())) == 4 and Path(files['log']).is_file()
    assert all(Path(files[name]).is_relative_to(tmp_path / 'test') for name in ('metrics', 'log', 'images'))
