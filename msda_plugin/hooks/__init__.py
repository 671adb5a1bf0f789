"""Hooks for MMEngine's runner."""
from msda_plugin.hooks.training_report import TrainingReportHook

__all__ = ['TrainingReportHook']
