"""The report of ``benchmark all``: results, failures, and a self-contained page."""

import base64
import re
import sys
from html.parser import HTMLParser
from importlib import import_module
from xml.etree import ElementTree

import pytest

from msda_plugin.__main__ import main
from msda_plugin.tools.benchmarks import op
from msda_plugin.tools.benchmarks.comparison import Comparison, Measurement
from msda_plugin.tools.benchmarks.report import Growth, Section, blocks, duration, slug, to_html

benchmark_all = import_module('msda_plugin.tools.benchmarks.all')
OP = 'msda_plugin benchmark op --quick --repeats 1 --device cpu --threads 1'


@pytest.fixture
def toy(monkeypatch):
    """The operator at a toy shape, and growth on toy maps."""
    monkeypatch.setattr(op, 'SHAPES', (op.Shape('toy', ((5, 6), (3, 2)), 1, 7, heads=2, head_dim=8),))
    monkeypatch.setattr(benchmark_all, 'GROWTH_CHANNELS', 16)
    monkeypatch.setattr(
        benchmark_all,
        'PARTS',
        {
            'Operator': ('The operator.', ['op --quick --repeats 1'], ['op --quick --repeats 2']),
            'Growth': ('Against the <resolution>.', ['8 12'], ['8 10']),
        },
    )


def benchmark(folder, *options):
    return main(['benchmark', 'all', '--device', 'cpu', '--threads', '1', '--out', str(folder), *options])


class Page(HTMLParser):
    """Checks that elements are closed; collects headings, table rows, links and the addresses of loaded files."""

    def __init__(self, text):
        super().__init__()
        self.open, self.loaded, self.links, self.ids, self.headings, self.rows = [], [], [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.loaded += [attrs[key] for key in ('src', 'srcset', 'data', 'action', 'poster') if key in attrs]
        self.links += [attrs['href']] if 'href' in attrs else []
        self.ids += [attrs['id']] if 'id' in attrs else []
        assert tag not in ('script', 'link', 'iframe', 'object', 'embed')
        if tag not in ('meta', 'img', 'br'):
            self.open.append(tag)
        if tag == 'tr':
            self.rows.append([])
        elif tag in ('td', 'th'):
            self.rows[-1].append('')
        elif tag == 'h2':
            self.headings.append('')

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if 'h2' in self.open:
            self.headings[-1] += data
        if {'td', 'th'} & set(self.open):
            self.rows[-1][-1] += data


def test_html_report_is_self_contained(toy, tmp_path, capsys):
    assert benchmark(tmp_path, '--quick') == 0
    text = (tmp_path / 'report.html').read_text()
    page = Page(text)
    assert page.headings == ['At a glance', 'Operator', 'Growth', 'Machine, versions, backends', 'Command']
    assert page.links and all(link.removeprefix('#') in page.ids for link in page.links)
    assert 'http' not in text and '@import' not in text and 'url(' not in text
    assert len(page.loaded) == 3  # the overview, and a plot of each part
    for address in page.loaded:
        kind, data = address.split(',', 1)
        assert kind == 'data:image/svg+xml;base64'
        picture = ElementTree.fromstring(base64.b64decode(data))
        assert picture.tag.endswith('svg')
        references = [value for node in picture.iter() for key, value in node.items() if key.endswith('href')]
        assert all(reference.startswith('#') for reference in references)
    assert ['toy', 'forward', 'toy', 'forward + backward'] == [
        cell for row in page.rows if row[0] == 'toy' for cell in row[:2]
    ]
    assert any(row[:3] == ['device', 'dtype', 'backend'] for row in page.rows)
    assert [row[1] for row in page.rows if row[0] == 'CPU']
    assert 'Against the &lt;resolution&gt;.' in text
    assert 'Quick form' in text and 'python -m msda_plugin benchmark op --quick --repeats 2' in text
    out = capsys.readouterr().out
    assert '[2/2, 0:0' in out and 'toy, forward: mmcv ' in out and str(tmp_path / 'report.html') in out


def test_markdown_report(toy, tmp_path, capsys):
    assert benchmark(tmp_path) == 0
    text = (tmp_path / 'report.md').read_text()
    assert re.findall('^## (.*)', text, re.M) == [
        'At a glance',
        'Operator',
        'Growth',
        'Machine, versions, backends',
        'Command',
    ]
    pictures = re.findall(r'!\[.+\]\((.+)\)', text)
    assert (
        sorted(pictures)
        == sorted(path.name for path in tmp_path.glob('*.svg'))
        == ['growth.svg', 'operator.svg', 'overview.svg']
    )
    for table in re.findall(r'(?:^\|.*\n)+', text, re.M):
        assert len({line.count('|') for line in table.splitlines()}) == 1
    assert re.search(r'^\| toy \| forward \| .+ms \| .+ms \| [\d.]+× \|$', text, re.M)
    assert re.search(r'^\| full self-attention \| .+ms \| .+ms \| -?\d\.\d\d \|$', text, re.M)
    assert 'python -m msda_plugin complexity --measure 8 12 --device cpu\n' in text
    assert 'quick' not in text.split('## Command')[0].split('## At a glance')[0]


def test_report_names_failed_part(toy, tmp_path, monkeypatch, capsys):
    def no_operator(device):
        raise RuntimeError('this build of mmcv has no ms_deform_attn')

    monkeypatch.setattr(op, 'mmcv_path', no_operator)
    assert benchmark(tmp_path) == 1
    text = (tmp_path / 'report.md').read_text()
    assert f'> **Not measured:** `python -m {OP}` failed: this build of mmcv has no ms_deform_attn' in text
    assert '| full self-attention |' in text
    page = Page((tmp_path / 'report.html').read_text())
    assert ['Operator', '–', '0', '–', 'see below'] in page.rows
    assert len(page.loaded) == 1  # no overview
    assert 'Traceback' not in ''.join(capsys.readouterr())


def test_ctrl_c_writes_report_of_results_so_far(toy, tmp_path, monkeypatch, capsys):
    def one_row(*_):
        yield Comparison('first', 'forward', ('mmcv', 'ours'), Measurement(0.3), Measurement(0.1))
        raise KeyboardInterrupt

    monkeypatch.setattr(op, 'compare', one_row)
    assert benchmark(tmp_path, '--quick') == 130
    text = (tmp_path / 'report.md').read_text()
    assert '| first | forward | 300 ms | 100 ms | 3.00× |' in text
    before, after = text.split('## Growth')
    assert '**Not measured:** Interrupted by Ctrl-C.' in before
    assert '**Not measured:** Not started before Ctrl-C.' in after
    assert 'writing the report of the measurements so far' in capsys.readouterr().err


@pytest.mark.parametrize('quick', [False, True])
def test_every_planned_command_line_is_valid(quick):
    planned = benchmark_all.sections(quick, ['cpu', 'cuda'], 3)
    assert [section.title for section in planned] == [
        f'{part}, {device}' for device in ('cpu', 'cuda') for part in benchmark_all.PARTS
    ]
    for section in planned:
        for command in section.commands:
            assert f'--device {section.title.split(", ")[1]}' in command
            if 'cuda' not in command:
                conditions, _ = benchmark_all.start_command(command)
                assert 'torch' in conditions and 'cpu' in conditions


def test_selected_parts():
    (section,) = benchmark_all.sections(True, ['cpu'], 1, ['heads'])
    assert section.title == 'Heads'
    assert section.commands == ('msda_plugin benchmark head --repeats 3 --device cpu --threads 1',)


@pytest.mark.parametrize(
    'options, message',
    [
        (['--threads', '0'], '--threads is 0, but at least 1 is needed'),
        (['--device', 'tpu'], "--device must be cpu, cuda or cuda:N, got 'tpu'"),
        (['--device', 'cuda:99'], '--device is cuda:99, but torch'),
        (['--parts', 'heart'], "invalid choice: 'heart'"),
    ],
)
def test_invalid_options(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        benchmark(tmp_path / 'out', *options)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_report_contains_memory_and_remarks():
    rows = [
        Comparison(
            'model',
            'inference',
            ('stock', 'accelerated'),
            Measurement(9.0, 2_000_000_000, 6.0),
            Measurement(4.5, 500_000_000, 1.0),
        ),
        Comparison('model', 'training step', ('stock', 'accelerated'), Measurement(2.0), Measurement(4.0), 1e-6),
    ]
    section = Section('Models', 'Before and after.', ('msda_plugin benchmark model',), items=[*rows, 'A remark.'])
    report = benchmark_all.Report(
        'title', 'remark', [('CPU', 'one')], [('cpu', 'float32', 'cpu', 'why')], 'env', 'x', [section]
    )
    text = to_html(report.title, blocks(report))
    rows = [row for row in Page(text).rows if row[0] == 'model']
    assert rows == [
        ['model', 'inference', '9.00 s', '4.50 s', '2.00×', '2000', '500', '25%', ''],
        ['model', 'training step', '2.00 s', '4.00 s', '0.50×', '', '', '', '1.0e-06'],
    ]
    assert '<li>A remark.</li>' in text and '0.50× to 2.00×' in text


def test_comparisons_between_own_forms_are_not_in_overview():
    row = Comparison('encoder', 'forward', ('float32', 'bfloat16'), Measurement(1.0), Measurement(2.0))
    assert Section('', '', (), items=[row]).speeds == []


def test_growth_exponents():
    growth = Growth((10, 20, 40), {'linear': [1.0, 4.0, 16.0], 'quadratic': [1.0, 16.0, 256.0]})
    assert growth.pixels == [100, 400, 1600]
    assert growth.exponents == pytest.approx(dict(linear=1, quadratic=2))


def test_formatting_and_machine():
    assert [duration(seconds) for seconds in (0.00123, 0.0201, 0.9994, 0.9996, 12.345)] == [
        '1.23 ms',
        '20.1 ms',
        '999 ms',
        '1.00 s',
        '12.35 s',
    ]
    assert slug('Growth with resolution, cuda') == 'growth-with-resolution-cuda'
    assert benchmark_all.available_cores() >= 1 and benchmark_all.memory_gib() > 0
    if sys.platform == 'linux':
        assert benchmark_all.cpu_name()
