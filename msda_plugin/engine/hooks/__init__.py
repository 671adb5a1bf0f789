"""Hooks for MMEngine's runner."""

from msda_plugin.engine.hooks.accelerate_hook import AccelerateHook
from msda_plugin.engine.hooks.attention_visualization import AttentionVisualizationHook
from msda_plugin.engine.hooks.checkpoint import CheckpointHook
from msda_plugin.engine.hooks.console import ConsoleHook
from msda_plugin.engine.hooks.detection_report import DetectionReportHook
from msda_plugin.engine.hooks.drawn_test import DrawnTestHook
from msda_plugin.engine.hooks.fine_tuning import FineTuningHook
from msda_plugin.engine.hooks.missed_validation import MissedValidationHook
from msda_plugin.engine.hooks.seed import EpochSeedHook
from msda_plugin.engine.hooks.skip_non_finite import NonFiniteError, SkipNonFiniteHook
from msda_plugin.engine.hooks.time_budget import TimeBudgetHook
from msda_plugin.engine.hooks.training_report import TrainingReportHook

__all__ = [
    'AccelerateHook',
    'AttentionVisualizationHook',
    'CheckpointHook',
    'ConsoleHook',
    'DetectionReportHook',
    'DrawnTestHook',
    'EpochSeedHook',
    'FineTuningHook',
    'MissedValidationHook',
    'NonFiniteError',
    'SkipNonFiniteHook',
    'TimeBudgetHook',
    'TrainingReportHook',
]
