"""Build of msda_plugin. The metadata is in pyproject.toml, the native build in csrc/build.py.

pip install .                      # CPU library; the CUDA library as well if torch has CUDA and nvcc is found
MSDA_BUILD_CUDA=1 pip install .    # fail when the CUDA library cannot be built
MSDA_BUILD_CUDA=0 pip install .    # CPU library only
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / 'csrc'))
import build as native  # noqa: E402  (csrc/build.py)

LIBRARIES = Path('msda_plugin/ops/lib')
# mim looks for `.mim/{model-index.yml,configs,tools}` in the package's folder. In an editable install, onedl-mim takes
# the root of the clone for that folder. Only the tools are placed there: mim also searches it for configs, and must not
# find one twice.
MIM_FILES = {
    'model-index.yml': 'model-index.yml',
    'configs': 'configs',
    'tools/train.py': 'msda_plugin/tools/train.py',
    'tools/test.py': 'msda_plugin/tools/test.py',
}


def cuda_mode() -> str:
    """'auto' | 'on' | 'off', from the environment variable MSDA_BUILD_CUDA ('' | '1' | '0')."""
    value = os.environ.get('MSDA_BUILD_CUDA', '')
    modes = {'': 'auto', '1': 'on', '0': 'off'}
    if value not in modes:
        raise SystemExit(
            f'MSDA_BUILD_CUDA={value!r} is invalid: 1 requires the CUDA library, 0 skips it, '
            'unset builds it if torch has CUDA and nvcc is found'
        )
    return modes[value]


class BuildNative(build_ext):
    """Compiles the operator's libraries. They use only torch's stable ABI, so they are not Python extension modules."""

    def run(self) -> None:
        out = ROOT / LIBRARIES if self.inplace else Path(self.build_lib) / LIBRARIES
        out.mkdir(parents=True, exist_ok=True)
        try:
            self.built = [str(path) for path in native.build(out, cuda=cuda_mode())]
        except native.BuildError as error:
            if cuda_mode() == 'on' or not isinstance(error, native.CompilerNotFound):
                raise SystemExit(f'msda_plugin: {error}') from None
            self.built = []
            self.warn(
                f'{error} msda_plugin is installed without compiled libraries: the operator runs on its '
                'slower reference backend in plain PyTorch. Install a C++20 compiler and reinstall.'
            )

    def get_outputs(self) -> list:
        return [] if self.inplace else getattr(self, 'built', [])

    def get_output_mapping(self) -> dict:
        return {}


class BuildPackage(build_py):
    """Adds `.mim`: copies in a wheel, links to the tools in an editable install."""

    def run(self) -> None:
        if not self.editable_mode:  # a wheel must not contain files of an earlier build
            shutil.rmtree(Path(self.build_lib) / 'msda_plugin', ignore_errors=True)
        super().run()
        if self.editable_mode:
            self.place(
                '.mim',
                {name: source for name, source in MIM_FILES.items() if name.startswith('tools/')},
                lambda source, path: path.symlink_to(os.path.relpath(source, path.parent)),
            )
        else:
            self.place(Path(self.build_lib) / 'msda_plugin' / '.mim', MIM_FILES, self.copy)

    @staticmethod
    def copy(source: Path, path: Path) -> None:
        if source.is_dir():
            shutil.copytree(source, path, ignore=shutil.ignore_patterns('__pycache__'))
        else:
            shutil.copy2(source, path)

    @staticmethod
    def place(folder, files: dict, put) -> None:
        folder = ROOT / folder
        shutil.rmtree(folder, ignore_errors=True)
        for name, source in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            put(ROOT / source, path)


class Wheel(bdist_wheel):
    """One wheel works with every Python and every torch >= 2.10 on its platform."""

    def get_tag(self) -> tuple:
        return ('py3', 'none', super().get_tag()[2])


setup(
    # Listing the sources marks the wheel as binary and adds them to the sdist.
    ext_modules=[
        Extension(
            'msda_plugin.ops.lib.msda',
            sources=sorted(str(p.relative_to(ROOT)) for p in (ROOT / 'csrc').rglob('*.c[pu]*')),
        )
    ],
    cmdclass={'build_ext': BuildNative, 'build_py': BuildPackage, 'bdist_wheel': Wheel},
)
