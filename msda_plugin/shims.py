"""Importing this module provides the compiled extensions that research repositories import for deformable attention.

Their code runs unmodified, and nothing needs to be compiled: put ``import msda_plugin.shims`` before the repository's
imports, or run its script with ``python -m msda_plugin.shims SCRIPT [ARGUMENTS ...]``. Both work without MMEngine, mmcv
and MMDetection.

The extensions in :data:`EXTENSIONS` are provided when they are imported and Python does not find them elsewhere, so one
that was compiled always wins. :func:`uninstall` undoes the import.
"""

import argparse
import importlib.util
import logging
import runpy
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from torch import Tensor

from msda_plugin.mmcv_ops.deform_attn import gradients, ms_deform_attn_forward

__all__ = ['EXTENSIONS', 'install', 'main', 'ms_deform_attn_backward', 'ms_deform_attn_forward', 'uninstall']

EXTENSIONS = ('MultiScaleDeformableAttention', 'groundingdino._C', 'detrex._C', 'adet._C', 'mmcv._ext')
"""The names under which repositories import compiled deformable attention."""

# Modules that go on without their extension, which they call _C, if it is missing when they are imported.
IMPORTERS = {
    'groundingdino._C': 'groundingdino.models.GroundingDINO.ms_deform_attn',
    'detrex._C': 'detrex.layers.multi_scale_deform_attn',
}


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    im2col_step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`msda_plugin.ops.ms_deform_attn`; `im2col_step` is not needed.

    Args:
        value, spatial_shapes, level_start_index, sampling_locations, attention_weights: As for the operator.
        grad_output: (bs, num_queries, num_heads * head_dim), in the value's dtype.

    Returns:
        The gradients of `value`, `sampling_locations` and `attention_weights`, each with the shape and dtype of its
        input.
    """
    return gradients(value, spatial_shapes, level_start_index, sampling_locations, attention_weights, grad_output)


class _Extensions(MetaPathFinder, Loader):
    """Finds and makes the modules of :data:`EXTENSIONS`."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name in EXTENSIONS:
            return importlib.util.spec_from_file_location(name, __file__, loader=self)
        return None

    def create_module(self, spec: ModuleSpec) -> None:
        return None  # a new, empty module

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        if name == 'mmcv._ext':
            from msda_plugin.mmcv_ops import extension

            module.__getattr__ = lambda attribute: getattr(extension, attribute)
        else:
            module.ms_deform_attn_forward = ms_deform_attn_forward
            module.ms_deform_attn_backward = ms_deform_attn_backward
            module.__getattr__ = lambda attribute: _missing(name, attribute)
        logging.getLogger(__name__).info('%s is provided by msda_plugin', name)


_extensions = _Extensions()


def _missing(name: str, attribute: str) -> NoReturn:
    raise AttributeError(
        f'{name} is provided by msda_plugin, with ms_deform_attn_forward and ms_deform_attn_backward alone: compile '
        f'{name.partition(".")[0]} for {attribute}'
    )


def install() -> None:
    """Provide the extensions. A second call has no effect.

    Raises:
        ImportError: If the code that imports an extension has been imported before and goes on without it.
    """
    for name, importer in IMPORTERS.items():
        if importer in sys.modules and not hasattr(sys.modules[importer], '_C'):
            raise ImportError(f'{importer} has already been imported, without {name}: import msda_plugin.shims first')
    if _extensions not in sys.meta_path:
        sys.meta_path.append(_extensions)  # the last to be asked


def uninstall() -> None:
    """Stop providing the extensions, and forget those that were. Code that has imported them keeps them."""
    if _extensions in sys.meta_path:
        sys.meta_path.remove(_extensions)
    for name in EXTENSIONS:
        module = sys.modules.get(name)
        if getattr(module, '__loader__', None) is _extensions:
            del sys.modules[name]
            package, _, attribute = name.rpartition('.')
            if package and vars(sys.modules.get(package, module)).get(attribute) is module:
                delattr(sys.modules[package], attribute)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a script as ``python SCRIPT ARGUMENTS`` does, with the extensions provided."""
    parser = argparse.ArgumentParser(
        prog='python -m msda_plugin.shims',
        description='Run a script of a research repository without compiling its deformable attention.',
    )
    parser.add_argument('script', type=Path, help='Python file')
    parser.add_argument('arguments', nargs=argparse.REMAINDER, help='arguments of the script')
    args = parser.parse_args(argv)
    if not args.script.is_file():
        parser.error(f'{args.script} is not a file: name the Python script to run')
    sys.argv = [str(args.script), *args.arguments]
    sys.path[0] = str(args.script.resolve().parent)
    runpy.run_path(str(args.script), run_name='__main__')


if __name__ == '__main__':
    from msda_plugin import shims  # not __main__: scripts may import it, too

    shims.main()
else:
    install()
