"""The operator for a config that was written without it."""

from mmengine.hooks import Hook
from mmengine.runner import Runner

from msda_plugin.acceleration import accelerate
from msda_plugin.registry import HOOKS


@HOOKS.register_module()
class AccelerateHook(Hook):
    """Runs :func:`msda_plugin.accelerate` on the runner's model before a training, a validation or a test.

    One line in any config: ``custom_hooks = [dict(type='msda_plugin.AccelerateHook')]``. Weights, checkpoints and the
    optimizer are what they would be without it.

    Raises:
        ValueError: The model is quantised, prepared for it, or scripted.
    """

    priority = 'VERY_HIGH'  # hooks that copy the model, such as EMAHook, copy the fast one

    def before_run(self, runner: Runner) -> None:
        accelerate(runner.model)
