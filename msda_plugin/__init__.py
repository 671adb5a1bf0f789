"""Deformable attention for MMDetection: the operator, the layers, and the detection transformers built on them."""

from msda_plugin.version import __version__

__all__ = ['__version__', 'accelerate', 'restore']


def __getattr__(name: str) -> object:
    # mmcv takes seconds to import: not before it is needed.
    if name in ('accelerate', 'restore'):
        from msda_plugin import acceleration

        return getattr(acceleration, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
