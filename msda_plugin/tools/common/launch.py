"""Command-line arguments, config and runner of the commands `train` and `test`."""

import argparse
import os
import re
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import OPTIMIZERS, RUNNERS
from mmengine.runner import Runner

from msda_plugin.engine.config_check import check_fields, check_weights
from msda_plugin.engine.runner import DetectionRunner
from msda_plugin.tools.common.cfg_options import apply_cfg_options
from msda_plugin.tools.common.errors import user_errors

LAUNCHERS = ('none', 'pytorch', 'slurm', 'mpi')


def add_arguments(
    parser: argparse.ArgumentParser, work_dir: str = 'folder for logs and checkpoints (default: work_dirs/CONFIG-NAME)'
) -> None:
    """Add the arguments that `load_config` takes; ``work_dir`` is the help of ``--work-dir``."""
    parser.add_argument('--work-dir', help=work_dir)
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action='extend',
        metavar='KEY=VALUE',
        help='config fields to change, such as data_root=data/mine/',
    )
    parser.add_argument('--verbose', action='store_true', help='print the whole log')
    parser.add_argument('--launcher', choices=LAUNCHERS, default='none', help='job launcher for several GPUs')
    # torch.distributed.launch, which mim calls, passes --local-rank.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def check_device(name: str, option: str = '--device') -> None:
    """Check that torch has the device of an option: 'cpu', 'cuda' or 'cuda:N'.

    Raises:
        ValueError: If the name has another form, or torch does not have the device.
    """
    match = re.fullmatch(r'cpu|cuda(?::(\d+))?', str(name))
    if not match:
        raise ValueError(f"{option} must be cpu, cuda or cuda:N, got '{name}'")
    count = torch.cuda.device_count()
    if name != 'cpu' and int(match[1] or 0) >= count:
        raise ValueError(
            f'{option} is {name}, but torch {torch.__version__} sees {count or "no"} GPU'
            f'{"s" if count > 1 else ""}; choose another device, or run python -m msda_plugin env for details'
        )


def check_folder(path: str | os.PathLike, option: str = '--work-dir') -> None:
    """Check that the path of an option is a folder, or can become one.

    Raises:
        NotADirectoryError: If it, or a folder above it, is a file.
    """
    for folder in (Path(path), *Path(path).parents):
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(
                f'{option}: {path} cannot be a folder, because {folder} is a file; choose another one'
            )


def read_config(path: str) -> Config:
    """Read a config file.

    Raises:
        FileNotFoundError: If it does not exist.
        ValueError: If it is not a config file.
    """
    if Path(path).is_dir():
        raise FileNotFoundError(f'{path} is a folder; give the path of a Python config file in it')
    if not Path(path).is_file():
        raise FileNotFoundError(f'the config {path} does not exist; give the path of a Python config file')
    try:
        return Config.fromfile(path)
    except Exception as error:  # text that is no config raises errors of many types
        if Path(path).suffix != '.py':
            raise ValueError(_no_config(path)) from error
        if isinstance(error, FileNotFoundError) and error.filename:
            raise FileNotFoundError(
                f'{path} inherits from {error.filename}, which does not exist; correct _base_'
            ) from error
        if isinstance(error, SyntaxError):
            raise ValueError(
                f'{path}, or a file in its _base_, is not valid Python: {error.msg}, line {error.lineno}'
            ) from error
        raise


def _no_config(path: str) -> str:
    data = f'; for data in COCO format, use --data {path}' if Path(path).suffix == '.json' else ''
    return f'{path} is not a config with a model; give the path of a Python config file{data}'


def load_config(args: argparse.Namespace) -> Config:
    """Read the config ``args.config`` and apply the command line to it.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it has no model, or an option of ``--cfg-options`` does not fit it.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = read_config(args.config)
    if not isinstance(cfg.get('model'), dict):
        raise ValueError(_no_config(args.config))
    cfg.launcher = args.launcher
    apply_cfg_options(cfg, args.cfg_options)
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or f'work_dirs/{Path(args.config).stem}'
    check_folder(cfg.work_dir)
    return cfg


def build_runner(cfg: Config, *splits: str) -> Runner:
    """Build the config's runner (default: `DetectionRunner`) and the loops of ``splits`` ('train', 'val', 'test').

    Loops are built here, and not when they start, so that errors in the config end in one sentence.
    """
    cfg.setdefault('runner_type', 'msda_plugin.DetectionRunner')
    check_weights(cfg)
    check_fields(cfg)
    if str(cfg.get('device')).startswith('cuda') and cfg.get('launcher', 'none') == 'none':
        check_device(cfg.device, 'device')
    runner = RUNNERS.build(cfg)
    if isinstance(runner, DetectionRunner):
        runner.check_data(*splits)
    for split in splits:
        getattr(runner, f'{split}_loop')  # the property builds dataloader and evaluator
    if 'train' in splits:
        kind = (cfg.optim_wrapper.get('optimizer') or {}).get('type')
        if isinstance(kind, str) and OPTIMIZERS.get(kind) is None:
            raise KeyError(f'{kind} is not in the optimizer registry')
        runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    return runner


def exit_if_loading_fails(runner: Runner, command: str) -> None:
    """End the process with one sentence if the checkpoint cannot be loaded.

    ``runner.train()`` and ``runner.test()`` load it after they have set up hooks such as EMAHook.
    """
    load = runner.load_or_resume

    def load_or_exit() -> None:
        with user_errors(command):
            load()

    runner.load_or_resume = load_or_exit
