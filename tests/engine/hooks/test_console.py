"""What a training prints, with a toy detector, and that its log file has the rest."""

import io
import logging
import re
import sys

import pytest
from mmengine.hooks import Hook
from toy_training import ToyMetric, make_runner

from msda_plugin.engine.hooks import console
from msda_plugin.engine.hooks.console import ConsoleFilter, _duration, _print_classes, _summary
from msda_plugin.engine.runner import DetectionRunner


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(DetectionRunner, 'check_data', lambda *_: None)
    monkeypatch.setattr(DetectionRunner, 'as_written', None)


class Talks(Hook):
    def before_train_epoch(self, runner):
        runner.logger.info('a message of a user')
        runner.logger.warning(f'a warning of epoch {runner.epoch}')


def train(tmp_path, **options):
    options = dict(kind=DetectionRunner, epochs=2, hook=Talks()) | options
    runner = make_runner(tmp_path, **options)
    runner.train()
    return runner


def log_of(runner):
    with open(runner.logger.log_file) as file:
        return file.read()


def test_one_line_an_epoch_and_one_a_validation(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ToyMetric, 'further', dict(ring_precision=0.25, star_precision=float('nan')))
    runner = train(tmp_path)
    printed = capsys.readouterr().out.splitlines()
    number, time = r'\d+\.\d{3}', r'\d+:\d\d'
    expected = [
        rf'Training: 2 epochs of 3 iterations, 3 images, batch size 1\. Log: .*{re.escape(runner.timestamp)}\.log',
        'a message of a user',
        r'.* - mmengine - .*WARNING.* - a warning of epoch 0',
        rf'Epoch 1/2  loss {number}  lr 1\.0e-02  {time}(  ETA {time})?',
        r'  validation: AP 0\.100, AP50 0\.300',
        'a message of a user',
        r'.* - mmengine - .*WARNING.* - a warning of epoch 1',
        rf'Epoch 2/2  loss {number}  lr 1\.0e-02  {time}',
        r'  validation: AP 0\.400, AP50 0\.600',
        'AP per class, last validation:',
        '  ring  0.250',
        '  star      –',
    ]
    assert len(printed) == len(expected), '\n'.join(printed)
    for line, pattern in zip(printed, expected, strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)


def test_the_log_file_has_everything(tmp_path, capsys):
    log = log_of(train(tmp_path))
    for text in ('System environment:', 'Config:', 'Hooks will be executed', 'Saving checkpoint at 2 epochs'):
        assert log.count(text) == 1
    assert log.count('Epoch(train)') == 2 and log.count('Epoch(val)') == 2 and 'coco/bbox_mAP: 0.4000' in log
    assert log.count('creating index...') == log.count('index created!') == 2  # pycocotools prints these
    assert log.count('a message of a user') == log.count('a warning of epoch') == 2
    assert 'validation: AP' not in log  # MMEngine's lines are not doubled
    assert 'creating index' not in capsys.readouterr().out


def test_verbose_prints_what_the_log_file_gets(tmp_path, capsys):
    runner = train(tmp_path, verbose=True)
    printed = capsys.readouterr().out
    for text in ('System environment:', 'Config:', 'Hooks will be executed', 'Epoch(train)', 'creating index...'):
        assert text in printed and (text in log_of(runner)) == (text != 'creating index...')
    assert 'validation: AP' not in printed and 'ConsoleHook' not in printed


def test_a_training_by_iterations_has_a_line_at_each_validation(tmp_path, capsys):
    train(tmp_path, by_epoch=False)
    printed = [line for line in capsys.readouterr().out.splitlines() if re.match(r'Training|Iteration|  valid', line)]
    assert [re.match(r'\S+ [\d/.AP]+', line.strip())[0] for line in printed] == [
        'Training: 6',
        'Iteration 3/6',
        'validation: AP',
        'Iteration 6/6',
        'validation: AP',
    ]


def test_only_the_first_process_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console, 'is_main_process', lambda: False)
    train(tmp_path)
    printed = capsys.readouterr().out
    assert 'Epoch' not in printed and 'validation' not in printed and 'Training' not in printed


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv('TERM', 'xterm')
    monkeypatch.setenv('COLUMNS', '100')
    monkeypatch.delenv('NO_COLOR', raising=False)
    monkeypatch.setattr(console, 'REFRESH', 0.0)
    return Terminal()


def on_screen(terminal):
    """Lines without colors, and without those that were erased."""
    text = re.sub(r'\x1b\[[\d;?]*[mhl]', '', terminal.getvalue())
    lines = []
    for line in text.split('\n'):
        if '\x1b[1A' in line:  # up
            lines.pop()
        lines.append(re.split(r'\r|\x1b\[2K|\x1b\[1A', line)[-1])
    return lines


def test_a_terminal_gets_a_progress_bar_that_goes_away(tmp_path, terminal, monkeypatch):
    monkeypatch.setattr(sys, 'stdout', terminal)  # here, because pytest sets it between fixture and test
    runner = train(tmp_path)
    drawn = re.sub(r'\x1b\[\d+m', '', terminal.getvalue())
    assert re.search(r'Epoch 2/2 .*━.* 3/3.*loss \d', drawn) and re.search(r'Validating .*━.* 3/3', drawn)
    lines = on_screen(terminal)
    assert not any('━' in line for line in lines), lines
    assert [line.split('  ')[0] for line in lines if line.startswith('Epoch')] == ['Epoch 1/2', 'Epoch 2/2']
    assert sum('a warning of epoch' in line for line in lines) == 2
    assert sys.stdout is terminal and runner.logger.handlers[0].stream is terminal


def test_an_error_closes_the_progress_bar(tmp_path, terminal, monkeypatch):
    monkeypatch.setattr(sys, 'stdout', terminal)

    class Stop(Hook):
        def after_train_iter(self, runner, **_):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, hook=Stop())
    assert sys.stdout is terminal and terminal.getvalue().rstrip('\r\n').count('\x1b[?25h') == 1  # the cursor is back


@pytest.mark.parametrize(
    'path, function, level, message, extra, shown',
    [
        ('mmengine', 'train', logging.INFO, 'Saving', {}, False),
        ('mmengine', 'resume', logging.INFO, 'resumed epoch: 1', {}, True),
        ('mmengine', 'train', logging.WARNING, 'unexpected key', {}, True),
        ('mmengine', '__init__', logging.WARNING, '"FileClient" will be deprecated in future', {}, False),
        ('elsewhere', 'run', logging.INFO, 'hello', {}, True),
        ('elsewhere', 'run', logging.INFO, 'hello', dict(console=False), False),
        ('mmengine', 'train', logging.INFO, 'hello', dict(console=True), True),
    ],
)
def test_what_passes_to_the_console(path, function, level, message, extra, shown):
    import mmengine

    path = mmengine.__file__ if path == 'mmengine' else '/home/me/mmengine/hook.py'
    record = logging.LogRecord('mmengine', level, path, 1, message, (), None, func=function)
    vars(record).update(extra)
    assert ConsoleFilter().filter(record) is shown


def test_summary():
    metrics = dict(bbox_mAP=0.5, bbox_mAP_50=None, bbox_mAP_s=0.1, segm_mAP=0.25, ring_precision=0.1)
    assert _summary(metrics) == 'AP 0.500, AP50 –, mask AP 0.250'
    assert _summary(dict(accuracy=0.5)) == 'accuracy 0.500' and _summary({}) == 'no metrics'


def test_many_classes_have_several_columns(capsys):
    _print_classes({f'class{index}_precision': index / 100 for index in range(45)})
    title, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 15 and rows[0].split() == ['class0', '0.000', 'class15', '0.150', 'class30', '0.300']
    assert rows[14].split()[-2:] == ['class44', '0.440']
    _print_classes(dict(bbox_mAP=0.1))
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize('seconds, text', [(0.2, '0:00'), (75, '1:15'), (600, '10:00'), (3723, '1:02:03')])
def test_duration(seconds, text):
    assert _duration(seconds) == text
