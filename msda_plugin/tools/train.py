"""``python -m msda_plugin train CONFIG``, or ``--data`` for own data; also the script of ``mim train msda_plugin``."""

import argparse
import sys

from msda_plugin.tools.common.errors import user_errors

# Arguments for own data alone: without --data they would be ignored, and are refused.
OWN_DATA = (
    'val',
    'val_part',
    'images',
    'classes',
    'skip_bad_images',
    'model',
    'epochs',
    'batch_size',
    'accumulate',
    'effective_batch',
    'lr',
    'image_size',
    'workers',
    'seed',
    'device',
    'load_from',
    'dry_run',
)


def main(argv: list[str] | None = None) -> int:
    from msda_plugin.engine.checkpoint_files import DiskFullError
    from msda_plugin.engine.runner import DetectionRunner
    from msda_plugin.tools.common import interrupt
    from msda_plugin.tools.common.launch import build_runner, load_config

    args = _parser().parse_args(argv)
    with user_errors('train'):
        if args.data is not None:
            from msda_plugin.tools.custom_data.training import prepare

            cfg = prepare(args)
            if args.dry_run:
                return 0
        else:
            given = [name for name in OWN_DATA if getattr(args, name) is not None and getattr(args, name) is not False]
            if given or args.config is None:
                named = ', '.join('--' + name.replace('_', '-') for name in given)
                raise ValueError(
                    f'{named} {"goes" if len(given) == 1 else "go"} with --data; in a config, set it with --cfg-options'
                    if given
                    else 'a config or --data is needed: the path of a Python config file, or a folder with '
                    'data in COCO format'
                )
            cfg = load_config(args)
        if args.amp:
            cfg.optim_wrapper.type = 'AmpOptimWrapper'
            cfg.optim_wrapper.loss_scale = 'dynamic'
        if args.auto_scale_lr:
            if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
                raise ValueError(
                    '--auto-scale-lr needs auto_scale_lr = dict(base_batch_size=…) in the config, which has none'
                )
            cfg.auto_scale_lr.enable = True
        if args.resume is not None:
            cfg.resume = True
            # None: the latest checkpoint of the work dir; a pretrained one that the config names is no longer meant.
            cfg.load_from = None if args.resume == 'auto' else args.resume
        runner = build_runner(cfg, 'train', 'val')
        if isinstance(runner, DetectionRunner):
            runner.find_resumed()
    try:
        return interrupt.train(runner)
    except DiskFullError as error:
        print(f'msda_plugin train: {error}', file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    from msda_plugin.tools.common.launch import add_arguments

    parser = argparse.ArgumentParser(
        prog='python -m msda_plugin train',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description='Train a detector from a config, or on own data in COCO format.',
        epilog='examples:\n'
        '  python -m msda_plugin train configs/shapes/deformable-detr-two-stage_shunted-nano_1xb4-8e_shapes.py\n'
        '  python -m msda_plugin train --data data/mine --epochs 30 --batch-size 4\n'
        '  python -m msda_plugin train --data data/mine --resume',
    )
    parser.add_argument('config', nargs='?', help='path of a Python config file; not with --data')
    add_arguments(parser)
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by batch size, from auto_scale_lr.base_batch_size of the config',
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='go on from a checkpoint; without a name, from the last whole one in the work dir',
    )

    own = parser.add_argument_group(
        'own data',
        'The classes follow from the data. The data is checked first; the '
        'config that is used is written to the work dir.',
    )
    own.add_argument('--data', metavar='DIR|FILE', help='folder with data in COCO format, or the annotation file')
    own.add_argument(
        '--val', metavar='FILE', help='annotation file for validation (default: found beside, or split off)'
    )
    own.add_argument(
        '--val-part',
        type=float,
        metavar='P',
        help='part of the images that is split off for validation where there are no such data (default: 0.2)',
    )
    own.add_argument('--images', metavar='DIR', help='folder that the file names start from (default: found)')
    own.add_argument('--classes', nargs='+', metavar='NAME', help='classes to use (default: all that have boxes)')
    own.add_argument('--skip-bad-images', action='store_true', help='leave out images that are missing or unreadable')
    own.add_argument('--model', metavar='NAME', help='name or path of a config with the model; "list" lists them')
    own.add_argument('--load-from', metavar='FILE', help='checkpoint with the weights to start from')
    own.add_argument('--epochs', type=int, metavar='N', help='default: 50')
    own.add_argument('--batch-size', type=int, metavar='N', help='images of one iteration (default: 4)')
    effective = own.add_mutually_exclusive_group()
    effective.add_argument(
        '--accumulate', type=int, metavar='N', help='iterations of one step of the optimizer (default: 1)'
    )
    effective.add_argument(
        '--effective-batch', type=int, metavar='N', help='images of one step of the optimizer; instead of --accumulate'
    )
    own.add_argument('--lr', type=float, help='learning rate (default: that of the model, scaled to the batch)')
    own.add_argument(
        '--image-size',
        metavar='S|WxH',
        help='images are fitted into this, pixels (default: 320, or as in the config of the model)',
    )
    own.add_argument(
        '--workers', type=int, metavar='N', help='processes that load images (default: half of the cores, 4 at most)'
    )
    own.add_argument('--seed', type=int, help='of the split and the training (default: 0)')
    own.add_argument('--device', help='cpu, cuda or cuda:N (default: the GPU where there is one)')
    own.add_argument('--dry-run', action='store_true', help='check the data, write the config, and stop')
    return parser


if __name__ == '__main__':
    sys.exit(main())
