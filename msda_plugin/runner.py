"""Public name of `msda_plugin.engine.runner`."""

from msda_plugin.engine.runner import DetectionRunner

__all__ = ['DetectionRunner']
