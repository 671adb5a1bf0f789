"""Public name of `msda_plugin.engine.hooks`."""

from msda_plugin.engine.hooks import *  # noqa: F403
