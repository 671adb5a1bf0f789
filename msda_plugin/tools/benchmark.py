"""``python -m msda_plugin benchmark SUBJECT``: ours against the stock implementation, side by side, in one run."""
import argparse
import pkgutil
from importlib import import_module

from msda_plugin.tools import benchmarks


def main(argv: list[str]) -> int:
    """Run the subject that ``argv`` names; each module of `msda_plugin.tools.benchmarks` is one."""
    subjects = sorted(module.name for module in pkgutil.iter_modules(benchmarks.__path__))
    parser = argparse.ArgumentParser(prog='python -m msda_plugin benchmark', description=__doc__)
    subparsers = parser.add_subparsers(dest='subject', required=True, metavar='SUBJECT')
    # Only the one that is asked for is imported, if it is plain which.
    for subject in [argv[0]] if argv and argv[0] in subjects else subjects:
        module = import_module(f'msda_plugin.tools.benchmarks.{subject}')
        module.add_parser(subparsers)
    args = parser.parse_args(argv)
    return import_module(f'msda_plugin.tools.benchmarks.{args.subject}').run(args)
