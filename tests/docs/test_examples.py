"""The examples of the documents and of ``--help`` run. Every fence of a document has one of these languages:

- ``python`` is executed; ``python title="FILE"`` is written to FILE for the following blocks of the page;
- ``bash`` (commands of msda_plugin) is executed in this process;
- ``sh`` is for commands that cannot run in a test (they need COCO, GPUs, the network or minutes), and is checked: the
  command exists and accepts its arguments, and so do the configs and scripts that it names;
- ``text`` is neither.

All fences of a page share a folder and a namespace. The examples of ``--help`` are read from the epilogs of the parsers
and executed on small data; those in `TOO_LONG` are checked like ``sh``.
"""

import argparse
import importlib
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import cv2
import mmdet
import pytest
import torch
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config
from mmengine.registry import init_default_scope
from PIL import Image
from torch.distributed.run import get_args_parser as torchrun_parser

from msda_plugin.__main__ import COMMANDS, main
from msda_plugin.registry import MODELS
from msda_plugin.tools.shape_images import draw_image

sybil = pytest.importorskip('sybil', reason='sybil is not installed; pip install -e ".[test]"')
from sybil.evaluators.python import PythonEvaluator  # noqa: E402
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer  # noqa: E402

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    {
        path
        for pattern in ('*.md', 'docs/**/*.md', 'configs/*/README.md', 'projects/**/*.md')
        for path in ROOT.glob(pattern)
        if path.name != 'CHANGELOG.md' and re.search(r'^ *```', path.read_text(), re.M)
    }
)
# page -> optional package
NEEDS = {'tensorboard': 'tensorboard', 'accelerate_transformers': 'transformers', 'export': 'onnxruntime'}
LANGUAGES = r'(?P<language>python|bash|sh)(?: title="(?P<file>[^"]+)")?$\n'
FENCE = RawFencedCodeBlockLexer(re.compile(LANGUAGES, re.M))
OWN = ('python', '-m', 'msda_plugin')
OTHER_PROGRAMS = ('pip', 'source', 'tensorboard')  # not checked

SLOW = ('complexity', 'train', 'visualize')  # commands whose examples of --help take more than ten seconds
# Beginning of an example of --help that is not executed -> reason.
TOO_LONG = {'benchmark': 'minutes', 'complexity --measure': 'a minute'}
# Beginning of an example -> options added when it is executed.
NO_WORKERS = [
    f'{name}_dataloader.{option}'
    for name in ('train', 'val', 'test')
    for option in ('num_workers=0', 'persistent_workers=False')
]
SMALLER = {
    'shapes': ['--train', '8', '--val', '2', '--size', '96'],
    'train configs': ['--cfg-options', 'train_cfg.max_epochs=1', 'train_cfg.val_interval=1', *NO_WORKERS],
    'train --data': ['--image-size', '96', '--workers', '0', '--device', 'cpu'],
    'test': ['--cfg-options', *NO_WORKERS],
}
CONFIG = ROOT / 'configs' / 'shapes' / 'deformable-detr-two-stage_shunted-nano_1xb4-8e_shapes.py'


class Parsed(Exception):
    """The parser accepted the arguments of a command."""


def commands(block: str) -> Iterator[list[str]]:
    for line in re.split(r'\n| && ', block.replace('\\\n', ' ')):
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r'\w+=\S*', words[0]):  # VARIABLE=value before a command
            del words[0]
        if words[:1] == ['msda-plugin']:
            words[:1] = OWN
        if words:
            yield words


def run(example) -> None:
    for words in commands(example.parsed):
        assert tuple(words[:3]) == OWN, f'{words} is not a command of msda_plugin: use an sh fence'
        execute(words[3:])


def execute(words: list[str]) -> None:
    DetLocalVisualizer._instance_dict.clear()  # MMEngine keeps one per process, with the last work dir
    assert main(words) == 0, words


def check_block(block: str) -> None:
    folder = ROOT
    for words in commands(block):
        if words[0] == 'cd':
            folder = folder / words[1]
            assert folder.is_dir(), f'{folder} does not exist'
        else:
            check_files(words, folder)
            check_arguments(words)


def check_files(words: list[str], folder: Path) -> None:
    """Raise AssertionError if a config or script of this project or of MMDetection does not exist."""
    for word in words:
        if word.startswith('mmdet::'):
            path = Path(mmdet.__file__).parent / '.mim' / 'configs' / word.removeprefix('mmdet::')
            assert path.is_file(), f'MMDetection has no config {word}'
        if word.startswith(('configs/', 'projects/', 'tests/', 'csrc/', 'docs/', 'requirements/')):
            assert list(folder.glob(word)), f'{folder} has no {word}'


def check_arguments(words: list[str]) -> None:
    """Raise AssertionError if the command does not exist, SystemExit if it rejects its arguments."""
    if words[0] == 'srun':
        words = words[next(i for i, word in enumerate(words) if i and not word.startswith('-')) :]
    if words[0] == 'compute-sanitizer':
        words = words[words.index('python') :]
    if words[0] == 'torchrun':
        launch, unknown = torchrun_parser().parse_known_args(words[1:])
        assert launch.module and not unknown, words
        words = ['python', '-m', launch.training_script, *launch.training_script_args]
    if words[0] == 'mim':
        assert words[2] in ('onedl-mmdetection', 'mmdet', 'msda_plugin'), words
        command = pytest.importorskip(f'mim.commands.{words[1]}', reason='mim is not installed').cli
        context = command.make_context(words[1], words[2:])  # mim passes unknown arguments to our parser
        words = [*OWN, words[1], context.params['config'], *context.params['other_args']]
    if words[0] == 'make':
        targets = re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.M)
        assert all(word in targets for word in words[1:] if '=' not in word), words
        return
    script = words[:3] == ['python', '-m', 'pytest'] or words[0] == 'python' and words[1].endswith('.py')
    if script or words[0].endswith('.sh') or words[0] in OTHER_PROGRAMS:
        return
    assert words[:2] == ['python', '-m'] and words[2].startswith('msda_plugin'), f'no check is implemented for {words}'
    module = importlib.import_module('msda_plugin.__main__' if tuple(words[:3]) == OWN else words[2])
    with pytest.raises(Parsed):
        module.main(words[3:])


@pytest.fixture
def check(monkeypatch):
    """A function that checks the commands of a block without running them."""
    parse = argparse.ArgumentParser.parse_args

    def parse_args(parser, *args, **kwargs):
        parse(parser, *args, **kwargs)
        raise Parsed

    def check_example(example) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, 'parse_args', parse_args)
            check_block(example.parsed)

    return check_example


def write(example) -> None:
    Path(example.region.lexemes['file']).write_text(example.parsed)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT).with_suffix('')))
def test_page(page, tmp_path, monkeypatch, check, request):
    if page.stem in NEEDS:
        pytest.importorskip(NEEDS[page.stem], reason=f'{NEEDS[page.stem]} is not installed')
    if 'tutorials' not in page.parts and re.search(r'^ *```(python|bash)', page.read_text(), re.M):
        request.getfixturevalue('workplace')  # a tutorial makes its files
    else:
        (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.manual_seed(0)
    evaluators = dict(python=PythonEvaluator(), bash=run, sh=check)

    def parse(document):
        for region in FENCE(document):
            region.parsed = region.lexemes['source']
            region.evaluator = write if region.lexemes['file'] else evaluators[region.lexemes['language']]
            yield region

    for example in sybil.Document.parse(str(page), parse).examples():
        example.evaluate()


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT).with_suffix('')))
def test_fences_have_a_known_language(page):
    openings = re.findall(r'^ *```(.*)$', page.read_text(), re.M)[::2]
    assert openings
    for opening in openings:
        assert opening == 'text' or re.fullmatch(LANGUAGES, f'{opening}\n', re.M), f'```{opening} is not known'


def test_commands_of_mim_name_their_stack():
    """``mim train`` takes the name of the installed package, which differs between the stacks."""
    lines = [
        line
        for page in PAGES
        for block in re.findall(r'^```sh\n(.*?)^```', page.read_text().replace('\\\n', ' '), re.M | re.S)
        for line in block.splitlines()
        if re.search(r'^[^#]*\bmim (train|test) mmdet\b', line)
    ]
    assert lines and all(line.endswith('# originals') for line in lines), lines


def help_examples(command: str, monkeypatch) -> list[list[str]]:
    """The examples in the epilogs of a command and its subcommands, without ``python -m msda_plugin``."""
    parsers, init = [], argparse.ArgumentParser.__init__

    def record(parser, *args, **kwargs):
        init(parser, *args, **kwargs)
        parsers.append(parser)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, '__init__', record)
        with pytest.raises(SystemExit) as stopped:
            main([command, '--help'])
        assert stopped.value.code == 0
    text = '\n'.join(parser.epilog or '' for parser in parsers)
    found = re.findall(r'(?:python -m msda_plugin|msda-plugin) (\w.*?)(?=\. |\.?$)', text, re.M)
    assert len(found) == len(re.findall('python -m msda_plugin|msda-plugin', text)), text
    return [shlex.split(words) for words in dict.fromkeys(found)]


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    """A folder with the files that the examples name: data, images, and detectors with random weights."""
    folder = tmp_path_factory.mktemp('prepared')
    (folder / 'configs').symlink_to(ROOT / 'configs')
    for name in ('data/shapes', 'data/mine'):
        execute(['shapes', '--out', str(folder / name), *SMALLER['shapes']])
    Image.fromarray(draw_image(0, (128, 96))[0]).save(folder / 'photo.jpg')
    (folder / 'folder').mkdir()
    Image.fromarray(draw_image(1, (128, 96))[0]).save(folder / 'folder' / '1.jpg')
    clip = cv2.VideoWriter(str(folder / 'clip.mp4'), cv2.VideoWriter_fourcc(*'mp4v'), 5, (96, 64))
    for index in range(2):
        clip.write(draw_image(index, (96, 64))[0][..., ::-1])
    clip.release()
    cfg = Config.fromfile(CONFIG)
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    for checkpoint in ('work_dirs/shapes/epoch_7.pth', 'work_dirs/shapes/best.pth', 'work_dirs/mine/epoch_12.pth'):
        path = folder / checkpoint
        path.parent.mkdir(parents=True, exist_ok=True)
        cfg.dump(path.with_name(CONFIG.name))
        torch.save(dict(state_dict=model.state_dict(), meta={}), path)
    torch.save(dict(model=published_vit()), folder / 'mae_pretrain_vit_base.pth')
    return folder


@pytest.fixture
def workplace(prepared, tmp_path, monkeypatch):
    """The current folder is a copy of `prepared`."""
    shutil.copytree(prepared, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def published_vit() -> dict[str, torch.Tensor]:
    """A small Vision Transformer with timm's keys."""
    shapes = {
        'cls_token': (1, 1, 16), 'pos_embed': (1, 5, 16), 'patch_embed.proj.weight': (16, 3, 16, 16),
        'patch_embed.proj.bias': (16,), 'norm.weight': (16,), 'norm.bias': (16,),
        'blocks.0.attn.qkv.weight': (48, 16), 'blocks.0.attn.qkv.bias': (48,),
        'blocks.0.attn.proj.weight': (16, 16), 'blocks.0.attn.proj.bias': (16,),
        'blocks.0.mlp.fc1.weight': (64, 16), 'blocks.0.mlp.fc1.bias': (64,),
        'blocks.0.mlp.fc2.weight': (16, 64), 'blocks.0.mlp.fc2.bias': (16,),
        **{f'blocks.0.norm{i}.{name}': (16,) for i in (1, 2) for name in ('weight', 'bias')},
    }  # fmt: skip
    return {key: torch.zeros(shape) for key, shape in shapes.items()}


@pytest.mark.parametrize(
    'command', [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in COMMANDS]
)
def test_examples_of_help(command, workplace, monkeypatch, check):
    for number, words in enumerate(help_examples(command, monkeypatch)):
        line = ' '.join(words)
        if line.startswith(tuple(TOO_LONG)) or '--minutes' in words:
            check(SimpleNamespace(parsed=f'python -m msda_plugin {line}'))
            continue
        smaller = [option for start, options in SMALLER.items() if line.startswith(start) for option in options]
        if line.startswith('train --data'):
            smaller += ['--epochs', str(number)]  # one more for each, since --resume continues the one before
        execute(words + smaller)


def test_every_help_has_examples_or_needs_none(monkeypatch):
    without = {command for command in COMMANDS if not help_examples(command, monkeypatch)}
    assert without == {'mmcv-ops'}


@pytest.mark.parametrize(
    'command',
    [
        'python -m msda_plugin train config.py --epoch-count 3',
        'python -m msda_plugin no_such_command',
        'torchrun --gpus 4 -m msda_plugin train config.py',
        'conda install msda_plugin',
        'python -m msda_plugin train configs/no_such.py',
        'python -m msda_plugin train mmdet::dino/no_such.py',
        'cd no_such_folder',
        'mim train mmdetection configs/dino/dino-4scale_r50_8xb2-12e_coco.py',
        'make no-such-target',
        'python -m pytest tests/no_such_test.py',
    ],
)
def test_unknown_commands_and_arguments_are_rejected(command, check):
    with pytest.raises((AssertionError, SystemExit, pytest.fail.Exception)):
        check(SimpleNamespace(parsed=command))
