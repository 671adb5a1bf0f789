"""Deformable attention for MMDetection: the operator, the layers, and the detection transformers built on them."""

from msda_plugin.version import __version__

__all__ = ['Detector', '__version__', 'accelerate', 'keep_freed_memory', 'onnxruntime_library', 'restore']


def __getattr__(name: str) -> object:
    # torch and mmcv take seconds to import: not before they are needed.
    if name == 'Detector':
        from msda_plugin.engine.detector import Detector

        return Detector
    if name in ('accelerate', 'keep_freed_memory', 'restore'):
        from msda_plugin import acceleration

        return getattr(acceleration, name)
    if name == 'onnxruntime_library':
        from msda_plugin.libraries import onnxruntime_library

        return onnxruntime_library
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
