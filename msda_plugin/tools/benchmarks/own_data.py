"""``benchmark own_data``: trains models on custom data for the same CPU time, and compares their AP over seeds."""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from mmengine.config import Config

from msda_plugin.tools.custom_data.config import DEFAULT_MODEL

STOCK = 'mmdet-deformable-detr-two-stage_r18'
# One thread's CPU time instead of the clock, so that other load of the machine does not change the comparison.
TRAIN = (
    'import sys, time; time.monotonic = time.perf_counter = time.process_time; '
    'from msda_plugin.tools.train import main; sys.exit(main(sys.argv[1:]))'
)
EXAMPLE = """example:
  python -m msda_plugin benchmark own_data data/mine data/theirs --minutes 40"""


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the subcommand ``own_data``, whose namespace `run` takes."""
    parser = subparsers.add_parser(
        'own_data',
        help='AP of models that train --data trains for the same CPU time, over several seeds',
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('data', nargs='+', help='folders of data, as for train --data')
    parser.add_argument('--minutes', type=float, default=40, help='CPU minutes of each training (default: 40)')
    parser.add_argument('--seeds', type=int, default=3, help='number of seeds, which also split the data (default: 3)')
    parser.add_argument(
        '--models', nargs='+', default=[DEFAULT_MODEL, STOCK], help='names or configs (default: ours and MMDetection)'
    )
    parser.add_argument(
        '--work-dir', default='work_dirs/own_data', help='folder for the results (default: %(default)s)'
    )
    parser.add_argument(
        '--options', nargs=argparse.REMAINDER, default=[], help='more options of train --data, such as --from-scratch'
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Train one after another on one thread, each in its own process, and print one row per model and data.

    Called again with the same work dir and options, the benchmark does not repeat finished trainings, and starts an
    interrupted one anew.

    Raises:
        ValueError: The work dir has trainings with other options.
    """
    print(
        f'{args.minutes:g} CPU minutes on one thread, {args.seeds} seeds: mean (lowest to highest) after the last '
        'epoch\n\n| data | model | images seen | AP | AP50 | AP on training images |\n|---|---|---:|---:|---:|---:|'
    )
    for data in args.data:
        for model in args.models:
            found = []
            for seed in range(args.seeds):
                work_dir = Path(args.work_dir, f'{Path(data).absolute().name}_{Path(model).stem}_{seed}')
                status = _train(data, model, seed, work_dir, args)
                if status:
                    print(
                        f'msda_plugin benchmark: the training of {model} on {data} ended with status {status}; see '
                        f'{work_dir}/output.txt',
                        file=sys.stderr,
                    )
                    return status
                found.append(_result(work_dir))
            print(row(data, model, found), flush=True)
    return 0


def _train(data: str, model: str, seed: int, work_dir: Path, args: argparse.Namespace) -> int:
    command = [sys.executable, '-c', TRAIN, '--data', data, '--model', model, '--minutes', str(args.minutes)]
    command += ['--seed', str(seed), '--workers', '0', '--device', 'cpu', '--work-dir', str(work_dir)]
    command += ['--skip-bad-images', *args.options]
    options = ' '.join(command[3:])
    finished = work_dir / 'finished.txt'  # the options of the training that wrote the results
    if finished.exists():
        if (written := finished.read_text()) != options:
            raise ValueError(f'{work_dir} contains a training with other options: {written}; choose another --work-dir')
        return 0
    log = work_dir / 'output.txt'
    if log.exists():
        shutil.rmtree(work_dir)  # interrupted; resumed, the time since its last checkpoint would not count
    work_dir.mkdir(parents=True, exist_ok=True)
    with log.open('w') as output:
        status = subprocess.run(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, 'OMP_NUM_THREADS': '1'}
        ).returncode
    if status == 0:
        finished.write_text(options)
    return status


def _result(work_dir: Path) -> dict:
    """Final metrics of a finished training, and ``images``, the number it saw."""
    report = json.loads((work_dir / 'metrics.json').read_text())
    (config,) = work_dir.glob('*.py')
    batch = Config.fromfile(str(config)).train_dataloader.batch_size
    return dict(report['final'], images=report['final']['iter'] * batch)


def row(data: str, model: str, found: list[dict]) -> str:
    """A table row: means over seeds."""

    def shown(name: str) -> str:
        values = [each[name] or 0.0 for each in found]
        return f'{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})'

    return (
        f'| {Path(data).absolute().name} | {Path(model).stem} | {statistics.mean(e["images"] for e in found):.0f} | '
        f'{shown("bbox_mAP")} | {shown("bbox_mAP_50")} | {shown("train_bbox_mAP")} |'
    )
