"""``python -m msda_plugin mmcv-ops install | remove | status``: run mmcv without its compiled operators."""

import argparse
import sys
import textwrap

from msda_plugin import mmcv_ops


def _status() -> int:
    found = mmcv_ops.find()
    origin = dict(
        compiled='compiled mmcv',
        substitute='msda_plugin',
        foreign='unknown; not written by msda_plugin',
        none=f'none; "{mmcv_ops.INSTALL}" provides them',
    )[found.kind]
    print(f'mmcv       {found.folder}\noperators  {origin}' + (f' ({found.file})' if found.file else ''))
    rows = mmcv_ops.status()
    missing = [row for row in rows if row.runs == 'not available']
    if found.kind == 'substitute' and len(missing) < len(rows):
        print()
        for row in rows:
            if row.runs != 'not available':
                print(f'  {row.operator:<22} {row.device:<5} {row.runs:<20} {row.reason}'.rstrip())
    if missing and found.kind in ('substitute', 'compiled'):
        print(f'\nnot available: {missing[0].reason}')
        names = ', '.join(row.operator for row in missing) if len(missing) < len(rows) else 'all operators'
        print(textwrap.fill(names, 100, initial_indent='  ', subsequent_indent='  '))
    return 1 if len(missing) == len(rows) else 0


def main(argv: list[str]) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog='python -m msda_plugin mmcv-ops',
        description='Provide the operators that MMDetection uses most if mmcv was installed without compiling them. '
        'Compiled operators are never replaced.',
        epilog='Exit status: 0 if done; 1 if status finds no operators; 2 if the command cannot be carried out.',
    )
    commands = parser.add_subparsers(dest='command', required=True, metavar='install | remove | status')
    commands.add_parser('install', help='write _ext.py into the folder of mmcv')
    commands.add_parser('remove', help='delete that file')
    commands.add_parser('status', help='show what runs each operator')
    command = parser.parse_args(argv).command
    try:
        if command == 'status':
            return _status()
        print(mmcv_ops.install() if command == 'install' else mmcv_ops.remove())
    except RuntimeError as error:
        print(f'msda_plugin mmcv-ops: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
