"""Registries of msda_plugin: children of MMEngine's root registries, scope ``msda_plugin``.

MMEngine resolves ``'msda_plugin.X'`` by importing ``msda_plugin.registry`` and then, once, every module named in the
``locations`` of the registry that is asked. Because the parent is MMEngine's *root* (and not MMDetection's registry),
the same name is found from the root, from ``mmdet`` and from every sibling project, without ``custom_imports``.
"""

from mmengine.registry import HOOKS as ROOT_HOOKS
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import RUNNERS as ROOT_RUNNERS
from mmengine.registry import Registry

from msda_plugin import compat

SCOPE = 'msda_plugin'

MODELS = Registry(
    'model',
    parent=ROOT_MODELS,
    scope=SCOPE,
    locations=[f'{SCOPE}.{package}' for package in ('layers', 'backbones', 'necks', 'heads', 'detectors')],
)
HOOKS = Registry('hook', parent=ROOT_HOOKS, scope=SCOPE, locations=[f'{SCOPE}.engine.hooks'])
RUNNERS = Registry('runner', parent=ROOT_RUNNERS, scope=SCOPE, locations=[f'{SCOPE}.engine.runner'])

# A config that names one of our types reaches this module before the runner opens a checkpoint, whichever tool runs
# it; this is therefore the one place from which `--resume` and `mim test` can be made to work on the original stack.
compat.load_checkpoints_strictly()
