import pickle
import re
import subprocess
import sys
import textwrap
import zipfile
from contextlib import nullcontext

import mmcv
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.runner import load_checkpoint
from mmengine.runner.checkpoint import _load_checkpoint

from msda_plugin import (
    compat,
    registry,  # noqa: F401  (importing it is what allows the types)
)


def test_a_message_hub_loads_with_weights_only(tmp_path):
    buffer = HistoryBuffer([1.0, 2.0], [1, 1])
    state = {
        'message_hub': {
            'log_scalars': {'train/loss': buffer},
            'runtime_info': {'best': np.float64(0.5), 'epoch': np.int64(3)},
        }
    }
    torch.save(state, tmp_path / 'epoch_1.pth')
    loaded = torch.load(tmp_path / 'epoch_1.pth', weights_only=True)['message_hub']
    np.testing.assert_array_equal(loaded['log_scalars']['train/loss'].data[0], [1.0, 2.0])
    assert loaded['runtime_info'] == {'best': 0.5, 'epoch': 3}


@pytest.mark.parametrize('package', [b'core', b'_core'])
def test_a_checkpoint_of_the_other_numpy_loads(package, tmp_path):
    buffer = HistoryBuffer([1.0, 2.0], [1, 1])
    torch.save({'loss': buffer, 'best': np.float64(0.5)}, tmp_path / 'here.pth')
    with zipfile.ZipFile(tmp_path / 'here.pth') as here, zipfile.ZipFile(tmp_path / 'other.pth', 'w') as other:
        for name in here.namelist():
            content = re.sub(rb'cnumpy\._?core\.', b'cnumpy.' + package + b'.', here.read(name))
            assert not name.endswith('data.pkl') or content.count(b'cnumpy.' + package + b'.multiarray') == 2
            other.writestr(name, content)
    loaded = _load_checkpoint(str(tmp_path / 'other.pth'))
    assert loaded['best'] == 0.5
    np.testing.assert_array_equal(loaded['loss'].data[0], [1.0, 2.0])


class Payload:
    def __reduce__(self):
        return print, ('executed',)


class Attribute:
    """Pickles as a call of `getattr` on a permitted class."""

    def __reduce__(self):
        return getattr, (HistoryBuffer, '__init__')


@pytest.mark.parametrize('meta', [Payload(), Attribute()], ids=['call', 'getattr'])
def test_other_types_are_refused(meta, tmp_path, capsys):
    path = str(tmp_path / 'bad.pth')
    torch.save({'state_dict': {}, 'meta': meta}, path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    with compat.load_checkpoints_strictly(), pytest.raises(ValueError, match='holds more than tensors|cannot be read'):
        load_checkpoint(torch.nn.Linear(1, 1), path)
    assert 'executed' not in capsys.readouterr().out


@pytest.mark.parametrize('strictly', [True, False])
def test_mmengine_loads_its_own_checkpoints(strictly, tmp_path):
    model = torch.nn.Linear(2, 3)
    path = str(tmp_path / 'epoch_1.pth')
    torch.save({'state_dict': model.state_dict(), 'message_hub': {'loss': HistoryBuffer([1.0], [1])}}, path)
    other = torch.nn.Linear(2, 3)
    with compat.load_checkpoints_strictly() if strictly else nullcontext():
        for _ in range(2):
            assert load_checkpoint(other, path)['message_hub']['loss'].current() == 1.0
    torch.testing.assert_close(other.weight, model.weight, rtol=0, atol=0)


def state():
    from mmdet.models.task_modules.assigners import hungarian_assigner, topk_hungarian_assigner
    from mmengine.runner import checkpoint

    from msda_plugin.heads.matching import HungarianMatcher

    assigners = [module.linear_sum_assignment for module in (hungarian_assigner, topk_hungarian_assigner)]
    loaders = [getattr(checkpoint, name, None) for name in ('load_from_local', 'load_from_http', '_safe_torch_load')]
    return [
        *loaders,
        dict(checkpoint.CheckpointLoader._schemes),
        mmcv.imflip,
        mmcv.image.geometric._scale_size,
        *assigners,
        HungarianMatcher.accepts_non_finite,
    ]


@pytest.fixture
def untouched():
    compat.restore()
    return state()


@pytest.mark.parametrize(
    'replace', [compat.load_checkpoints_strictly, compat.accept_sides_of_one_pixel, compat.match_non_finite_predictions]
)
def test_replacements_can_be_undone(replace, untouched):
    with replace() as handle:
        changed = state()
        assert changed != untouched
        with replace():  # is in effect
            assert state() == changed
        assert state() == changed
    assert state() == untouched
    handle = replace()
    assert state() == changed
    handle.close()
    assert state() == untouched
    replace()
    replace()
    compat.restore()
    compat.restore()
    assert state() == untouched


@pytest.fixture
def pycocotools_prints():
    from pycocotools.coco import COCO

    return lambda: COCO().createIndex()


def test_prints_of_pycocotools_can_be_redirected(pycocotools_prints, capsys):
    outer, inner = [], []
    with compat.redirect_pycocotools(outer.append):
        with compat.redirect_pycocotools(inner.append):
            pycocotools_prints()
        pycocotools_prints()
    assert outer == inner == ['creating index...', 'index created!'] and capsys.readouterr().out == ''
    pycocotools_prints()
    assert capsys.readouterr().out == 'creating index...\nindex created!\n'
    compat.redirect_pycocotools(outer.append)
    compat.restore()
    pycocotools_prints()
    assert len(outer) == 2 and 'index created!' in capsys.readouterr().out


def test_mmdet_is_imported_without_notices():
    program = """
        from mmengine.logging import logger, print_log
        from msda_plugin import compat
        compat.import_mmdet()
        import mmdet.datasets, mmdet.evaluation
        assert not hasattr(logger, 'print')
        print_log('OneDL')
    """
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout == 'OneDL\n' and 'faster_coco_eval' not in done.stderr, done


def test_loading_a_detector_changes_nothing(untouched, tmp_path):
    from msda_plugin.engine.inference import load_detector

    with pytest.raises(FileNotFoundError, match='no.pth does not exist'):
        load_detector(Config(dict(model=dict())), tmp_path / 'no.pth')
    assert state() == untouched


def test_an_import_changes_nothing_but_the_allow_list():
    """Of MMEngine, mmcv, MMDetection and torch: functions and classes of their modules, and registered loaders."""
    program = """
        import importlib, pkgutil, sys, types
        import mmcv.image, mmcv.ops, mmcv.cnn, mmdet.models, mmdet.apis, mmdet.datasets, mmdet.evaluation, torch
        import mmengine.runner, mmengine.hooks, mmengine.visualization
        from mmengine.runner.checkpoint import CheckpointLoader

        PACKAGES = ('mmengine', 'mmcv', 'mmdet', 'torch')
        KINDS = (types.FunctionType, types.BuiltinFunctionType, type, property, classmethod, staticmethod)

        def snapshot(modules):
            found = {}
            for module in modules:
                for name, value in list(vars(sys.modules[module]).items()):
                    if isinstance(value, KINDS):
                        found[module, name] = value
                    if isinstance(value, type) and value.__module__ == module:
                        for key, member in list(vars(value).items()):
                            if isinstance(member, KINDS):
                                found[module, name, key] = member
            return found

        modules = [name for name in sys.modules if name.split('.')[0] in PACKAGES]
        before, schemes = snapshot(modules), dict(CheckpointLoader._schemes)
        allowed = list(torch.serialization.get_safe_globals())
        assert ('mmengine.runner.checkpoint', 'load_from_local') in before
        assert ('mmcv.image.geometric', '_scale_size') in before and ('mmcv', 'imflip') in before
        assert ('mmengine.runner.runner', 'Runner', 'load_checkpoint') in before

        from msda_plugin import registry
        import msda_plugin.layers
        from msda_plugin.starter_weights import load_from_package
        for kind in vars(registry).values():
            if isinstance(kind, registry.Registry) and kind.scope == 'msda_plugin':
                kind.import_from_location()
        after = snapshot(modules)
        changed = [key for key, value in before.items() if after.get(key) is not value]
        assert not changed, changed
        assert CheckpointLoader._schemes.items() - schemes.items() == {('msda_plugin://', load_from_package)}
        assert schemes.items() <= CheckpointLoader._schemes.items()
        now = list(torch.serialization.get_safe_globals())
        assert len(now) > len(allowed) and all(item in now for item in allowed)
        assert 'msda_plugin.auto' not in sys.modules
        print('unchanged')
    """
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip().endswith('unchanged'), done.stderr[-3000:]
