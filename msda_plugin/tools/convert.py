"""``python -m msda_plugin convert FAMILY IN OUT``: a published checkpoint becomes ours, with an account of each key."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

from msda_plugin.convert import FAMILIES, Conversion, convert, load_checkpoint_file
from msda_plugin.files import atomic_write
from msda_plugin.tools.common.errors import user_errors


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog='python -m msda_plugin convert',
        description='Convert a published checkpoint to the keys of our modules, and say where every key went.',
        epilog='example: python -m msda_plugin convert vision_transformer mae_pretrain_vit_base.pth vit-base.pth. '
        "A detector takes its file as load_from, a backbone as init_cfg=dict(type='Pretrained', "
        "checkpoint='vit-base.pth').",
    )
    parser.add_argument('family', choices=FAMILIES, metavar='FAMILY', help=f'what it is of: {", ".join(FAMILIES)}')
    parser.add_argument('source', metavar='IN', help='the published file, or its URL; no code in it is run')
    parser.add_argument('out', metavar='OUT', help='the file to write: {"state_dict": …, "meta": …}, as MMEngine loads')
    parser.add_argument('--prefix', help='take the keys under this prefix alone, such as backbone')
    parser.add_argument(
        '--json', metavar='REPORT', help='file for the account: the keys taken, and those dropped and why'
    )
    parser.add_argument('--force', action='store_true', help='replace files that are there')
    args = parser.parse_args(argv)
    with user_errors('convert'):
        targets = [Path(args.out), *([Path(args.json)] if args.json else [])]
        for target in targets:
            check_target(target, args.force)
        if len({target.resolve() for target in targets}) < len(targets):
            raise ValueError(f'OUT and --json both name {args.out}; the account goes to a file of its own')
        conversion = convert(load_checkpoint_file(args.source, args.prefix), args.family)
        meta = dict(family=args.family, source=args.source)
        write_whole(targets[0], lambda file: torch.save(dict(state_dict=conversion.state_dict, meta=meta), file))
        if args.json:
            account = dict(**meta, taken=conversion.taken, dropped=conversion.dropped)
            write_whole(targets[1], lambda file: file.write(json.dumps(account, indent=1).encode() + b'\n'))
    print(report(conversion))
    print(f'wrote {args.out}')
    return 0


def report(conversion: Conversion) -> str:
    """The account of a conversion, a line a key and a sum; a family refuses a file that lacks a key."""
    lines = [f'taken    {key} -> {new_key}' for key, new_key in conversion.taken.items()]
    lines += [f'dropped  {key}: {reason}' for key, reason in conversion.dropped.items()]
    return '\n'.join(
        [
            *lines,
            f'{len(conversion.taken)} keys taken, {len(conversion.dropped)} dropped, none missing; '
            f'{len(conversion.state_dict)} entries in the result',
        ]
    )


def check_target(path: Path, force: bool) -> None:
    """Raise OSError where a file cannot, or without ``force`` must not, be written."""
    if path.is_dir():
        raise IsADirectoryError(f'{path} is a folder; give the path of a file to write')
    if not path.parent.is_dir():
        raise FileNotFoundError(f'the folder {path.parent} of {path.name} does not exist; make it first')
    if path.exists() and not force:
        raise FileExistsError(f'{path} exists; pass --force to replace it, or choose another name')


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a file of this path, which appears when it is whole; else nothing changes.

    Raises:
        OSError: the disk is full, or does not let us write.
    """
    try:
        with atomic_write(path) as part, part.open('xb') as file:
            write(file)
    except (OSError, RuntimeError) as error:  # torch.save makes the former the latter
        raise OSError(f'{path} could not be written, and is as it was: {error}') from error


if __name__ == '__main__':
    sys.exit(main())
