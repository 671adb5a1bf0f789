"""Invalid command lines end with status 0, 1 or 2 and one sentence, without traceback or incomplete files."""

import contextlib
import io
import json
import logging

import numpy as np
import pytest
import torch
from fuzzing import fuzz
from hypothesis import strategies as st
from PIL import Image

from msda_plugin.__main__ import main
from msda_plugin.backbones.vision_transformer import VisionTransformer
from msda_plugin.convert import FAMILIES
from msda_plugin.tools.shapes import generate

NUMBERS = ('0', '1', '2', '-1', '1.5', '1e400', 'nan', 'inf', 'x', '', '99999999999999999999', '0x10', '²')
ODD = (
    '',
    '-',
    '--',
    'ä',
    '\udcff',
    'a b',
    '--no-such-option',
    '--help=1',
    '../..',
    '/',
    'x' * 5000,
    'a\0b',
    '%s',
    '{}',
)
# Mostly existing files, so that later checks are reached as well.
CONFIGS = (*('none.py', 'empty.py', 'syntax.py', 'text.txt', 'strange.py', 'folder') * 5, *ODD)
CHECKPOINTS = (*('vit.pth', 'vit.pth', 'broken.pth', 'none.pth', 'folder', 'https://127.0.0.1:9/none.pth') * 5, *ODD)
IMAGES = (*('image.png', 'image.png', 'broken.png', 'none.png', 'folder', 'text.txt') * 5, *ODD)
OUTPUTS = (*('out.pth', 'out.pth', 'vit.pth', 'folder', 'none/out.pth') * 5, *ODD)
DATA = (*('shapes', 'shapes/annotations/train.json', 'text.txt', 'none', 'folder', 'image.png') * 5, *ODD)
DEVICES = ('cpu', 'cuda', 'cuda:99', 'tpu', 'cuda:-1', 'cuda:', 'CPU', '')


def option(name, *pool):
    """The option with one of these values, or without a value."""
    return st.sampled_from([*([name, value] for value in pool), [name]])


def line(command, positional, *options):
    """Positional arguments, mostly the right number of them, and up to three options in any order."""
    rest = st.lists(st.one_of(*options, st.sampled_from((*[[]] * 40, *([value] for value in ODD)))), max_size=3)
    return st.tuples(positional, rest).map(
        lambda drawn: [command, *drawn[0], *(part for some in drawn[1] for part in some)]
    )


def each(*pools):
    return st.tuples(*(st.sampled_from(pool) for pool in pools)).map(list)


NOTHING = st.just([])
score, device = option('--score-thr', *NUMBERS), option('--device', *DEVICES)
model = (
    option('--config', *CONFIGS),
    option('--checkpoint', *CHECKPOINTS),
    option('--out', 'pictures', *ODD),
    score,
    device,
)
lines = st.one_of(
    st.lists(st.sampled_from(('trian', 'env', '--version', *ODD)), max_size=2).map(
        lambda some: [part for part in some if part != 'env'] or ['--help']
    ),
    line(
        'shapes',
        NOTHING,
        option('--out', 'new', 'folder', 'text.txt', 'none/new', *ODD),
        st.just(['--train', '1']),
        st.just(['--val', '1']),
        option('--size', '32', '31', '32x33', '0', '9999', *NUMBERS),
        option('--train', '0', '1', '-1', 'x'),
        option('--seed', '1', '-1', 'x', '99999999999999999999'),
        st.just(['--force']),
    ).map(lambda argv: [*argv, '--train', '1', '--val', '1'] if '--train' not in argv or '--val' not in argv else argv),
    line(
        'convert',
        each((*FAMILIES, *['vision_transformer'] * 9, 'resnet', ''), CHECKPOINTS, OUTPUTS),
        option('--prefix', 'backbone', 'x', ''),
        option('--json', 'account.json', *OUTPUTS),
        st.just(['--force']),
    ),
    line(
        'complexity',
        st.one_of(NOTHING, each(('none.py', 'empty.py', 'syntax.py'))),
        *(
            option(f'--{name}', '8', '16', '256', *NUMBERS)
            for name in ('channels', 'heads', 'queries', 'window', 'reduction', 'points', 'depth')
        ),
        st.sampled_from(
            (
                ['--map', '4', '6'],
                ['--map', '4'],
                ['--size', '0', '9'],
                ['--measure', '4', '8'],
                ['--measure', '8'],
                ['--plot', 'none/x.png'],
                ['--map', '100000000', '100000000'],
            )
        ),
    ),
    line(
        'train',
        each(CONFIGS),
        option('--resume', *CHECKPOINTS),
        option('--work-dir', 'work', *ODD),
        option(
            '--cfg-options',
            'a=1',
            'a',
            '=',
            'model=1',
            'a.b.c=(',
            'train_cfg.max_epochs=x',
            "x=dict(type='A'",
            'mdoel=1',
        ),
        option('--launcher', 'none', 'x'),
        st.sampled_from((['--amp'], ['--extend'], ['--auto-scale-lr'], ['--epochs', '3'])),
    ),
    line(
        'train',
        st.sampled_from(DATA).map(lambda data: ['--data', data, '--dry-run', '--work-dir', 'work']),
        option('--val', *DATA),
        option('--val-part', *NUMBERS),
        option('--images', 'folder', *ODD),
        option('--classes', 'ring', 'moon', ''),
        option('--epochs', *NUMBERS),
        option('--batch-size', *NUMBERS),
        option('--accumulate', *NUMBERS),
        option('--effective-batch', '6', *NUMBERS),
        option('--lr', *NUMBERS),
        option('--image-size', '64', '31', '64x', *NUMBERS),
        option('--workers', *NUMBERS),
        device,
        option('--model', 'none', 'empty.py', *ODD),
        option('--load-from', *CHECKPOINTS),
        option('--seed', '3', 'x', '-1'),
    ),
    line('test', each(CONFIGS, CHECKPOINTS), option('--out', 'x.pkl', 'x.txt', *ODD), option('--work-dir', 'work')),
    line('demo', each(IMAGES), *model),
    line(
        'visualize',
        each(IMAGES),
        *model,
        option('--query', '1,2', '1', 'x,y', '-1,-1', '9999,9999'),
        option('--detection', *NUMBERS),
        option('--layer', 'all', 'none'),
    ),
    line('benchmark', st.one_of(NOTHING, each(('op', 'backbone', 'head', 'model', 'detectors', 'none')))).map(
        lambda argv: [*argv, '--no-such-option']
    ),
    line('env', NOTHING).map(lambda argv: [*argv, '--no-such-option']),
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the files that the command lines refer to."""
    generate(str(tmp_path / 'shapes'), train=2, val=1, size=(32, 32))
    torch.manual_seed(0)
    vit = VisionTransformer(dict(embed_dims=8, depth=1, num_heads=1, mlp_ratio=1), img_size=32)
    torch.save(vit.state_dict(), tmp_path / 'vit.pth')
    (tmp_path / 'broken.pth').write_bytes((tmp_path / 'vit.pth').read_bytes()[:500])
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / 'image.png')
    for name, text in (
        ('empty.py', ''),
        ('syntax.py', 'model = dict('),
        ('text.txt', 'hello'),
        ('broken.png', 'hello'),
        ('strange.py', "model = dict(type='msda_plugin.ShuntedTransformer', arch='none')\n"),
    ):
        (tmp_path / name).write_text(text)
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'folder' / 'note.txt').write_text('hello')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging, 'raiseExceptions', False)  # MMEngine's loggers keep closed streams
    return tmp_path


def test_command_lines(folder, long_run):
    def check(argv):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = main(list(argv))
            except SystemExit as stopped:
                status = 0 if stopped.code is None else stopped.code
        said = err.getvalue()
        assert status in (0, 1, 2) and 'Traceback' not in said, (argv, said)
        assert status == 0 or said.strip(), argv
        if status == 2 and not said.startswith('usage:'):
            sentence = [text for text in said.splitlines() if text.startswith(('msda_plugin', 'error:'))]
            assert len(sentence) == 1, (argv, said)
        unfinished = [path for path in folder.rglob('.*') if path.name not in ('.', '..')]
        assert not unfinished, (argv, unfinished)
        for path in folder.rglob('*.json'):
            json.loads(path.read_text())
        for path in folder.glob('out*.pth'):
            torch.load(path, weights_only=True)
        return f'status {status}'

    fuzz('command lines', lines, 600 if long_run else 35, check)
