"""Command-line arguments, config and runner of the commands `train` and `test`."""

import argparse
import os
import re
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from msda_plugin.engine.config_check import check_weights
from msda_plugin.engine.runner import DetectionRunner

LAUNCHERS = ('none', 'pytorch', 'slurm', 'mpi')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--work-dir', help='folder for logs and checkpoints (default: work_dirs/CONFIG-NAME)')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='config fields to change, such as data_root=data/mine/',
    )
    parser.add_argument('--launcher', choices=LAUNCHERS, default='none', help='job launcher for several GPUs')
    # torch.distributed.launch, which mim calls, passes --local-rank.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def check_device(name: str) -> None:
    """Check that torch has this device: 'cpu', 'cuda' or 'cuda:N'.

    Raises:
        ValueError: If the name has another form, or torch does not have the device.
    """
    match = re.fullmatch(r'cpu|cuda(?::(\d+))?', name)
    if not match:
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got '{name}'")
    count = torch.cuda.device_count()
    if name != 'cpu' and int(match[1] or 0) >= count:
        raise ValueError(
            f'--device is {name}, but torch {torch.__version__} sees {count or "no"} GPU'
            f'{"s" if count > 1 else ""}; choose another device, or run python -m msda_plugin env for details'
        )


def read_config(path: str) -> Config:
    """Read a config file.

    Raises:
        FileNotFoundError: If it does not exist.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'the config {path} does not exist; give the path of a Python config file')
    return Config.fromfile(path)


def load_config(args: argparse.Namespace) -> Config:
    """Read the config ``args.config`` and apply the command line to it.

    Raises:
        FileNotFoundError: If the file does not exist.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = read_config(args.config)
    cfg.launcher = args.launcher
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or f'work_dirs/{Path(args.config).stem}'
    return cfg


def build_runner(cfg: Config, *splits: str) -> Runner:
    """Build the config's runner (default: `DetectionRunner`) and the loops of ``splits`` ('train', 'val', 'test').

    Loops are built here, and not when they start, so that errors in the config end in one sentence.
    """
    cfg.setdefault('runner_type', 'msda_plugin.DetectionRunner')
    check_weights(cfg)
    runner = RUNNERS.build(cfg)
    if isinstance(runner, DetectionRunner):
        runner.check_data(*splits)
    for split in splits:
        getattr(runner, f'{split}_loop')  # the property builds dataloader and evaluator
    if 'train' in splits:
        runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    return runner
