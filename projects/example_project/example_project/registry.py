"""The registry of this package, a child of MMEngine's root, so that every project finds it by its scope."""

from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import Registry

MODELS = Registry('model', parent=ROOT_MODELS, scope='example_project', locations=['example_project.context_neck'])
