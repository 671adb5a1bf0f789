"""Runs msda_plugin's operator in models built without it."""

from msda_plugin.acceleration.convert_model import accelerate, restore
from msda_plugin.acceleration.convolutions import fold_batch_norms, use_channels_last
from msda_plugin.acceleration.memory import keep_freed_memory

__all__ = ['accelerate', 'fold_batch_norms', 'keep_freed_memory', 'restore', 'use_channels_last']
