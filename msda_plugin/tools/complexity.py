"""``python -m msda_plugin complexity``: MACs, memory and time of attention layers, and MACs of a config's model."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from msda_plugin.tools.common.errors import user_errors

EXAMPLES = """examples:
  python -m msda_plugin complexity --map 100 134 --channels 256
  python -m msda_plugin complexity configs/deformable_detr/deformable-detr_r50_16xb2-50e_coco.py --size 800 1333
  python -m msda_plugin complexity --measure 32 48 64 96 --plot growth.png"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog='python -m msda_plugin complexity',
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description='Print the MACs (multiply-accumulate operations, of 2 FLOPs each) and the memory of a convolution '
        'and of\nattention layers on a feature map; with a config, the MACs and parameters of each module of its '
        'model;\nwith --measure, the time of attention layers by resolution, and how it grows.',
    )
    parser.add_argument('config', nargs='?', help='path of a Python config file')
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        default=(800, 1333),
        metavar=('H', 'W'),
        help='image size, for a config (default: 800 1333)',
    )
    parser.add_argument('--depth', type=int, default=2, help='depth of the listed modules, for a config (default: 2)')
    parser.add_argument(
        '--map',
        type=int,
        nargs=2,
        default=(100, 134),
        metavar=('H', 'W'),
        help='size of the feature map, for the formulas (default: 100 134)',
    )
    parser.add_argument('--channels', type=int, default=256, help='channels C (default: 256)')
    parser.add_argument('--heads', type=int, default=8, help='attention heads (default: 8)')
    parser.add_argument('--queries', type=int, default=300, help='object queries N_q of a decoder (default: 300)')
    parser.add_argument('--window', type=int, default=7, help='window size M (default: 7)')
    parser.add_argument('--reduction', type=int, default=8, help='spatial reduction R (default: 8)')
    parser.add_argument('--points', type=int, default=4, help='sampling points K per head and level (default: 4)')
    parser.add_argument(
        '--measure', type=int, nargs='+', metavar='SIDE', help='time each attention on square maps of these sides'
    )
    parser.add_argument('--plot', metavar='FILE.png', help='plot the measurements')
    parser.add_argument('--device', default='cpu', help='device for --measure: cpu, cuda or cuda:N (default: cpu)')
    args = parser.parse_args(argv)
    with user_errors('complexity'):
        _check(args)
        if args.config:
            _print_config(args)
        elif args.measure:
            _print_growth(args)
        else:
            _print_formulas(args)
    return 0


def _check(args: argparse.Namespace) -> None:
    numbers = dict(
        size=args.size,
        depth=[args.depth],
        map=args.map,
        channels=[args.channels],
        heads=[args.heads],
        queries=[args.queries],
        window=[args.window],
        reduction=[args.reduction],
        points=[args.points],
        measure=args.measure or [1],
    )
    for name, values in numbers.items():
        if min(values) < 1:
            raise ValueError(f'--{name} is {" ".join(map(str, values))}, but it must be at least 1')
    if args.channels % args.heads:
        raise ValueError(f'--channels {args.channels} is not a multiple of --heads {args.heads}')
    if args.reduction > 1 and args.reduction % 2:
        raise ValueError(f'--reduction is {args.reduction}, but shunted attention halves it: use 1 or an even number')
    if args.plot and not args.measure:
        raise ValueError('--plot needs --measure with the sides to measure, such as --measure 32 48 64')
    if args.measure and (len(set(args.measure)) < 2 or min(args.measure) < 8):
        raise ValueError(f'--measure is {args.measure}, but at least two different sides of 8 or more are needed')


def _print_formulas(args: argparse.Namespace) -> None:
    from msda_plugin import costs

    (height, width), channels, heads = args.map, args.channels, args.heads
    pixels, image = height * width, (8 * height, 8 * width)
    rows = [
        ('convolution 3x3', 'H W C^2 k^2', costs.convolution(height, width, channels)),
        (
            'full self-attention (Transformer)',
            '4 N C^2 + 2 N^2 C, N = H W',
            costs.self_attention(pixels, channels, heads),
        ),
        (
            'ViT, patches of 16 of the image',
            'the same, N = H_i W_i / 16^2',
            costs.vit_attention(*image, channels, 16, heads),
        ),
        ('DETR, encoder layer', '4 H W C^2 + 2 (H W)^2 C', costs.detr_encoder_layer(height, width, channels, heads)),
        (
            'DETR, decoder layer',
            '(6 N_q + 2 H W) C^2 + 2 N_q (N_q + H W) C',
            costs.detr_decoder_layer(args.queries, height, width, channels, heads),
        ),
        (
            f'PVT, R = {args.reduction}',
            '(3 + 2 / R^2) H W C^2 + 2 (H W)^2 C / R^2',
            costs.spatial_reduction_attention(height, width, channels, args.reduction, heads),
        ),
        (
            'PVT v2, linear',
            '2 H W C^2 + 2 * 49 H W C',
            costs.linear_spatial_reduction_attention(height, width, channels, heads),
        ),
        (
            f'Swin, M = {args.window}',
            '4 H W C^2 + 2 M^2 H W C',
            costs.window_attention(height, width, channels, args.window, heads),
        ),
        (
            f'Shunted, R = {args.reduction}',
            '(4 + 5 / R^2) H W C^2 + 5 (H W)^2 C / R^2',
            costs.shunted_attention(height, width, channels, args.reduction, heads),
        ),
        (
            'Deformable, encoder (one level)',
            '2 H W C^2 + 3 M K H W C + 5 H W K C',
            costs.deformable_attention(pixels, pixels, channels, heads, 1, args.points),
        ),
        (
            'Deformable, decoder (one level)',
            '(H W + N_q) C^2 + 3 M K N_q C + 5 N_q K C',
            costs.deformable_attention(args.queries, pixels, channels, heads, 1, args.points),
        ),
    ]
    print(
        f'One layer on a map of H x W = {height} x {width}, C = {channels}, {heads} heads, N_q = {args.queries}, '
        f'M = {args.window} (window; heads in the deformable rows), R = {args.reduction}, K = {args.points}.\n'
        f'The image of the ViT row is {image[0]} x {image[1]}. Memory: what a plain implementation holds in '
        'addition to input and output, in float32.\n'
    )
    table = [
        (
            name,
            formula,
            f'{cost.projection / 1e9:.3f}',
            f'{cost.mixing / 1e9:.3f}',
            f'{cost.macs / 1e9:.3f}',
            f'{cost.memory * 4 / 2**20:.1f}',
        )
        for name, formula, cost in rows
    ]
    _print_table(('layer', 'MACs', 'projection GMACs', 'mixing GMACs', 'total GMACs', 'memory MiB'), table)


def _print_config(args: argparse.Namespace) -> None:
    import torch
    from mmdet.registry import MODELS
    from mmengine.registry import init_default_scope

    from msda_plugin.costs.counting import count_macs
    from msda_plugin.tools.common.launch import read_config

    cfg = read_config(args.config)
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    model = MODELS.build(cfg.model).eval()
    batch = model.data_preprocessor(_blank_image(args.size), training=False)
    counts = count_macs(model, lambda: model(**batch, mode='predict'))
    parameters = {name: sum(p.numel() for p in module.parameters()) for name, module in model.named_modules()}
    rows = [
        (
            name or type(model).__name__,
            type(module).__name__,
            f'{parameters[name] / 1e6:.3f}',
            f'{counts[name] / 1e9:.3f}',
            f'{counts[name] / max(counts[""], 1):.1%}',
        )
        for name, module in model.named_modules()
        if name in counts and (not name or name.count('.') < args.depth)
    ]
    print(f'{args.config}\none image of {args.size[0]} x {args.size[1]}, float32; torch {torch.__version__}\n')
    _print_table(('module', 'type', 'parameters M', 'GMACs', 'share'), rows)


def _blank_image(size: Sequence[int]) -> dict:
    import torch
    from mmdet.structures import DetDataSample

    meta = dict(img_shape=tuple(size), ori_shape=tuple(size), scale_factor=(1.0, 1.0))
    return dict(inputs=[torch.full((3, *size), 127, dtype=torch.uint8)], data_samples=[DetDataSample(metainfo=meta)])


def _print_growth(args: argparse.Namespace) -> None:
    import torch

    from msda_plugin.tools.benchmarks.growth import exponent, measure_growth
    from msda_plugin.tools.benchmarks.plots import draw_growth
    from msda_plugin.tools.common.launch import check_device

    check_device(args.device)
    if args.plot and not Path(args.plot).absolute().parent.is_dir():
        raise FileNotFoundError(f'--plot is {args.plot}, but its folder does not exist: create it first')
    sides = sorted(set(args.measure))
    seconds = measure_growth(sides, args.channels, args.heads, torch.device(args.device))
    pixels = [side**2 for side in sides]
    exponents = {name: exponent(pixels, values) for name, values in seconds.items()}
    rows = [
        (name, *(f'{second * 1e3:.2f}' for second in values), f'{exponents[name]:.2f}')
        for name, values in seconds.items()
    ]
    print(
        f'Milliseconds of one layer, batch 1, float32, C = {args.channels}, {args.device}, '
        f'{torch.get_num_threads()} threads, torch {torch.__version__}; medians. Growth: exponent b in '
        'time = a pixels^b, fitted to the three largest maps.\n'
    )
    _print_table(('layer', *(f'{side} x {side}' for side in sides), 'growth'), rows)
    if args.plot:
        draw_growth(pixels, seconds, exponents).savefig(args.plot)
        print(f'\nplot saved to {args.plot}')


def _print_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print a Markdown table with numeric columns aligned to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    numeric = [all(row[i].replace('.', '').rstrip('%').isdigit() for row in rows) for i in range(len(head))]

    def line(row: tuple[str, ...]) -> str:
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        return f'| {" | ".join(cells)} |'

    print(line(head))
    print(
        '|'
        + '|'.join('-' * (width + 1) + (':' if right else '-') for width, right in zip(widths, numeric, strict=True))
        + '|'
    )
    for row in rows:
        print(line(row))
