"""Public name of `msda_plugin.acceleration.auto`."""

from msda_plugin.acceleration.auto import STOCK_FORWARD, install, uninstall

__all__ = ['STOCK_FORWARD', 'install', 'uninstall']
