"""``python -m msda_plugin models``: the models that ``--model`` takes."""

import argparse
import sys

from msda_plugin.tools.common.errors import user_errors


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog='python -m msda_plugin models',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="List the models that --model takes: msda_plugin's configs, and MMDetection's detection\n"
        'transformers with published weights. A name may be cut at an underscore: deformable-detr_r50.',
        epilog='examples:\n  python -m msda_plugin models\n  python -m msda_plugin models retinanet',
    )
    parser.add_argument(
        'text', nargs='?', default='', help='list the names that contain this text, of all models of MMDetection'
    )
    args = parser.parse_args(argv)
    with user_errors('models'):
        from msda_plugin.engine.model_zoo import models

        found = [model for name, model in models().items() if args.text in name and (args.text or model.detr_family)]
        if not found:
            raise ValueError(f"no name of a model contains '{args.text}'; python -m msda_plugin models lists the names")
    print(table(found))
    return 0


def table(found: list) -> str:
    """One line per model: name, parameters, the data its schedule is made for, and published weights."""
    rows = [('MODEL', 'PARAMETERS (M)', 'MADE FOR', 'PUBLISHED WEIGHTS')]
    for model in found:
        parameters = f'{model.parameters / 1e6:.1f}' if model.parameters else ''
        weights = '' if model.weights is None else 'yes' if model.box_ap is None else f'box AP {model.box_ap:.1f}'
        rows.append((model.name, parameters, model.data, weights))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return '\n'.join(
        f'{name:<{widths[0]}}  {parameters:>{widths[1]}}  {data:<{widths[2]}}  {weights}'.rstrip()
        for name, parameters, data, weights in rows
    )


if __name__ == '__main__':
    sys.exit(main())
