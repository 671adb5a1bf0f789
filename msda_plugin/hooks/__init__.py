"""Hooks for MMEngine's runner."""
from msda_plugin.hooks.accelerate_hook import AccelerateHook
from msda_plugin.hooks.attention_visualization import AttentionVisualizationHook
from msda_plugin.hooks.checkpoint import CheckpointHook
from msda_plugin.hooks.seed import EpochSeedHook
from msda_plugin.hooks.training_report import TrainingReportHook

__all__ = ['AccelerateHook', 'AttentionVisualizationHook', 'CheckpointHook', 'EpochSeedHook', 'TrainingReportHook']
