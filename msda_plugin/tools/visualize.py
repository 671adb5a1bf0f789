"""``python -m msda_plugin visualize IMAGE``: figures and an HTML page of the attention of a detector.

Output files:

- ``IMAGE.html``: all chosen queries and layers, with selectors; opens in a browser without a server;
- ``IMAGE_QUERY.png``: all layers, for each query;
- ``IMAGE_QUERY_LAYER.png``: head by head, for each layer of ``--layer``;
- ``IMAGE_QUERY_edges.png``: D-FINE's distributions of the edges of a detection, layer by layer.
"""

import argparse
import re
import sys
from pathlib import Path

from msda_plugin.engine.detector import Detector
from msda_plugin.tools.common.errors import user_errors

DETECTIONS = 3  # number of detections shown without --query and --detection


def point(text: str) -> tuple[float, float]:
    """'64,32' → (64.0, 32.0)"""
    found = re.fullmatch(r'\s*(\d+(?:\.\d+)?)\s*,\s*(\d+(?:\.\d+)?)\s*', text)
    if not found:
        raise argparse.ArgumentTypeError(f'{text!r} is not a point; expected X,Y in image pixels, such as 64,32')
    return float(found[1]), float(found[2])


def choose_detections(recording, sample, score_thr: float) -> list[int]:
    """The highest-scoring detections, one per decoder query: a query can be detected as several classes."""
    if recording.boxes is None:
        return []
    chosen = {}
    for number, score in enumerate(sample.pred_instances.scores.tolist()):
        if score >= score_thr and len(chosen) < DETECTIONS:
            chosen.setdefault(recording.query_of(number, sample), number)
    return list(chosen.values())


def slug(label: str) -> str:
    """'detection 0: ring 0.66' → 'detection-0', 'point (64, 32)' → 'point-64-32'"""
    return re.sub(r'[^\w.]+', '-', label.split(':')[0]).strip('-')


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns its exit status."""
    parser = argparse.ArgumentParser(
        prog='python -m msda_plugin visualize',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description='Visualize the attention of a detector: the sampling points of each layer, head and level,\n'
        'the cells of Shunted attention, the moved points of DAT, and the refinement of boxes.\n'
        'Writes figures (PNG) and a self-contained page with selectors (HTML).',
        epilog='examples:\n'
        '  python -m msda_plugin visualize photo.jpg\n'
        '  python -m msda_plugin visualize photo.jpg --detection 0 1 --layer decoder.layers.1\n'
        '  python -m msda_plugin visualize photo.jpg --query 64,32 --layer backbone encoder\n'
        '  python -m msda_plugin visualize photo.jpg --checkpoint work_dirs/mine/epoch_12.pth --layer all',
    )
    parser.add_argument('image', help='image file')
    parser.add_argument(
        '--query',
        nargs='+',
        type=point,
        default=[],
        metavar='X,Y',
        help='points of the image, in pixels, whose attention in backbone and encoder is shown',
    )
    parser.add_argument(
        '--detection',
        nargs='+',
        type=int,
        default=[],
        metavar='N',
        help='detections, by score from 0, whose decoder query and box center are shown '
        f'(default without --query: the {DETECTIONS} highest-scoring ones, or the image center if there are none)',
    )
    parser.add_argument(
        '--layer',
        nargs='+',
        metavar='NAME',
        help='layers to show, and to draw head by head: parts of their names, patterns with *, or all '
        '(default: the last block of each backbone stage and all other layers, not head by head)',
    )
    parser.add_argument('--config', help='Python config file (default: the one that the checkpoint contains)')
    parser.add_argument(
        '--checkpoint', help='.pth file (default: the best one of `make train`, or of the work dir of --config)'
    )
    parser.add_argument(
        '--out', default='attention', metavar='DIR', help='folder for the output (default: %(default)s)'
    )
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        metavar='P',
        help='minimum score of detections shown by default, 0-1 (default: %(default)s)',
    )
    parser.add_argument('--device', help='cpu, cuda or cuda:N (default: cuda if available)')
    args = parser.parse_args(argv)
    with user_errors('visualize'):
        from msda_plugin.engine.inference import predict, read_image
        from msda_plugin.tools.common.launch import check_device
        from msda_plugin.visualization import (
            draw_edges,
            draw_heads,
            draw_query,
            record_attention,
            score_caption,
            write_attention_page,
            write_png,
        )

        if not 0 <= args.score_thr <= 1:
            raise ValueError(f'--score-thr is {args.score_thr}; expected a number from 0 to 1')
        if args.device:
            check_device(args.device)
        image = read_image(args.image)
        detector = Detector(config=args.config, checkpoint=args.checkpoint, device=args.device)
        model = detector.model
        with record_attention(model) as recording:
            sample = predict(model, image)
        points, detections, reason = args.query, args.detection, ''
        if not points and not detections:
            detections = choose_detections(recording, sample, args.score_thr)
            if not detections:
                points = [(image.shape[1] / 2, image.shape[0] / 2)]
                reason = 'the model has no decoder queries'
                if recording.boxes is not None:
                    reason = score_caption(sample.pred_instances.scores.tolist(), args.score_thr)
        queries = [recording.at_detection(number, sample, detector.class_names, args.layer) for number in detections]
        queries += [recording.at_point(at, sample, args.layer) for at in points]
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)

    name = Path(args.image).stem
    number = f'{len(queries)} {"query" if len(queries) == 1 else "queries"}'
    print(f'{detector.checkpoint}: {number}, {len(recording.records)} attention layers')
    if reason:
        print(f'{reason}: the query is the center of the image')
    written = []
    edges = {
        query.label: recording.edges_of(number, sample) for number, query in zip(detections, queries, strict=False)
    }
    for query in queries:
        figures = {'': draw_query(image, query, title=name)}
        if args.layer:
            figures |= {f'_{view.name}': draw_heads(image, query, view, title=name) for view in query.layers}
        if edges.get(query.label) is not None:
            figures['_edges'] = draw_edges(edges[query.label], recording.edge_distances, title=f'{name}: {query.label}')
        for suffix, figure in figures.items():
            written.append(out / f'{name}_{slug(query.label)}{suffix}.png')
            write_png(written[-1], figure)
    written.append(out / f'{name}.html')
    write_attention_page(written[-1], image, queries, title=f'{name}: attention')
    for path in written:
        print(path)
    return 0


if __name__ == '__main__':
    sys.exit(main())
