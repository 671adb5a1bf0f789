"""``python -m msda_plugin benchmark SUBJECT``: ours against the stock implementation, side by side, in one run."""

import argparse
from importlib import import_module

# Each is a module of `msda_plugin.tools.benchmarks` with `add_parser` and `run`.
SUBJECTS = ('all', 'backbone', 'detectors', 'gpu', 'head', 'layer', 'model', 'op')


def main(argv: list[str]) -> int:
    """Run the subject that ``argv`` names."""
    parser = argparse.ArgumentParser(prog='python -m msda_plugin benchmark', description=__doc__)
    subparsers = parser.add_subparsers(dest='subject', required=True, metavar='SUBJECT')
    # Only the one that is asked for is imported, if it is plain which.
    for subject in [argv[0]] if argv and argv[0] in SUBJECTS else SUBJECTS:
        import_module(f'msda_plugin.tools.benchmarks.{subject}').add_parser(subparsers)
    args = parser.parse_args(argv)
    return import_module(f'msda_plugin.tools.benchmarks.{args.subject}').run(args)
