"""``python -m msda_plugin train CONFIG``, or ``--data DIR``; also the script of ``mim train msda_plugin``."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from msda_plugin.tools.common.errors import user_errors

if TYPE_CHECKING:
    from mmengine.config import Config

# Arguments that require --data.
CUSTOM_DATA = (
    'val',
    'val_part',
    'images',
    'format',
    'classes',
    'skip_bad_images',
    'model',
    'epochs',
    'minutes',
    'patience',
    'batch_size',
    'accumulate',
    'effective_batch',
    'lr',
    'image_size',
    'augment',
    'workers',
    'seed',
    'device',
    'load_from',
    'from_scratch',
    'dry_run',
)


def main(argv: list[str] | None = None) -> int:
    from msda_plugin.engine.checkpoint_files import TrainingStopped
    from msda_plugin.engine.runner import DetectionRunner
    from msda_plugin.tools.common import interrupt
    from msda_plugin.tools.common.launch import build_runner, exit_if_loading_fails, load_config
    from msda_plugin.tools.common.mixed_precision import use_mixed_precision

    args = _parser().parse_args(argv)
    if args.model == 'list':
        from msda_plugin.tools import models

        return models.main([])
    with user_errors('train'):
        _check_resume(args)
        if args.data is not None:
            from msda_plugin.tools.custom_data.training import prepare

            cfg = prepare(args)
            if args.dry_run:
                return 0
        else:
            given = [
                name for name in CUSTOM_DATA if getattr(args, name) is not None and getattr(args, name) is not False
            ]
            if given or args.config is None:
                named = ', '.join('--' + name.replace('_', '-') for name in given)
                raise ValueError(
                    f'{named} {"requires" if len(given) == 1 else "require"} --data; in a config, use --cfg-options'
                    if given
                    else 'give the path of a Python config file, or --data with a folder of data'
                )
            cfg = load_config(args)
        if args.verbose:
            cfg.verbose = True
        if args.train_ap is not None:
            _measure_training_ap(cfg, args.train_ap)
        if args.amp and not args.data:
            use_mixed_precision(cfg)
        if args.auto_scale_lr:
            if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
                raise ValueError('--auto-scale-lr requires auto_scale_lr = dict(base_batch_size=…) in the config')
            cfg.auto_scale_lr.enable = True
        start = cfg.get('load_from')
        if args.resume is not None:
            cfg.resume = True
            # None: the latest checkpoint of the work dir, and not the config's pretrained one.
            cfg.load_from = None if args.resume == 'auto' else args.resume
        runner = build_runner(cfg, 'train', 'val')
        if isinstance(runner, DetectionRunner):
            runner.cfg.load_from = start  # the config says how the training started, not how it was resumed
            runner.extends_schedule = args.extend
            if runner.find_resumed() is None and args.extend:
                raise ValueError(f'--extend continues a training, but there is no checkpoint in {cfg.work_dir}')
        elif args.extend:
            raise ValueError(f"--extend needs runner_type = 'msda_plugin.DetectionRunner', got {cfg.runner_type}")
    exit_if_loading_fails(runner, 'train')
    try:
        return interrupt.train(runner)
    except TrainingStopped as error:
        print(f'msda_plugin train: {error}', file=sys.stderr)
        return 1


def _measure_training_ap(cfg: 'Config', num_images: int) -> None:
    hooks = list(cfg.get('custom_hooks') or [])
    reports = [hook for hook in hooks if hook.get('type') == 'msda_plugin.TrainingReportHook']
    if not reports:
        reports = [dict(type='msda_plugin.TrainingReportHook')]
        hooks += reports
    reports[0]['num_train_images'] = num_images
    cfg.custom_hooks = hooks


def _check_resume(args: argparse.Namespace) -> None:
    from msda_plugin.engine.checkpoint_files import no_file

    if args.extend and args.resume is None:
        raise ValueError('--extend requires --resume')
    named = None if args.resume in (None, 'auto') else args.resume
    if named and '://' not in named and not Path(named).is_file():
        raise FileNotFoundError(f'the checkpoint {named} of --resume {no_file(named)}; give the path of a .pth file')


def _parser() -> argparse.ArgumentParser:
    from msda_plugin.tools.common.launch import add_arguments

    parser = argparse.ArgumentParser(
        prog='python -m msda_plugin train',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description='Train a detector from a config, or on custom data (COCO, YOLO, or Pascal VOC).',
        epilog='examples:\n'
        '  python -m msda_plugin train configs/shapes/rtdetr_r18vd-nano_1xb4-7e_shapes.py\n'
        '  python -m msda_plugin train --data data/mine --epochs 30 --batch-size 4\n'
        '  python -m msda_plugin train --data data/mine --minutes 40\n'
        '  python -m msda_plugin train --data data/mine --resume\n'
        '  python -m msda_plugin train --data data/mine --epochs 60 --batch-size 4 --resume --extend',
    )
    parser.add_argument('config', nargs='?', help='path of a Python config file; not with --data')
    add_arguments(parser)
    parser.add_argument(
        '--train-ap',
        type=int,
        metavar='N',
        help='at each validation, also measure the AP on N training images, which shows overfitting (default: 0; '
        'with --data up to 32)',
    )
    parser.add_argument(
        '--amp',
        action=argparse.BooleanOptionalAction,
        help='mixed precision: float16 on GPUs, bfloat16 on CPUs (default: no; with --data and a model of msda_plugin, '
        'on CPUs with bfloat16 instructions)',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by batch size, from auto_scale_lr.base_batch_size of the config',
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='resume from a checkpoint (default: the last complete one in the work dir)',
    )
    parser.add_argument(
        '--extend',
        action='store_true',
        help='with --resume and more epochs: start the learning rate schedule anew over the remaining ones',
    )

    custom = parser.add_argument_group(
        'custom data', 'Checks the data, takes the classes from it, and writes the config to the work dir.'
    )
    custom.add_argument(
        '--data', metavar='DIR|FILE', help='folder with COCO, YOLO or Pascal VOC data, or the annotation file'
    )
    custom.add_argument(
        '--val', metavar='FILE', help='annotation file for validation (default: found next to --data, or split off)'
    )
    custom.add_argument(
        '--val-part',
        type=float,
        metavar='P',
        help='fraction of the images to split off if there is no validation data (default: 0.2)',
    )
    custom.add_argument('--images', metavar='DIR', help='folder that file names are relative to (default: found)')
    custom.add_argument('--format', choices=('coco', 'yolo', 'voc'), help='format of the data (default: recognized)')
    custom.add_argument('--classes', nargs='+', metavar='NAME', help='classes to use (default: all with boxes)')
    custom.add_argument('--skip-bad-images', action='store_true', help='skip missing or unreadable images')
    custom.add_argument(
        '--model',
        metavar='NAME',
        help='model of `python -m msda_plugin models`, trained from its published weights, or path of a model config',
    )
    weights = custom.add_mutually_exclusive_group()
    weights.add_argument('--load-from', metavar='FILE', help='checkpoint with the weights to start from')
    weights.add_argument(
        '--from-scratch', action='store_true', help='start from random weights, not from published or starter weights'
    )
    budget = custom.add_mutually_exclusive_group()
    budget.add_argument('--epochs', type=int, metavar='N', help='epochs (default: 12 to 100, by the number of images)')
    budget.add_argument('--minutes', type=float, metavar='M', help='train for M minutes instead of a number of epochs')
    custom.add_argument(
        '--patience', type=int, metavar='N', help='stop after N validations without a higher AP (default: never)'
    )
    custom.add_argument('--batch-size', type=int, metavar='N', help='images per iteration (default: 4)')
    effective = custom.add_mutually_exclusive_group()
    effective.add_argument('--accumulate', type=int, metavar='N', help='iterations per optimizer step (default: 1)')
    effective.add_argument(
        '--effective-batch', type=int, metavar='N', help='images per optimizer step; instead of --accumulate'
    )
    custom.add_argument('--lr', type=float, help='learning rate (default: that of the model, scaled by batch size)')
    custom.add_argument(
        '--image-size',
        metavar='S|WxH',
        help='size in pixels that images are fitted into (default: from the objects, or as in the config of the model)',
    )
    custom.add_argument(
        '--augment',
        choices=('weak', 'medium', 'strong'),
        help='weak: sizes and flips; medium: also crops and colors; strong: also mosaics (default: medium from 60 '
        'passes through the data; weak for fewer, and for published weights)',
    )
    custom.add_argument(
        '--workers', type=int, metavar='N', help='data-loading processes (default: half of the cores, at most 4)'
    )
    custom.add_argument('--seed', type=int, help='seed of the split and the training (default: 0)')
    custom.add_argument('--device', help='cpu, cuda or cuda:N (default: the GPU if there is one)')
    custom.add_argument(
        '--dry-run',
        action='store_true',
        help='check the data, write the config, and stop (to dry_run/ if the work dir has a training)',
    )
    return parser


if __name__ == '__main__':
    sys.exit(main())
