"""The report of ``benchmark all``, as Markdown and as a self-contained HTML page."""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from msda_plugin.tools.benchmarks.comparison import Comparison
from msda_plugin.tools.benchmarks.growth import exponent
from msda_plugin.tools.benchmarks.plots import draw_overview, draw_speeds, growth_svg, times

OWN_FORMS = ('parts', 'float32')  # in the comparisons of ``benchmark op``


@dataclass(frozen=True)
class Growth:
    """Time of each kind of attention on square maps: name -> (len(sides),) seconds."""

    sides: tuple[int, ...]
    seconds: dict[str, list[float]]

    @property
    def pixels(self) -> list[int]:
        return [side**2 for side in self.sides]

    @property
    def exponents(self) -> dict[str, float]:
        """The b of time ~ pixels^b for each kind of attention."""
        return {name: exponent(self.pixels, values) for name, values in self.seconds.items()}


Item = Comparison | Growth | str


@dataclass
class Section:
    """One part of the report.

    Attributes:
        title: Heading.
        compared: A sentence that says what is compared.
        commands: Command lines that measure it, without ``python -m``.
        conditions: Conditions of each command that was started.
        items: Comparisons, growths and remarks, in order.
        missing: Sentences that say what was not measured, and why.
    """

    title: str
    compared: str
    commands: tuple[str, ...]
    conditions: list[str] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def cases(self) -> int:
        """Number of comparisons and of layers whose growth was measured."""
        return sum(
            len(item.seconds) if isinstance(item, Growth) else isinstance(item, Comparison) for item in self.items
        )

    @property
    def speeds(self) -> list[float]:
        """Speeds of the comparisons with another implementation; not between two forms of our own operator."""
        return [item.speed for item in self.items if isinstance(item, Comparison) and item.sides[0] not in OWN_FORMS]


@dataclass
class Report:
    """The content of the report.

    Attributes:
        title: Title of the page.
        remark: A sentence below the title.
        machine: Rows (property, value) that describe the machine.
        backends: Rows (device, dtype, backend, reason), as printed by ``python -m msda_plugin env``.
        environment: Output of ``python -m msda_plugin env``.
        command: The command line that wrote the report.
        sections: The parts.
    """

    title: str
    remark: str
    machine: list[tuple[str, str]]
    backends: list[tuple[str, str, str, str]]
    environment: str
    command: str
    sections: list[Section]


# ---- the content ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Missing:
    text: str


@dataclass(frozen=True)
class Lines:
    """Commands, or the output of a command."""

    text: str


@dataclass(frozen=True)
class Bullets:
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table; columns of numbers are aligned to the right."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def is_number(self, column: int) -> bool:
        return bool(self.rows) and all(re.match(r'[\d.–-]', row[column]) or not row[column] for row in self.rows)


@dataclass(frozen=True)
class Figure:
    name: str
    svg: str
    alt: str


Block = Heading | Text | Missing | Lines | Bullets | Table | Figure


def blocks(report: Report) -> list[Block]:
    """The blocks of the report below its title."""
    speeds = {section.title: section.speeds for section in report.sections if section.speeds}
    content: list[Block] = [Text(report.remark), Table(('machine', ''), tuple(report.machine[:4]))]
    content.append(Heading('At a glance'))
    if speeds:
        content.append(Figure('overview', draw_overview(speeds), 'Speed against stock, by part'))
    content.append(
        Table(
            ('part', 'measured against', 'cases', 'times as fast', 'not measured'),
            tuple(
                (
                    section.title,
                    ', '.join(dict.fromkeys(item.sides[0] for item in section.items if isinstance(item, Comparison)))
                    or '–',
                    str(section.cases),
                    _span(section.speeds),
                    'see below' if section.missing else '',
                )
                for section in report.sections
            ),
        )
    )
    for section in report.sections:
        content += _section(section)
    content += [
        Heading('Machine, versions, backends'),
        Table(('machine', ''), tuple(report.machine)),
        Table(('device', 'dtype', 'backend', 'reason'), tuple(report.backends)),
        Text('Output of `python -m msda_plugin env`:'),
        Lines(report.environment),
        Heading('Command'),
        Lines(report.command),
    ]
    return content


def _section(section: Section) -> list[Block]:
    content: list[Block] = [Heading(section.title), Text(section.compared)]
    content += [Missing(sentence) for sentence in section.missing]
    compared = [item for item in section.items if isinstance(item, Comparison)]
    for number, (sides, rows) in enumerate(groupby(compared, attrgetter('sides'))):
        rows = list(rows)
        content.append(
            Figure(
                f'{slug(section.title)}{f"-{number + 1}" if number else ""}',
                draw_speeds(
                    [f'{row.case}, {row.run}' for row in rows],
                    [row.speed for row in rows],
                    [_note(row) for row in rows],
                    sides=sides,
                ),
                f'{section.title}: {sides[1]} against {sides[0]}',
            )
        )
        content.append(_comparison_table(sides, rows))
    for item in section.items:
        if isinstance(item, Growth):
            content.append(
                Figure(
                    slug(section.title),
                    growth_svg(item.pixels, item.seconds, item.exponents),
                    f'{section.title}: time against pixels',
                )
            )
            content.append(
                Table(
                    ('layer', *(f'{side}×{side}' for side in item.sides), 'growth, b of pixels^b'),
                    tuple(
                        (name, *map(duration, values), f'{item.exponents[name]:.2f}')
                        for name, values in item.seconds.items()
                    ),
                )
            )
    remarks = tuple(item for item in section.items if isinstance(item, str))
    content += [Bullets(remarks)] if remarks else []
    content += [Text(text) for text in dict.fromkeys(section.conditions)]
    return [*content, Lines('\n'.join(f'python -m {command}' for command in section.commands))]


def _note(row: Comparison) -> str:
    return f'{duration(row.stock.seconds)} → {duration(row.ours.seconds)}' + (
        f', memory {row.memory:.0%}' if row.memory is not None else ''
    )


def _comparison_table(sides: tuple[str, str], rows: Sequence[Comparison]) -> Table:
    head = ['case', 'run', *sides, 'times as fast']
    cells = [
        [row.case, row.run, duration(row.stock.seconds), duration(row.ours.seconds), times(row.speed)] for row in rows
    ]
    if any(row.memory is not None for row in rows):
        head += [f'{side}, MB' for side in sides] + ['memory']
        for row, cell in zip(rows, cells, strict=True):
            cell += (
                ['', '', '']
                if row.memory is None
                else [f'{row.stock.peak / 1e6:.0f}', f'{row.ours.peak / 1e6:.0f}', f'{row.memory:.0%}']
            )
    if any(row.difference is not None for row in rows):
        head.append('largest difference')
        for row, cell in zip(rows, cells, strict=True):
            cell.append('' if row.difference is None else f'{row.difference:.1e}')
    return Table(tuple(head), tuple(map(tuple, cells)))


def _span(speeds: Sequence[float]) -> str:
    if not speeds:
        return '–'
    low, high = times(min(speeds)), times(max(speeds))
    return low if low == high else f'{low} to {high}'


def duration(seconds: float) -> str:
    """0.02013 → '20.1 ms', 9.3 → '9.30 s'"""
    return f'{seconds:.2f} s' if seconds >= 0.9995 else f'{seconds * 1e3:.3g} ms'


def slug(title: str) -> str:
    """'Growth with resolution, cuda' → 'growth-with-resolution-cuda'"""
    return re.sub(r'\W+', '-', title.lower()).strip('-')


# ---- Markdown and HTML ----------------------------------------------------------------------------------------------
def write_report(report: Report, folder: Path) -> list[Path]:
    """Write the self-contained ``report.html``, and ``report.md`` with its figures as SVG files.

    Returns:
        The paths of the two reports.
    """
    content = blocks(report)
    for block in content:
        if isinstance(block, Figure):
            (folder / f'{block.name}.svg').write_text(block.svg, encoding='utf-8')
    texts = {'report.html': to_html(report.title, content), 'report.md': to_markdown(report.title, content)}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding='utf-8')
    return [folder / name for name in texts]


def to_markdown(title: str, content: Sequence[Block]) -> str:
    """The report as Markdown, which refers to the figures by their file names."""
    return '\n\n'.join([f'# {title}', *map(_markdown, content)]) + '\n'


def _markdown(block: Block) -> str:
    match block:
        case Heading(text):
            return f'## {text}'
        case Text(text):
            return text
        case Missing(text):
            return f'> **Not measured:** {text}'
        case Lines(text):
            return f'```\n{text}\n```'
        case Bullets(texts):
            return '\n'.join(f'- {text}' for text in texts)
        case Figure(name, _, alt):
            return f'![{alt}]({name}.svg)'
        case Table(head, rows):
            marks = ('---:' if block.is_number(i) else '---' for i in range(len(head)))
            lines = [head, tuple(marks), *rows]
            return '\n'.join('| ' + ' | '.join(cell.replace('|', '\\|') for cell in line) + ' |' for line in lines)


def to_html(title: str, content: Sequence[Block]) -> str:
    """The report as one HTML page with embedded figures."""
    links = ' · '.join(
        f'<a href="#{slug(block.text)}">{html.escape(block.text)}</a>'
        for block in content
        if isinstance(block, Heading)
    )
    body = '\n'.join(map(_html, content))
    return PAGE.replace('%TITLE%', html.escape(title)).replace('%LINKS%', links).replace('%BODY%', body)


def _html(block: Block) -> str:
    match block:
        case Heading(text):
            return f'<h2 id="{slug(text)}">{html.escape(text)}</h2>'
        case Text(text):
            return f'<p>{_inline(text)}</p>'
        case Missing(text):
            return f'<p class="missing"><b>Not measured:</b> {_inline(text)}</p>'
        case Lines(text):
            return f'<pre>{html.escape(text)}</pre>'
        case Bullets(texts):
            return '<ul>' + ''.join(f'<li>{_inline(text)}</li>' for text in texts) + '</ul>'
        case Figure(_, svg, alt):
            data = base64.b64encode(svg.encode()).decode()
            return f'<img alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{data}">'
        case Table(head, rows):
            kinds = [' class="number"' if block.is_number(i) else '' for i in range(len(head))]
            lines = [
                ''.join(f'<{tag}{kind}>{_inline(cell)}</{tag}>' for cell, kind in zip(line, kinds, strict=True))
                for line, tag in ((head, 'th'), *((row, 'td') for row in rows))
            ]
            return (
                '<div class="wide"><table>\n<thead><tr>'
                + lines[0]
                + '</tr></thead>\n<tbody>\n'
                + '\n'.join(f'<tr>{line}</tr>' for line in lines[1:])
                + '\n</tbody></table></div>'
            )


def _inline(text: str) -> str:
    return re.sub(r'`([^`]+)`', r'<code>\1</code>', html.escape(text, quote=False))


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>%TITLE%</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #f4f5f7; margin: 0; }
  main { max-width: 980px; margin: 0 auto; padding: 20px 28px 48px; background: #fff; }
  h1 { font-size: 25px; margin: 12px 0 4px; }
  h2 { font-size: 19px; margin: 38px 0 6px; padding-top: 14px; border-top: 1px solid #dde1e6; }
  nav { font-size: 14px; margin: 4px 0 14px; }
  a { color: #00568a; text-decoration: none; }
  a:hover { text-decoration: underline; }
  img { display: block; width: 100%; height: auto; margin: 12px 0; }
  .wide { overflow-x: auto; margin: 12px 0; }
  table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
  th, td { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid #e8ebee; vertical-align: top; }
  th { font-weight: 600; color: #555; white-space: nowrap; }
  .number { text-align: right; white-space: nowrap; }
  pre { background: #f4f5f7; padding: 10px 12px; font-size: 13px; line-height: 1.4; overflow-x: auto;
        max-height: 26em; }
  code { background: #f4f5f7; padding: 1px 4px; font-size: 0.92em; }
  .missing { background: #fff4e0; border-left: 4px solid #e69f00; padding: 8px 12px; }
  @media print { body { background: #fff; } main { max-width: none; } pre { max-height: none; } }
</style>
</head>
<body>
<main>
<h1>%TITLE%</h1>
<nav>%LINKS%</nav>
%BODY%
</main>
</body>
</html>
"""
