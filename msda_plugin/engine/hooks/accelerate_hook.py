"""Runs msda_plugin's operator in a config written without it."""

from mmengine.hooks import Hook
from mmengine.runner import Runner

from msda_plugin.acceleration import accelerate
from msda_plugin.registry import HOOKS


@HOOKS.register_module()
class AccelerateHook(Hook):
    """Runs :func:`msda_plugin.accelerate` on the runner's model before training, validation or test.

    Add it to any config: ``custom_hooks = [dict(type='msda_plugin.AccelerateHook')]``. Weights, checkpoints and
    optimizer stay compatible.

    Raises:
        ValueError: If the model is quantized, prepared for quantization, or scripted.
    """

    priority = 'VERY_HIGH'  # before hooks that copy the model, such as EMAHook

    def before_run(self, runner: Runner) -> None:
        accelerate(runner.model)
