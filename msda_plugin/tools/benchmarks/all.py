"""``benchmark all``: one report of this machine, as Markdown and as an HTML page with plots."""

import argparse
import os
import platform
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path

import torch

from msda_plugin.tools import env
from msda_plugin.tools.benchmarks.comparison import Comparison
from msda_plugin.tools.benchmarks.growth import measure_growth
from msda_plugin.tools.benchmarks.report import Growth, Item, Report, Section, duration, write_report
from msda_plugin.tools.common.errors import explain, user_errors
from msda_plugin.tools.common.interrupt import INTERRUPTED
from msda_plugin.tools.common.launch import check_device

EXAMPLES = """examples:
  python -m msda_plugin benchmark all --quick
  python -m msda_plugin benchmark all --parts operator layers --out report"""
DEFORMABLE_DETR = 'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'
DINO = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'
COMPLEXITY = 'msda_plugin complexity'
GROWTH_CHANNELS, GROWTH_HEADS = 256, 8  # as in `complexity`

# Part -> what is compared, commands of the full report, commands of the quick one.
PARTS = {
    'Operator': (
        "Multi-scale deformable attention against mmcv's: its CUDA kernel, or `grid_sample` level by level on a CPU.",
        ['op'],
        ['op --quick --repeats 1'],
    ),
    'Layers': (
        "Attention layers against mmcv's and MMDetection's with the same weights, or against the published arithmetic "
        'step by step (plain) where there is no stock layer.',
        ['layer'],
        ['layer --height 320 --width 512 --repeats 1'],
    ),
    'Backbones': (
        'Shunted Transformer against the published arithmetic with all attention scores in memory (plain).',
        ['backbone'],
        ['backbone --size 256 320 --repeats 1'],
    ),
    'Heads': (
        "Matching, losses and their gradients against MMDetection's heads, with the same predictions.",
        ['head'],
        ['head --repeats 3'],
    ),
    'Models': (
        "MMDetection's models before and after `msda_plugin.accelerate`, with random weights.",
        [f'model {DEFORMABLE_DETR} --runs 2', f'model {DINO} --runs 2'],
        [f'model {DEFORMABLE_DETR} --height 320 --width 512 --runs 1 --skip-training'],
    ),
    'Growth': (
        'Time of one layer of each kind of attention against the resolution; full self-attention and convolution '
        "are PyTorch's.",
        ['32 48 64 96 128'],
        ['16 24 32 48 64'],
    ),
}


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the subcommand ``all``, whose namespace `run` takes."""
    parser = subparsers.add_parser(
        'all',
        help='all comparisons in one report with plots, as HTML and Markdown',
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description='Measure operator, layers, backbones, heads, models and growth with the resolution against the '
        'stock\nimplementations, and write report.md with its figures and a self-contained report.html. The report '
        'names what\nfailed. Ctrl-C writes a report of the measurements so far.',
    )
    parser.add_argument('--quick', action='store_true', help='small sizes and few runs: a first impression in minutes')
    parser.add_argument(
        '--parts',
        nargs='+',
        type=str.lower,
        choices=[part.lower() for part in PARTS],
        metavar='PART',
        help=f'only these parts, of: {", ".join(part.lower() for part in PARTS)}',
    )
    parser.add_argument(
        '--out', default='work_dirs/benchmark_report', metavar='DIR', help='folder of the report (default: %(default)s)'
    )
    parser.add_argument(
        '--device',
        nargs='+',
        metavar='DEVICE',
        help='cpu, cuda or cuda:N, or several of them (default: cpu, and cuda if available)',
    )
    parser.add_argument('--threads', type=int, help='CPU threads (default: all cores available to this process)')
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure part after part and write the report.

    Returns:
        The exit status: 0; 1 if a measurement failed; 130 after Ctrl-C.
    """
    threads = available_cores() if args.threads is None else args.threads
    with user_errors('benchmark all'):
        if threads < 1:
            raise ValueError(f'--threads is {threads}, but at least 1 is needed')
        devices = args.device or ['cpu', *(['cuda'] if torch.cuda.is_available() else [])]
        for device in devices:
            check_device(device)
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    report = begin(args, devices, threads)
    start = time.perf_counter()
    status = 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # from the stock code
            for number, section in enumerate(report.sections, 1):
                minutes, seconds = divmod(round(time.perf_counter() - start), 60)
                print(f'[{number}/{len(report.sections)}, {minutes}:{seconds:02}] {section.title}', flush=True)
                measure(section)
    except KeyboardInterrupt:
        print('\nCtrl-C: writing the report of the measurements so far', file=sys.stderr, flush=True)
        status = INTERRUPTED
        stopped_at(report.sections, number - 1)
    report.machine.append(('time taken', f'{(time.perf_counter() - start) / 60:.1f} minutes'))
    for path in write_report(report, out):
        print(path)
    return status or int(any(section.missing for section in report.sections))


def stopped_at(sections: list[Section], current: int) -> None:
    """Note in the section that was being measured, and in the following ones, that Ctrl-C interrupted them."""
    sections[current].missing.append(
        'Interrupted by Ctrl-C.' if sections[current].items else 'Interrupted by Ctrl-C before the first result.'
    )
    for section in sections[current + 1 :]:
        section.missing.append('Not started before Ctrl-C.')


# ---- measuring ------------------------------------------------------------------------------------------------------
def sections(quick: bool, devices: list[str], threads: int, parts: list[str] | None = None) -> list[Section]:
    """The sections to measure, each with the command lines that also measure it alone."""
    planned = []
    for device in devices:
        for name, (compared, full, small) in PARTS.items():
            if parts and name.lower() not in parts:
                continue
            commands = tuple(
                f'{COMPLEXITY} --measure {text} --device {device}'
                if name == 'Growth'
                else f'msda_plugin benchmark {text} --device {device} --threads {threads}'
                for text in (small if quick else full)
            )
            planned.append(Section(name if len(devices) == 1 else f'{name}, {device}', compared, commands))
    return planned


def measure(section: Section) -> None:
    """Run the commands of a section; the error of a command that fails goes into ``section.missing``."""
    for command in section.commands:
        print(f'  python -m {command}', flush=True)
        try:
            conditions, items = start_command(command)
            section.conditions.append(conditions)
            for item in items():
                section.items.append(item)
                for line in progress_lines(item):
                    print(f'    {line}', flush=True)
        except Exception as error:  # the other parts can still be measured
            if os.environ.get('MSDA_TRACEBACK') == '1':
                raise
            section.missing.append(f'`python -m {command}` failed: {explain(error)}')
            print(f'    failed: {explain(error)}', flush=True)


def start_command(command: str) -> tuple[str, Callable[[], Iterator[Item]]]:
    """The conditions of a command line, and a function that runs it and yields its results."""
    argv = shlex.split(command)
    if command.startswith(COMPLEXITY):
        sides = tuple(map(int, argv[3:-2]))
        device = torch.device(argv[-1])
        text = (
            f'One layer, batch 1, float32, C = {GROWTH_CHANNELS}, {GROWTH_HEADS} heads, {device}, '
            f'{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}; medians.'
        )
        return text, lambda: iter([Growth(sides, measure_growth(sides, GROWTH_CHANNELS, GROWTH_HEADS, device))])
    module = import_module(f'msda_plugin.tools.benchmarks.{argv[2]}')
    parser = argparse.ArgumentParser()
    module.add_parser(parser.add_subparsers())
    args = parser.parse_args(argv[2:])
    return module.conditions(args), lambda: module.comparisons(args)


def progress_lines(item: Item) -> list[str]:
    """The lines printed for a result while the report is being made."""
    if isinstance(item, Comparison):
        return [
            f'{item.case}, {item.run}: {item.sides[0]} {duration(item.stock.seconds)}, {item.sides[1]} '
            f'{duration(item.ours.seconds)}, {item.speed:.2f}x'
        ]
    if isinstance(item, Growth):
        return [f'{name}: {" ".join(map(duration, values))}' for name, values in item.seconds.items()]
    return [item]


# ---- the machine ----------------------------------------------------------------------------------------------------
def begin(args: argparse.Namespace, devices: list[str], threads: int) -> Report:
    """The report with the description of the machine, before anything is measured."""
    found = env.collect()
    packages = [f'{name} {package["version"]}' for name, package in found['packages'].items() if package['version']]
    gpus = [f'{gpu["name"]} ({gpu["arch"]}, {gpu["memory_gib"]} GiB)' for gpu in found['gpus']]
    now = datetime.now(timezone.utc)
    machine = [
        ('CPU', f'{cpu_name()}, {available_cores()} cores, {torch.backends.cpu.get_cpu_capability()}'),
        ('memory', f'{memory_gib():.0f} GiB'),
        ('GPU', ', '.join(gpus) or 'none visible to torch'),
        ('versions', f'msda_plugin {found["msda_plugin"]}, Python {found["python"]}, ' + ', '.join(packages)),
        ('packages', f'{found["stack"]["kind"]}: {", ".join(found["stack"]["distributions"])}'),
        ('system', found['platform']),
        ('load before', f'{os.getloadavg()[0]:.1f} (1-minute average; near 0 on an idle machine)'),
        ('started', f'{now:%Y-%m-%d %H:%M} UTC'),
    ]
    argv = ['python', '-m', 'msda_plugin', 'benchmark', 'all', *(['--quick'] if args.quick else [])]
    argv += [*(['--parts', *args.parts] if args.parts else []), '--device', *devices, '--threads', str(threads)]
    return Report(
        title='msda_plugin: benchmark of this machine',
        remark=f'msda_plugin (ours) against stock implementations in the same run, on {" and ".join(devices)}, '
        f'{now:%Y-%m-%d}.' + (' Quick form: small sizes and few runs.' if args.quick else ''),
        machine=machine,
        environment=env.page(found),
        command=shlex.join(argv),
        backends=[
            (entry['device'], entry['dtype'], entry['backend'] or 'error', entry['reason'])
            for entry in found['backends']
        ],
        sections=sections(args.quick, devices, threads, args.parts),
    )


def available_cores() -> int:
    """Number of cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def cpu_name() -> str:
    """The CPU's name as the system reports it."""
    info = Path('/proc/cpuinfo')
    names = (
        [line.split(':', 1)[1].strip() for line in info.read_text().splitlines() if line.startswith('model name')]
        if info.is_file()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def memory_gib() -> float:
    """Memory of the machine in GiB."""
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30
