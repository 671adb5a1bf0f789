"""``python -m msda_plugin convert FAMILY IN OUT``: convert a published checkpoint, and report every key."""

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
        description="Convert a published checkpoint to the keys of msda_plugin's modules, and report every key.",
        epilog='example: python -m msda_plugin convert vision_transformer mae_pretrain_vit_base.pth vit-base.pth. '
        'Load the result with load_from (detectors) or with '
        "init_cfg=dict(type='Pretrained', checkpoint='vit-base.pth') (backbones).",
    )
    parser.add_argument('family', choices=FAMILIES, metavar='FAMILY', help=f'model family: {", ".join(FAMILIES)}')
    parser.add_argument('source', metavar='IN', help='published checkpoint, a file or URL; no code in it is executed')
    parser.add_argument('out', metavar='OUT', help='file to write, in MMEngine format: {"state_dict": …, "meta": …}')
    parser.add_argument('--prefix', help='convert only the keys with this prefix, such as backbone')
    parser.add_argument(
        '--json', metavar='REPORT', help='also write a report: the converted keys, and the dropped keys with reasons'
    )
    parser.add_argument('--force', action='store_true', help='overwrite existing files')
    args = parser.parse_args(argv)
    with user_errors('convert'):
        targets = [Path(args.out), *([Path(args.json)] if args.json else [])]
        for target in targets:
            check_target(target, args.force)
        if len({target.resolve() for target in targets}) < len(targets):
            raise ValueError(f'OUT and --json both name {args.out}; give different files')
        conversion = convert(load_checkpoint_file(args.source, args.prefix), args.family)
        meta = dict(family=args.family, source=args.source)
        write_complete(targets[0], lambda file: torch.save(dict(state_dict=conversion.state_dict, meta=meta), file))
        if args.json:
            record = dict(**meta, taken=conversion.taken, dropped=conversion.dropped)
            write_complete(targets[1], lambda file: file.write(json.dumps(record, indent=1).encode() + b'\n'))
    print(report(conversion))
    print(f'wrote {args.out}')
    return 0


def report(conversion: Conversion) -> str:
    """One line per key, and a summary. (Missing keys were refused before.)"""
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
    """Raise OSError if the file cannot be written, or exists and ``force`` is not set."""
    if path.is_dir():
        raise IsADirectoryError(f'{path} is a folder; give the path of a file to write')
    if not path.parent.is_dir():
        raise FileNotFoundError(f'the folder {path.parent} of {path.name} does not exist; create it first')
    if path.exists() and not force:
        raise FileExistsError(f'{path} exists; pass --force to overwrite it, or choose another name')


def write_complete(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file with ``write``. On failure, the file is not created and an existing one is kept.

    Raises:
        OSError: If the file cannot be written.
    """
    try:
        with atomic_write(path) as part, part.open('xb') as file:
            write(file)
    except (OSError, RuntimeError) as error:  # torch.save makes the former the latter
        raise OSError(f'{path} could not be written, and is as it was: {error}') from error


if __name__ == '__main__':
    sys.exit(main())
