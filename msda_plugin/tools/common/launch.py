"""What `train` and `test` share: the arguments of MMDetection's tools, and the config they make."""

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
    parser.add_argument('--work-dir', help='folder of logs and checkpoints; work_dirs/CONFIG-NAME when not given')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='entries of the config to replace, such as data_root=data/mine/',
    )
    parser.add_argument('--launcher', choices=LAUNCHERS, default='none', help='of the processes, for several GPUs')
    # torch.distributed.launch, which mim calls, passes --local-rank.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def check_device(name: str) -> None:
    """Check that torch has this device: 'cpu', 'cuda' or 'cuda:N'.

    Raises:
        ValueError: It is none of these, or torch does not see it.
    """
    match = re.fullmatch(r'cpu|cuda(?::(\d+))?', name)
    if not match:
        raise ValueError(f"--device is '{name}', but cpu, cuda or cuda:N is needed")
    count = torch.cuda.device_count()
    if name != 'cpu' and int(match[1] or 0) >= count:
        raise ValueError(
            f'--device is {name}, but torch {torch.__version__} sees {count or "no"} GPU'
            f'{"s" if count > 1 else ""}; take another one or cpu, or see python -m msda_plugin env'
        )


def read_config(path: str) -> Config:
    """The config in a file.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'the config {path} does not exist; give the path of a Python config file')
    return Config.fromfile(path)


def load_config(args: argparse.Namespace) -> Config:
    """The config named by ``args.config``, with the command line's choices in it.

    Raises:
        FileNotFoundError: there is no such file.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = read_config(args.config)
    cfg.launcher = args.launcher
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or f'work_dirs/{Path(args.config).stem}'
    return cfg


def build_runner(cfg: Config, *splits: str) -> Runner:
    """The runner that the config names, else ours, with all that `splits` ('train', 'val', 'test') need built.

    Building here, and not when the loop starts, lets every mistake in the config end in one sentence.
    """
    cfg.setdefault('runner_type', 'msda_plugin.DetectionRunner')
    check_weights(cfg)
    runner = RUNNERS.build(cfg)
    if isinstance(runner, DetectionRunner):
        runner.check_data(*splits)
    for split in splits:
        getattr(runner, f'{split}_loop')  # a property: builds data loader and evaluator, once
    if 'train' in splits:
        runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    return runner
