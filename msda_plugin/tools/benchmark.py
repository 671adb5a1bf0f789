"""``python -m msda_plugin benchmark SUBJECT``: msda_plugin against the stock implementations, in the same run."""

import argparse
from importlib import import_module

# Modules of `msda_plugin.tools.benchmarks` with `add_parser` and `run`.
SUBJECTS = (
    'all',
    'backbone',
    'detectors',
    'gpu',
    'head',
    'layer',
    'model',
    'onnxruntime',
    'op',
    'own_data',
    'realtime',
)


def main(argv: list[str]) -> int:
    """Run the subject named by ``argv``; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog='python -m msda_plugin benchmark',
        description='Compare msda_plugin with the stock implementations, in the same run.',
    )
    subparsers = parser.add_subparsers(dest='subject', required=True, metavar='SUBJECT')
    # Import only the requested subject: the others may need packages that are not installed.
    for subject in [argv[0]] if argv and argv[0] in SUBJECTS else SUBJECTS:
        import_module(f'msda_plugin.tools.benchmarks.{subject}').add_parser(subparsers)
    args = parser.parse_args(argv)
    if isinstance(getattr(args, 'device', None), str):
        # Not before: `benchmark gpu` runs without MMEngine.
        from msda_plugin.tools.common.errors import user_errors
        from msda_plugin.tools.common.launch import check_device

        with user_errors(f'benchmark {args.subject}'):
            check_device(args.device)
    return import_module(f'msda_plugin.tools.benchmarks.{args.subject}').run(args)
