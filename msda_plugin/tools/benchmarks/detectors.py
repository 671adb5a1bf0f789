"""``benchmark detectors``: trains several configs for the same number of epochs and compares their AP."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from mmengine.config import Config

EXAMPLE = """example:
  python -m msda_plugin shapes --out data/shapes
  python -m msda_plugin benchmark detectors configs/shapes/deformable-detr*_shapes.py --epochs 3"""


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the subcommand ``detectors``, whose namespace `run` takes."""
    parser = subparsers.add_parser(
        'detectors',
        help='AP of several configs after the same short training',
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('configs', nargs='+', help='Python config files with a TrainingReportHook')
    parser.add_argument('--epochs', type=int, default=3, help='epochs of each training (default: 3)')
    parser.add_argument('--data-root', help='data folder (default: that of the configs)')
    parser.add_argument(
        '--work-dir', default='work_dirs/benchmark', help='folder for the results (default: %(default)s)'
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Train the configs one after another, each in its own process, and print one row each."""
    if args.epochs < 1:
        print(f'msda_plugin benchmark: --epochs is {args.epochs}, but at least 1 is needed', file=sys.stderr)
        return 2
    print(
        f'{args.epochs} epochs each, validated at the end\n\n'
        '| config | parameters M | minutes | loss, first -> last | AP | AP50 |\n|---|---:|---:|---:|---:|---:|'
    )
    for config in args.configs:
        work_dir = Path(args.work_dir, Path(config).stem)
        command = [
            sys.executable,
            '-m',
            'msda_plugin',
            'train',
            config,
            '--work-dir',
            str(work_dir),
            '--cfg-options',
            f'train_cfg.max_epochs={args.epochs}',
            f'train_cfg.val_interval={args.epochs}',
            *schedule_options(config, args.epochs),
        ]
        if args.data_root:
            command.append(f'data_root={args.data_root.rstrip("/")}/')
        work_dir.mkdir(parents=True, exist_ok=True)
        log = work_dir / 'output.txt'
        with log.open('w') as output:
            status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode
        if status:
            print(
                f'msda_plugin benchmark: the training of {config} ended with status {status}; see {log}',
                file=sys.stderr,
            )
            return status
        print(row(work_dir), flush=True)
    return 0


def schedule_options(config: str, epochs: int) -> list[str]:
    """``--cfg-options`` that scale the schedules by epoch of a config to a training of so many epochs."""
    if not Path(config).is_file():
        return []  # `train` reports it
    cfg = Config.fromfile(config)
    ratio, options = epochs / cfg.train_cfg.max_epochs, []
    for index, scheduler in enumerate(cfg.get('param_scheduler') or []):
        if not scheduler.get('by_epoch', True):
            continue
        begin, end = (round(ratio * scheduler.get(key, 0)) for key in ('begin', 'end'))
        changed = dict(begin=min(begin, epochs - 1))
        if scheduler.get('end'):
            changed['end'] = max(end, changed['begin'] + 1)
        if scheduler.get('T_max'):
            end = round(ratio * (scheduler.get('begin', 0) + scheduler.T_max))
            changed['T_max'] = max(1, end - changed['begin'])
        if scheduler.get('milestones'):
            changed['milestones'] = str([max(1, round(ratio * epoch)) for epoch in scheduler.milestones])
        options += [f'param_scheduler.{index}.{key}={value}'.replace(' ', '') for key, value in changed.items()]
    return options


def row(work_dir: Path) -> str:
    """The table row of a finished training, from the report in its work dir."""
    report = json.loads((work_dir / 'metrics.json').read_text())
    losses = [entry['loss'] for entry in _scalars(work_dir) if 'loss' in entry]
    final = report['final']
    return (
        f'| {work_dir.name} | {report["num_trainable_params"] / 1e6:.2f} | {report["train_seconds"] / 60:.1f} | '
        f'{losses[0]:.1f} -> {losses[-1]:.1f} | {final["bbox_mAP"]:.3f} | {final["bbox_mAP_50"]:.3f} |'
    )


def _scalars(work_dir: Path) -> list[dict]:
    """MMEngine's log entries of the latest training in a work dir, in order."""
    latest = max(work_dir.glob('*/vis_data/scalars.json'), key=lambda path: path.stat().st_mtime)
    return [json.loads(line) for line in latest.read_text().splitlines()]
