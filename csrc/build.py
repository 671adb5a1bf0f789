"""Builds the compiled operator: ``libmsda_cpu.so`` for torch, ``libmsda_onnxruntime.so`` with the same kernels for
onnxruntime, and ``libmsda_cuda13.so`` if torch has CUDA and nvcc is of CUDA 13.

    python csrc/build.py [--out DIR] [--cuda auto|on|off] [--sanitize address,undefined] [--verbose]

The libraries for torch use LibTorch's stable ABI, so one build works with every torch >= 2.10 and every Python. The
build needs torch's headers and links to its libraries, but does not import torch. The library for onnxruntime needs
neither of the two, and works with every onnxruntime >= 1.17. Environment variables: ``CXX`` and ``NVCC`` name the
compilers (``NVCC`` several, separated like PATH: one CUDA library for each), ``MSDA_CUDA_ARCHS`` the GPU architectures,
such as "80;90;120" (machine code for each, PTX for the last).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE_DIR = Path(__file__).resolve().parent
sys.path.insert(0, str(SOURCE_DIR.parent))
from msda_plugin.tools.common.nvcc import find_nvcc  # noqa: E402

DEFAULT_OUT = SOURCE_DIR.parent / 'msda_plugin' / 'ops' / 'lib'
TORCH_MINIMUM = (2, 10)
CUDA_ARCHS = (75, 80, 86, 89, 90, 100, 120)

COMMON_FLAGS = [
    '-std=c++20',
    '-O3',
    '-fPIC',
    '-fvisibility=hidden',
    '-Wall',
    '-Wextra',
    '-Wno-maybe-uninitialized',  # false alarms in the compiler's own intrinsics
]
KERNEL_FLAGS = ['-ffp-contract=fast', '-fno-math-errno', '-fno-trapping-math']
ISA_FLAGS = {
    'avx512': [
        '-mavx2',
        '-mfma',
        '-mf16c',
        '-mavx512f',
        '-mavx512bw',
        '-mavx512dq',
        '-mavx512vl',
        '-mprefer-vector-width=512',
    ],
    'avx2': ['-mavx2', '-mfma', '-mf16c'],
    'portable': [],
}
STABLE_ABI_FLAGS = ['-DTORCH_TARGET_VERSION=0x020a000000000000']


class BuildError(RuntimeError):
    """The build failed; the message names the reason and the remedy."""


class CompilerNotFound(BuildError):
    """No C++ compiler was found, or no CUDA compiler for a build that demands it."""


class TorchNotFound(BuildError):
    """No torch with the stable ABI was found."""


def build(
    out_dir: str | os.PathLike = DEFAULT_OUT, cuda: str = 'auto', sanitize: str = '', verbose: bool = False
) -> list[Path]:
    """Build the libraries into ``out_dir``. Existing libraries are replaced only after everything is built.

    Args:
        out_dir: Directory of ``libmsda_cpu.so``, ``libmsda_onnxruntime.so`` and ``libmsda_cuda13.so``, named after the
            major version of nvcc. A torch loads the one for its own major version of CUDA.
        cuda: Whether to build the CUDA library: 'on', 'off', or 'auto' if nvcc is found and torch has
            CUDA. A CPU-only torch is enough for 'on'.
        sanitize: Sanitizers for the CPU libraries, as in ``-fsanitize=``.
        verbose: Print the commands.

    Returns:
        The paths of the built libraries.

    Raises:
        CompilerNotFound: If there is no C++ compiler, or no nvcc with ``cuda='on'``.
        TorchNotFound: If there is no torch >= 2.10.
        BuildError: If a command fails.
    """
    if cuda not in ('auto', 'on', 'off'):
        raise ValueError(f"cuda is {cuda!r}, but 'auto', 'on' or 'off' is needed")
    torch_dir = find_torch()
    compiler = find_compiler()
    wanted = cuda == 'on' or (cuda == 'auto' and _library(torch_dir, 'torch_cuda').exists())
    listed = os.environ.get('NVCC', '').split(os.pathsep)
    found = [shutil.which(path) for path in listed] if len(listed) > 1 else [find_nvcc()]
    nvccs = [nvcc for nvcc in found if wanted and nvcc]
    if cuda == 'on' and nvccs != found:
        raise CompilerNotFound('no nvcc was found: install the CUDA toolkit, put nvcc on PATH or set NVCC')

    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir, prefix='.build-') as work:
        builder = _Builder(Path(work), torch_dir, compiler, nvccs, sanitize, verbose)
        results = [Path(os.path.abspath(out_dir / built.name)) for built in builder.run()]
        for target in results:
            os.replace(Path(work) / target.name, target)
    return results


def find_torch() -> Path:
    """Find the directory of the installed torch without importing it (pip's build environments hide it)."""
    places = [Path(sysconfig.get_path(key)) / 'torch' for key in ('purelib', 'platlib')]
    spec = importlib.util.find_spec('torch')
    if spec is not None and spec.origin is not None:
        places.append(Path(spec.origin).parent)
    for place in places:
        if not (place / 'version.py').exists():
            continue
        match = re.search(r"__version__ = '((\d+)\.(\d+)[^']*)'", (place / 'version.py').read_text())
        if match is None or (int(match[2]), int(match[3])) < TORCH_MINIMUM:
            found = match[1] if match else 'of unknown version'
            raise TorchNotFound(
                f'torch {found} is in {place}, but torch >= 2.10 is needed for its stable ABI: upgrade it'
            )
        return place
    raise TorchNotFound(f'no torch was found for {sys.executable}: install torch >= 2.10 first')


def find_compiler() -> list[str]:
    """Find the command of the C++ compiler: ``CXX``, g++, c++ or clang++."""
    if os.environ.get('CXX'):
        command = shlex.split(os.environ['CXX'])
        if shutil.which(command[0]) is None:
            raise CompilerNotFound(
                f'CXX is {os.environ["CXX"]!r}, but there is no such command: correct it or unset it'
            )
        return command
    for name in ('g++', 'c++', 'clang++'):
        if shutil.which(name):
            return [name]
    raise CompilerNotFound('no C++ compiler was found: install g++ >= 10 or clang >= 14, or set CXX')


class _Builder:
    def __init__(
        self, work: Path, torch_dir: Path, compiler: list[str], nvccs: list[str], sanitize: str, verbose: bool
    ) -> None:
        self.work = work
        self.torch_dir = torch_dir
        self.compiler = compiler
        self.nvccs = nvccs
        self.sanitize = [f'-fsanitize={sanitize}', '-fno-sanitize-recover=all', '-g'] if sanitize else []
        self.verbose = verbose

    def run(self) -> list[Path]:
        binding = [*STABLE_ABI_FLAGS, '-isystem', str(self.torch_dir / 'include')]
        isas = ISA_FLAGS if sysconfig.get_platform().endswith(('x86_64', 'amd64')) else {'portable': []}
        bindings = [
            self.compile('cpu/binding.cpp', binding + self.sanitize),
            self.compile('cpu/schemas.cpp', binding + self.sanitize),
            self.compile('onnxruntime/library.cpp', self.sanitize),
        ]
        kernels = [self.compile('cpu/ms_deform_attn.cpp', self.sanitize)]
        kernels += [
            self.compile(f'cpu/ms_deform_attn_{isa}.cpp', KERNEL_FLAGS + flags + self.sanitize)
            for isa, flags in isas.items()
        ]
        cuda = {}
        for nvcc in self.nvccs:
            codes = self.cuda_codes(nvcc)
            gencodes = [f'-gencode=arch={code.replace("sm", "compute")},code={code}' for code in codes]
            named = f'-DMSDA_CUDA_ARCHITECTURES={"+".join(codes)}'
            cuda[nvcc] = [
                self.compile_cuda(nvcc, 'cuda/ms_deform_attn.cu', ['-std=c++17', '--threads=2', *gencodes]),
                self.compile_cuda(nvcc, 'cuda/binding.cpp', ['-std=c++20', '-DUSE_CUDA', named, *binding]),
            ]
        # The longest commands first, so that parallel jobs end together.
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            list(pool.map(self.execute, [command for command, _ in [*sum(cuda.values(), []), *kernels, *bindings]]))
        torch_binding, schemas, node, *objects = (target for _, target in [*bindings, *kernels])
        results = [
            self.link('libmsda_cpu.so', [torch_binding, schemas, *objects], self.links_to_torch()),
            self.link('libmsda_onnxruntime.so', [node, *objects], []),
        ]
        results += [self.link_cuda(nvcc, [target for _, target in objects]) for nvcc, objects in cuda.items()]
        return results

    def compile(self, source: str, flags: list[str]) -> tuple[list[str], Path]:
        target = self.work / (source.replace('/', '_') + '.o')
        return [*self.compiler, *COMMON_FLAGS, *flags, '-c', str(SOURCE_DIR / source), '-o', str(target)], target

    def compile_cuda(self, nvcc: str, source: str, flags: list[str]) -> tuple[list[str], Path]:
        target = self.work / f'{source.replace("/", "_")}.{self.nvccs.index(nvcc)}.o'
        host = ['-ccbin', self.compiler[0], '-Xcompiler=-fPIC,-fvisibility=hidden']
        # --resource-usage: --verbose shows the registers and spills of every kernel.
        return [
            nvcc,
            '-O3',
            '--resource-usage',
            *host,
            *flags,
            '-c',
            str(SOURCE_DIR / source),
            '-o',
            str(target),
        ], target

    def cuda_codes(self, nvcc: str) -> list[str]:
        """Machine code for each architecture (``sm_90``), and PTX for the last (``compute_120``)."""
        if os.environ.get('MSDA_CUDA_ARCHS'):
            listed = re.split(r'[;, ]+', os.environ['MSDA_CUDA_ARCHS'].strip('; ,'))
            archs = sorted(int(arch.replace('.', '')) for arch in listed)
        else:
            supported = set(re.findall(r'compute_(\d+)', self.execute([nvcc, '--list-gpu-arch'])))
            archs = [arch for arch in CUDA_ARCHS if str(arch) in supported]
        return [*(f'sm_{arch}' for arch in archs), f'compute_{archs[-1]}']

    def links_to_torch(self) -> list[str]:
        # The library must depend on torch's library explicitly, in case Python has not loaded it before.
        named = ['-ltorch_cpu'] if sys.platform == 'darwin' else ['-Wl,--no-as-needed', '-ltorch_cpu']
        return [f'-L{self.torch_dir / "lib"}', *named]

    def link(self, name: str, objects: list[Path], libraries: list[str]) -> Path:
        target = self.work / name
        self.execute([*self.compiler, '-shared', *self.sanitize, *map(str, objects), '-o', str(target), *libraries])
        return target

    def link_cuda(self, nvcc: str, objects: list[Path]) -> Path:
        places = [self.torch_dir / 'lib']
        if not _library(self.torch_dir, 'torch_cuda').exists():
            # A CPU-only torch lacks this library: link to an empty one of the same name.
            empty = self.work / 'empty.cpp'
            empty.write_text('')
            self.execute(
                [
                    *self.compiler,
                    '-shared',
                    '-fPIC',
                    '-Wl,-soname,libtorch_cuda.so',
                    str(empty),
                    '-o',
                    str(self.work / 'libtorch_cuda.so'),
                ]
            )
            places.append(self.work)
        major = re.search(r'release (\d+)', self.execute([nvcc, '--version']))[1]
        target = self.work / f'libmsda_cuda{major}.so'
        self.execute(
            [
                nvcc,
                '-shared',
                '-cudart=static',
                '-ccbin',
                self.compiler[0],
                *map(str, objects),
                '-o',
                str(target),
                *(f'-L{place}' for place in places),
                '-Xlinker=--exclude-libs,ALL,--no-as-needed,-ltorch_cpu,-ltorch_cuda',
            ]
        )
        return target

    def execute(self, command: list[str]) -> str:
        if self.verbose:
            print(shlex.join(command), flush=True)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise BuildError(
                f'{shlex.join(command)}\nexited with status {done.returncode}:\n{done.stdout}{done.stderr}'
            )
        if self.verbose and done.stderr:
            print(done.stderr, flush=True)
        return done.stdout


def _library(torch_dir: Path, name: str) -> Path:
    return torch_dir / 'lib' / f'lib{name}{".dylib" if sys.platform == "darwin" else ".so"}'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=DEFAULT_OUT, help='output directory (default: %(default)s)')
    parser.add_argument('--cuda', choices=('auto', 'on', 'off'), default='auto', help='default: %(default)s')
    parser.add_argument('--sanitize', default='', metavar='LIST', help='for example address,undefined')
    parser.add_argument('--verbose', action='store_true', help='print the commands')
    args = parser.parse_args()
    try:
        libraries = build(args.out, args.cuda, args.sanitize, args.verbose)
    except BuildError as error:
        print(f'csrc/build.py: {error}', file=sys.stderr)
        return 1
    for library in libraries:
        print(library)
    return 0


if __name__ == '__main__':
    sys.exit(main())
