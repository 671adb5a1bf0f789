"""Runs msda_plugin's operator in models built without it."""

from msda_plugin.acceleration.convert_model import accelerate, restore

__all__ = ['accelerate', 'restore']
