"""Writes the golden files of D-FINE and DEIM from the authors' code.

python tests/golden/make_dfine.py D-FINE DEIM, the folders of clones of github.com/Peterande/D-FINE and
github.com/ShihuaHuang95/DEIM. Weights, inputs and targets follow from `recipe.py`.
"""

import importlib
import sys
import types
from pathlib import Path


def load(root, source, zoo):
    """The authors' modules, without those of their training loop, which need further packages."""
    name = f'authors_{zoo}'

    def package(path, **members):
        module = types.ModuleType(f'{name}.{path}' if path else name)
        module.__path__ = [str(Path(root, source, *path.split('.')))]
        vars(module).update(members)
        sys.modules[module.__name__] = module

    package('')
    package('core', register=lambda *args, **kwargs: lambda cls: cls)
    package('misc')
    package('misc.dist_utils', get_world_size=lambda: 1, is_dist_available_and_initialized=lambda: False)
    if source == 'src':
        for path in ('nn', 'nn.backbone', 'zoo', 'zoo.dfine'):
            package(path)
        backbone, detector = 'nn.backbone', 'zoo.dfine'
    else:
        for path in ('backbone', 'deim'):
            package(path)
        backbone, detector = 'backbone', 'deim'
    return lambda module: importlib.import_module(f'{name}.{backbone if module == "hgnetv2" else detector}.{module}')
