"""The code of the tutorials runs. All fences of a page share a folder and a namespace:

- ``python`` is executed; ``python title="FILE"`` is written to FILE for the following blocks;
- ``bash`` (commands of msda_plugin) is executed in this process;
- ``sh`` is checked: the command exists and accepts its arguments.
"""

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmdet.visualization import DetLocalVisualizer
from torch.distributed.run import get_args_parser as torchrun_parser

from msda_plugin.__main__ import main

sybil = pytest.importorskip('sybil', reason='sybil is not installed; pip install -e ".[test]"')
from sybil.evaluators.python import PythonEvaluator  # noqa: E402
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer  # noqa: E402

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / 'docs' / 'tutorials').glob('*.md'))
NEEDS = {'tensorboard': 'tensorboard'}  # page -> optional package
FENCE = RawFencedCodeBlockLexer(re.compile(r'(?P<language>python|bash|sh)(?: title="(?P<file>[^"]+)")?$\n', re.M))
OWN = ('python', '-m', 'msda_plugin')


class Parsed(Exception):
    """The parser accepted the arguments of a command."""


def commands(block: str) -> Iterator[list[str]]:
    for line in block.replace('\\\n', ' ').splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r'\w+=\S*', words[0]):  # VARIABLE=value before a command
            del words[0]
        if words:
            yield words


def run(example) -> None:
    for words in commands(example.parsed):
        assert tuple(words[:3]) == OWN, f'{words} is not a command of msda_plugin: use an sh fence'
        DetLocalVisualizer._instance_dict.clear()  # MMEngine keeps one per process, with the last work dir
        assert main(words[3:]) == 0, words


def check_arguments(words: list[str]) -> None:
    """Raise AssertionError if the command does not exist, SystemExit if it rejects its arguments."""
    if words[0] == 'srun':
        words = words[next(i for i, word in enumerate(words) if i and not word.startswith('-')) :]
    if words[0] == 'torchrun':
        launch, unknown = torchrun_parser().parse_known_args(words[1:])
        assert launch.module and not unknown, words
        words = ['python', '-m', launch.training_script, *launch.training_script_args]
    if words[0] == 'mim':
        command = pytest.importorskip(f'mim.commands.{words[1]}', reason='mim is not installed').cli
        context = command.make_context(words[1], words[2:])  # mim passes unknown arguments to our parser
        words = [*OWN, words[1], context.params['config'], *context.params['other_args']]
    if words[0] in ('pip', 'tensorboard'):
        return
    assert tuple(words[:3]) == OWN, f'no check is implemented for {words}'
    with pytest.raises(Parsed):
        main(words[3:])


@pytest.fixture
def check(monkeypatch):
    """Parses the commands of a block; each stops after parsing its arguments."""
    parse = argparse.ArgumentParser.parse_args

    def parse_args(parser, *args, **kwargs):
        parse(parser, *args, **kwargs)
        raise Parsed

    def check_block(example) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, 'parse_args', parse_args)
            for words in commands(example.parsed):
                check_arguments(words)

    return check_block


def write(example) -> None:
    Path(example.region.lexemes['file']).write_text(example.parsed)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_tutorial(page, tmp_path, monkeypatch, check):
    if page.stem in NEEDS:
        pytest.importorskip(NEEDS[page.stem], reason=f'{NEEDS[page.stem]} is not installed')
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

    examples = list(sybil.Document.parse(str(page), parse).examples())
    assert examples, 'a tutorial needs at least one code block'
    for example in examples:
        example.evaluate()


@pytest.mark.parametrize(
    'command',
    [
        'python -m msda_plugin train config.py --epoch-count 3',
        'python -m msda_plugin no_such_command',
        'torchrun --gpus 4 -m msda_plugin train config.py',
        'conda install msda_plugin',
    ],
)
def test_unknown_commands_and_arguments_are_rejected(command, check):
    with pytest.raises((AssertionError, SystemExit, pytest.fail.Exception)):
        check(SimpleNamespace(parsed=command))
