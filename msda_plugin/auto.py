"""Public name of `msda_plugin.acceleration.auto`."""

from msda_plugin.acceleration.auto import install, uninstall

__all__ = ['install', 'uninstall']
