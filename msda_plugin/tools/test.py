"""``python -m msda_plugin test CONFIG CHECKPOINT``; also the script that ``mim test msda_plugin CONFIG`` runs."""

import argparse
import sys
from pathlib import Path

from msda_plugin.tools.common.errors import user_errors


def main(argv: list[str] | None = None) -> int:
    from mmengine.dist import is_main_process

    from msda_plugin.engine.checkpoint_files import no_file
    from msda_plugin.engine.nms import set_nms
    from msda_plugin.tools.common.launch import (
        add_arguments,
        build_runner,
        check_folder,
        exit_if_loading_fails,
        load_config,
    )

    parser = argparse.ArgumentParser(
        prog='python -m msda_plugin test',
        description='Evaluate a checkpoint on the test data of its config.',
        epilog='example: python -m msda_plugin test configs/shapes/'
        'rtdetr_r18vd-nano_1xb4-7e_shapes.py work_dirs/shapes/epoch_7.pth',
    )
    parser.add_argument('config', help='path of a Python config file')
    parser.add_argument('checkpoint', help='path of a .pth file')
    add_arguments(parser, work_dir="folder for the results (default: test/ in the config's work dir)")
    parser.add_argument(
        '--nms',
        action=argparse.BooleanOptionalAction,
        help='non-maximum suppression within each class (default: as in the config)',
    )
    parser.add_argument(
        '--accelerate',
        choices=('float32', 'bfloat16'),
        help='run faster in this dtype: msda_plugin.accelerate with inference=True (default: as in the config)',
    )
    parser.add_argument('--out', help='pickle file for the predictions (.pkl)')
    parser.add_argument('--show-dir', help='folder, below the results, for images with true and predicted boxes')
    parser.add_argument(
        '--report',
        nargs='?',
        const='',
        metavar='DIR',
        help='write report.html: accuracy of the classes, confusion matrix, worst mistakes (default DIR: the results)',
    )
    args = parser.parse_args(argv)
    with user_errors('test'):
        cfg = load_config(args)
        if not args.work_dir:
            cfg.work_dir = str(Path(cfg.work_dir, 'test'))
        if not Path(args.checkpoint).is_file() and '://' not in args.checkpoint:
            raise FileNotFoundError(
                f'the checkpoint {args.checkpoint} {no_file(args.checkpoint)}; give the path of a .pth file'
            )
        if not cfg.get('test_dataloader'):
            raise ValueError(f'{args.config} has no test data; add test_dataloader, test_evaluator and test_cfg')
        if args.verbose:
            cfg.verbose = True
        if args.accelerate:
            dtype = None if args.accelerate == 'float32' else args.accelerate
            hook = dict(type='msda_plugin.AccelerateHook', inference=True, dtype=dtype)
            cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), hook]
        if args.nms is not None:
            set_nms(cfg.model, args.nms)
        cfg.load_from, cfg.resume = args.checkpoint, False
        if args.out:
            if not args.out.endswith(('.pkl', '.pickle')):
                raise ValueError(f'--out must be a .pkl file, got {args.out}')
            check_folder(Path(args.out).parent, '--out')
            if not cfg.get('test_evaluator'):
                raise ValueError(f'--out requires a test_evaluator, but {args.config} has none')
            evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
            cfg.test_evaluator = [*evaluators, dict(type='mmdet.DumpDetResults', out_file_path=args.out)]
        if args.show_dir:
            cfg.setdefault('default_hooks', {})['visualization'] = dict(
                type='msda_plugin.DrawnTestHook', test_out_dir=args.show_dir
            )
        if args.report is not None:
            check_folder(args.report, '--report')
            cfg.custom_hooks = [
                *(cfg.get('custom_hooks') or []),
                dict(type='msda_plugin.DetectionReportHook', out_dir=args.report or None),
            ]
        runner = build_runner(cfg, 'test')
    exit_if_loading_fails(runner, 'test')
    runner.test()
    if is_main_process():
        results = Path(cfg.work_dir, runner.timestamp)
        files = {
            'metrics': results / f'{runner.timestamp}.json',
            'log': results / f'{runner.timestamp}.log',
            'images': results / args.show_dir if args.show_dir else None,
            'predictions': args.out,
            'report': None if args.report is None else Path(args.report or results, 'report.html'),
        }
        print('\n'.join(f'{name + ":":<13}{path}' for name, path in files.items() if path and Path(path).exists()))
    return 0


if __name__ == '__main__':
    sys.exit(main())
