"""``python -m msda_plugin test CONFIG CHECKPOINT``; also the script that ``mim test msda_plugin CONFIG`` runs."""

import argparse
import sys
from pathlib import Path

from msda_plugin.tools.common.errors import user_errors


def main(argv: list[str] | None = None) -> int:
    from msda_plugin.tools.common.launch import add_arguments, build_runner, load_config

    parser = argparse.ArgumentParser(
        prog='python -m msda_plugin test',
        description='Evaluate a checkpoint on the test data of its config.',
        epilog='example: python -m msda_plugin test configs/shapes/'
        'deformable-detr-two-stage_shunted-nano_1xb4-8e_shapes.py work_dirs/shapes/epoch_8.pth',
    )
    parser.add_argument('config', help='path of a Python config file')
    parser.add_argument('checkpoint', help='path of a .pth file')
    add_arguments(parser)
    parser.add_argument('--out', help='pickle file for the predictions (.pkl)')
    parser.add_argument('--show-dir', help='folder, below the work dir, for images with true and predicted boxes')
    args = parser.parse_args(argv)
    with user_errors('test'):
        cfg = load_config(args)
        if not Path(args.checkpoint).is_file() and '://' not in args.checkpoint:
            raise FileNotFoundError(f'the checkpoint {args.checkpoint} does not exist; give the path of a .pth file')
        if not cfg.get('test_dataloader'):
            raise ValueError(f'{args.config} has no test data; add test_dataloader, test_evaluator and test_cfg')
        cfg.load_from = args.checkpoint
        if args.out:
            if not args.out.endswith(('.pkl', '.pickle')):
                raise ValueError(f'--out must be a .pkl file, got {args.out}')
            if not cfg.get('test_evaluator'):
                raise ValueError(f'--out requires a test_evaluator, but {args.config} has none')
            evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
            cfg.test_evaluator = [*evaluators, dict(type='mmdet.DumpDetResults', out_file_path=args.out)]
        if args.show_dir:
            cfg.setdefault('default_hooks', {})['visualization'] = dict(
                type='mmdet.DetVisualizationHook', draw=True, test_out_dir=args.show_dir
            )
        runner = build_runner(cfg, 'test')
    # The checkpoint is loaded by runner.test(), after it has set up hooks such as EMAHook.
    load = runner.load_or_resume

    def load_or_exit() -> None:
        with user_errors('test'):
            load()

    runner.load_or_resume = load_or_exit
    runner.test()
    return 0


if __name__ == '__main__':
    sys.exit(main())
