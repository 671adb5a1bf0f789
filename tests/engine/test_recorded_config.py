"""The config in a checkpoint is read as MMEngine would read it, and nothing in it is executed."""

import os
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import pytest
import torch
from mmcv.ops import batched_nms
from mmengine.config import Config
from mmengine.registry import init_default_scope

from msda_plugin.engine.inference import load_detector, read_checkpoint
from msda_plugin.engine.recorded_config import NotSelfContainedError, parse_config, recorded_config
from msda_plugin.registry import MODELS

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / 'configs' / 'shapes' / 'deformable-detr-two-stage_shunted-nano_1xb4-8e_shapes.py'
PIPELINE = "[dict(type='LoadImageFromFile'), dict(type='PackDetInputs')]"
LOADER = f"test_dataloader = dict(dataset=dict(type='CocoDataset', pipeline={PIPELINE}))\n"


class Evil:
    """Creates a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ('ran',)


def record(text):
    return dict(state_dict={}, meta=dict(cfg=text, dataset_meta=dict(classes=('a',))))


def malicious(model, pipeline=PIPELINE, **more):
    extra = ''.join(f'{name} = {value}\n' for name, value in more.items())
    return f'model = {model}\n' + LOADER.replace(PIPELINE, pipeline) + extra


# ---- the text -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('family', sorted((ROOT / 'configs').glob('[!_]*')), ids=lambda family: family.name)
def test_a_config_of_each_family_survives_its_record(family):
    path = min(family.glob('*.py'))
    cfg = Config.fromfile(path)
    cfg._format_python_code = False  # yapf takes seconds
    assert parse_config(cfg.pretty_text) == cfg.to_dict()


def test_text_that_yapf_formatted():
    cfg = Config.fromfile(CONFIG)
    assert parse_config(cfg.pretty_text) == cfg.to_dict()


def test_values():
    text = "a = {'x-y': (1, -2.5e-3), 3: [True, None, 'b' 'c']}\nb = dict(c=(-inf, 1e8), d=(), e=(1, ))"
    infinity = float('inf')
    assert parse_config(text) == dict(
        a={'x-y': (1, -2.5e-3), 3: [True, None, 'bc']}, b=dict(c=(-infinity, 1e8), d=(), e=(1,))
    )


@pytest.mark.parametrize(
    'text',
    [
        "import os; os.mkdir('ran')",
        "__import__('os').mkdir('ran')",
        "a = __import__('os').mkdir('ran')",
        "a = dict(b=[__import__('os').mkdir('ran')])",
        "a = dict(**dict(b=__import__('os').mkdir('ran')))",
        "a = dict([('b', __import__('os').mkdir('ran'))])",
        "a = {**{}, 'b': 1}",
        'a = [x for x in (1, 2)]',
        "a = f'{1}'",
        'a = b"x"',
        'a = ...',
        'a = b',
        'a = 9 ** 9 ** 9 ** 9',
        'a = -"b"',
        'a = b = 1',
        'a.b = 1',
        'a: int = 1',
        'if True: a = 1',
        'a = ' + '-' * 100_000 + '1',
        'a = ' + '[' * 100_000,
        'a = ' + '1+' * 100_000 + '1',
        'a = 1\0',
        'a = ',
    ],
)
def test_text_with_more_than_literals_is_refused(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='contains a config with more than literal values') as raised:
        parse_config(text)
    assert len(str(raised.value)) < 300 and not Path('ran').exists()


# ---- what it names --------------------------------------------------------------------------------------------------
ATTACKS = {
    'a function as model': malicious("dict(type='os.mkdir', path='ran')"),
    'a function in the model': malicious(
        "dict(type='RetinaNet', backbone=dict(type='os.mkdir', path='ran'), neck=None, bbox_head=None)"
    ),
    'a function as transform': malicious(
        "dict(type='mmdet.DetDataPreprocessor')", "[dict(type='LoadImageFromFile'), dict(type='os.mkdir', path='ran')]"
    ),
    'a function that builds the padding': malicious(
        "dict(type='ConvModule', in_channels=1, out_channels=1, kernel_size=1, padding='ran', padding_mode='os.mkdir')"
    ),
    'a module of the current folder': malicious("dict(type='evil.Model')"),
    'a module of the current folder as scope': malicious("dict(type='DetDataPreprocessor')", default_scope="'evil'"),
    'an import': malicious("dict(type='DetDataPreprocessor')", custom_imports="dict(imports=['evil'])"),
    'an expression that a module evaluates': malicious(
        "dict(type='RetinaHead', num_classes=1, in_channels=4, bbox_coder=dict(type='CameraMotionCompensation', "
        'warp_mode=\'__import__("os").mkdir("ran")\'))'
    ),
    'an expression as NMS': malicious(
        'dict(type=\'DetDataPreprocessor\', test_cfg=dict(nms=dict(type=\'__import__("os").mkdir("ran")\')))'
    ),
    'a function as NMS': malicious("dict(type='DetDataPreprocessor', test_cfg=dict(nms=dict(type='os.mkdir')))"),
    'another config': malicious(
        "dict(type='KnowledgeDistillationSingleStageDetector', teacher_config='evil.py', neck=None, backbone=dict("
        "type='ResNet', depth=18, base_channels=4), bbox_head=dict(type='RetinaHead', num_classes=1, in_channels=4))"
    ),
    'another checkpoint': malicious(
        "dict(type='RetinaHead', num_classes=1, in_channels=4, bbox_coder=dict(type='AppearanceFreeLink', "
        "checkpoint='evil.pth'))"
    ),
    'code': "model = __import__('os').mkdir('ran')",
}


@pytest.mark.parametrize('attack', ATTACKS)
def test_nothing_that_a_record_names_is_run(attack, tmp_path, monkeypatch):
    (tmp_path / 'file').mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path('evil.py').write_text("__import__('os').mkdir('ran')")
    torch.save(dict(state_dict={}, meta=Evil()), 'evil.pth')
    torch.save(record(ATTACKS[attack]), tmp_path / 'file' / 'best.pth')
    with pytest.raises((ValueError, KeyError)) as raised:
        load_detector(None, tmp_path / 'file' / 'best.pth', 'cpu')
    assert not Path('ran').exists() and 'evil' not in sys.modules
    assert isinstance(raised.value, KeyError) or len(str(raised.value).splitlines()) == 1


def test_the_attacks_work_without_protection(tmp_path, monkeypatch):
    """Without this, the test above would prove nothing."""
    init_default_scope('mmdet')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path('evil.py').write_text("__import__('os').mkdir('ran')")
    for attack in (
        'a function as model',
        'a function that builds the padding',
        'a module of the current folder',
        'an expression that a module evaluates',
        'another config',
    ):
        with suppress(Exception):
            MODELS.build(parse_config(ATTACKS[attack])['model'])
        assert Path('ran').is_dir(), attack
        Path('ran').rmdir()
        sys.modules.pop('evil', None)
    with suppress(Exception):
        nms = parse_config(ATTACKS['an expression as NMS'])['model']['test_cfg']['nms']
        batched_nms(torch.rand(2, 4), torch.rand(2), torch.zeros(2), nms)
    assert Path('ran').is_dir()


def test_own_packages_are_used_once_imported(monkeypatch):
    text = malicious("dict(type='my_package.Model')", custom_imports="dict(imports=['my_package'])")
    with pytest.raises(NotSelfContainedError, match='needs the module my_package, which is not imported'):
        recorded_config(record(text))
    monkeypatch.setitem(sys.modules, 'my_package', ModuleType('my_package'))
    assert recorded_config(record(text)).model.type == 'my_package.Model'


@pytest.mark.parametrize(
    'checkpoint',
    [
        {},
        dict(weight=torch.zeros(1)),
        dict(meta=None),
        dict(meta=dict(cfg=None)),
        record('a = 1'),
        record("model = dict(type='FasterRCNN')\ndata = dict(test=dict())"),  # MMDetection 2
        record('model = 1\n' + LOADER),
    ],
)
def test_no_record(checkpoint):
    assert recorded_config(checkpoint) is None


# ---- which config ---------------------------------------------------------------------------------------------------
@pytest.fixture
def run(tmp_path):
    """A function that writes a checkpoint with this record, and configs that differ in their number of queries."""

    def write(text, *configs):
        torch.save(record(text) if text else dict(state_dict={}), tmp_path / 'best.pth')
        for queries in configs:
            (tmp_path / f'{queries}.py').write_text(f"model = dict(type='X', num_queries={queries})\n{LOADER}")
        return tmp_path / 'best.pth'

    return write


def test_explicit_config_then_record_then_the_only_file(run, tmp_path):
    recorded = f"model = dict(type='X', num_queries=1)\n{LOADER}"
    needs_more = f"model = dict(type='no_such_package.X', num_queries=1)\n{LOADER}"
    checkpoint = run(recorded, 2, 3)
    assert read_checkpoint(tmp_path / '2.py', checkpoint)[0].model.num_queries == 2
    assert read_checkpoint(None, checkpoint)[0].model.num_queries == 1
    for text, reason in (
        (None, 'contains no config, and there are 2 Python files next to it'),
        (needs_more, 'needs the module no_such_package, which is not imported, and there are 2 Python files'),
    ):
        with pytest.raises(ValueError, match=f'{reason}.* choose it with --config'):
            read_checkpoint(None, run(text))
    (tmp_path / '3.py').unlink()
    for text in (None, needs_more):
        assert read_checkpoint(None, run(text))[0].model.num_queries == 2


def test_a_record_with_code_is_refused_even_next_to_a_config(run):
    with pytest.raises(ValueError, match='best.pth contains a config with more than literal .*; name its config file'):
        read_checkpoint(None, run("model = __import__('os')", 2))
