"""Prints registers, stack and inner-loop instructions of the compiled CUDA kernels.

    python csrc/sass.py [LIBRARY] [--arch sm_90] [--kernels REGEX]

Needs cuobjdump of the CUDA toolkit, on PATH or named by ``CUOBJDUMP`` (triton's wheels on PyPI contain it as well).
An inner loop reads 16 bytes per lane or adds to memory, and contains no other such loop. The counts are those of one
iteration.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

LIBRARY = Path(__file__).resolve().parent.parent / 'msda_plugin' / 'ops' / 'lib' / 'libmsda_cuda13.so'
ACCESSES = 'LDG.E.128', 'REDG'


class Kernel(NamedTuple):
    """A kernel, with its mangled name without the namespace. Its bytes of stack are spills."""

    name: str
    registers: int
    stack: int
    loops: list[collections.Counter]


def find_cuobjdump() -> str:
    """Return the command, or raise FileNotFoundError."""
    found = shutil.which(os.environ.get('CUOBJDUMP') or 'cuobjdump')
    if found is None:
        raise FileNotFoundError('cuobjdump was not found: put the CUDA toolkit on PATH or set CUOBJDUMP')
    return found


def resources(text: str) -> dict[str, tuple[int, int]]:
    """Parse the registers and stack bytes of each kernel from ``cuobjdump --dump-resource-usage``."""
    found = re.findall(r'Function (\S+):\s+REG:(\d+) STACK:(\d+)', text)
    return {_short(name): (int(registers), int(stack)) for name, registers, stack in found}


def inner_loops(text: str) -> dict[str, list[collections.Counter]]:
    """Count the operations in the inner loops of each kernel from ``cuobjdump --dump-sass``."""
    loops = {}
    for part in text.split('Function : ')[1:]:
        lines = re.findall(r'/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?([^;{]+);', part)
        code = [(int(address, 16), instruction) for address, instruction in lines]
        jumps = {
            (int(match[1], 16), address)
            for address, instruction in code
            if (match := re.search(r'BRA(?:\.\w+)* (?:\S+, )?(0x[0-9a-f]+)', instruction))
        }
        ranges = [
            (first, last)
            for first, last in jumps
            if first < last
            and any(
                first <= address <= last and access in instruction
                for address, instruction in code
                for access in ACCESSES
            )
        ]
        inner = [
            one
            for one in ranges
            if not any(other != one and one[0] <= other[0] and other[1] <= one[1] for other in ranges)
        ]
        counts = [
            collections.Counter(_operation(instruction) for address, instruction in code if first <= address <= last)
            for first, last in sorted(inner)
        ]
        # Rare paths come after the end of the kernel. Jumps back from there are not loops.
        loops[_short(part.split(maxsplit=1)[0])] = [count for count in counts if 'EXIT' not in count]
    return loops


def _operation(instruction: str) -> str:
    return re.sub(r'^@!?U?P\w+ ', '', instruction).split()[0].split('.')[0]


def _short(name: str) -> str:
    match = re.search(r'\d([a-z_]+_kernel\w*?)EvN', name)
    return match[1] if match else name


def dump(library: Path, arch: str, what: str) -> str:
    """Return the output of cuobjdump for an architecture; ``what`` is 'resource-usage' or 'sass'."""
    return subprocess.run(
        [find_cuobjdump(), '-arch', arch, f'--dump-{what}', str(library)], capture_output=True, text=True, check=True
    ).stdout


def kernels(library: Path, arch: str) -> list[Kernel]:
    """Return all kernels of a library for one architecture."""
    loops = inner_loops(dump(library, arch, 'sass'))
    return [
        Kernel(name, *sizes, loops.get(name, []))
        for name, sizes in resources(dump(library, arch, 'resource-usage')).items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('library', nargs='?', type=Path, default=LIBRARY, help='default: %(default)s')
    parser.add_argument('--arch', default='sm_90', help='default: %(default)s')
    parser.add_argument('--kernels', default='', metavar='REGEX', help='names to print, such as forward.*IffLi4')
    args = parser.parse_args()
    try:
        found = kernels(args.library, args.arch)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        print(f'csrc/sass.py: {getattr(error, "stderr", "") or error}', file=sys.stderr)
        return 1
    for kernel in found:
        if not re.search(args.kernels, kernel.name):
            continue
        print(f'{kernel.name}: {kernel.registers} registers, {kernel.stack} bytes of stack')
        for loop in kernel.loops:
            print(f'  loop of {loop.total()}: ' + ', '.join(f'{count} {name}' for name, count in loop.most_common()))
    spilling = [kernel.name for kernel in found if kernel.stack]
    print(f'{len(found)} kernels for {args.arch}, of which {len(spilling)} spill')
    return 0


if __name__ == '__main__':
    sys.exit(main())
