"""What `train` and `test` share: the arguments of MMDetection's tools, and the config they make."""
import argparse
import os
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from msda_plugin.runner import DetectionRunner

LAUNCHERS = ('none', 'pytorch', 'slurm', 'mpi')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--work-dir', help='folder of logs and checkpoints; work_dirs/CONFIG-NAME when not given')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE',
                        help='entries of the config to replace, such as data_root=data/mine/')
    parser.add_argument('--launcher', choices=LAUNCHERS, default='none', help='of the processes, for several GPUs')
    # torch.distributed.launch, which mim calls, passes --local-rank.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def load_config(args: argparse.Namespace) -> Config:
    """The config named by ``args.config``, with the command line's choices in it.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not Path(args.config).is_file():
        raise FileNotFoundError(f'the config {args.config} does not exist; give the path of a Python config file')
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = Config.fromfile(args.config)
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
    runner = RUNNERS.build(cfg)
    if isinstance(runner, DetectionRunner):
        runner.check_data(*splits)
    for split in splits:
        getattr(runner, f'{split}_loop')  # a property: builds data loader and evaluator, once
    if 'train' in splits:
        runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    return runner
