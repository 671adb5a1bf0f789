"""``python -m msda_plugin train CONFIG``; also the script that ``mim train msda_plugin CONFIG`` runs."""
import argparse
import sys

from msda_plugin.tools.errors import user_errors


def main(argv: list[str] | None = None) -> int:
    from msda_plugin.tools.launch import add_arguments, build_runner, load_config
    parser = argparse.ArgumentParser(
        prog='python -m msda_plugin train', description='Train a detector from a config.',
        epilog='example: python -m msda_plugin train configs/shapes/'
               'deformable-detr-two-stage_shunted-nano_1xb4-8e_shapes.py --work-dir work_dirs/shapes')
    parser.add_argument('config', help='path of a Python config file')
    add_arguments(parser)
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision')
    parser.add_argument('--auto-scale-lr', action='store_true',
                        help='scale the learning rate by batch size, from auto_scale_lr.base_batch_size of the config')
    parser.add_argument('--resume', nargs='?', const='auto',
                        help='go on from a checkpoint; without a name, from the latest one in the work dir')
    args = parser.parse_args(argv)
    with user_errors('train'):
        cfg = load_config(args)
        if args.amp:
            cfg.optim_wrapper.type = 'AmpOptimWrapper'
            cfg.optim_wrapper.loss_scale = 'dynamic'
        if args.auto_scale_lr:
            if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
                raise ValueError('--auto-scale-lr needs auto_scale_lr = dict(base_batch_size=…) in the config, '
                                 'which has none')
            cfg.auto_scale_lr.enable = True
        if args.resume is not None:
            cfg.resume = True
            # None: the latest checkpoint of the work dir; a pretrained one that the config names is no longer meant.
            cfg.load_from = None if args.resume == 'auto' else args.resume
        runner = build_runner(cfg, 'train', 'val')
    runner.train()
    return 0


if __name__ == '__main__':
    sys.exit(main())
