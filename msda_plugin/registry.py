"""Registries of msda_plugin: children of MMEngine's root registries, scope ``msda_plugin``.

MMEngine resolves ``'msda_plugin.X'`` by importing ``msda_plugin.registry`` and then, once, the modules in the
``locations`` of the registry. The parent is MMEngine's root registry, not MMDetection's, so the name resolves from the
root, from ``mmdet`` and from every other project, without ``custom_imports``.

Importing this module adds types to torch's allow-list of checkpoint types, and changes nothing else process-wide.
"""

from mmengine.registry import DATA_SAMPLERS as ROOT_DATA_SAMPLERS
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
    locations=[
        *(f'{SCOPE}.{package}' for package in ('layers', 'backbones', 'necks', 'heads', 'detectors')),
        f'{SCOPE}.starter_weights',  # the checkpoints msda_plugin://…
    ],
)
HOOKS = Registry('hook', parent=ROOT_HOOKS, scope=SCOPE, locations=[f'{SCOPE}.engine.hooks'])
DATA_SAMPLERS = Registry(
    'data sampler', parent=ROOT_DATA_SAMPLERS, scope=SCOPE, locations=[f'{SCOPE}.engine.part_sampler']
)
RUNNERS = Registry('runner', parent=ROOT_RUNNERS, scope=SCOPE, locations=[f'{SCOPE}.engine.runner'])

# Configs with types of msda_plugin import this module before any checkpoint is opened, whichever tool runs them, so
# `--resume` and `mim test` can read MMEngine's checkpoints with MMEngine 0.10.7.
compat.allow_checkpoint_types()
