"""Starts a training from a checkpoint with another number of classes."""

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import BaseLoop, Runner

from msda_plugin.registry import HOOKS


@HOOKS.register_module()
class FineTuningHook(Hook):
    """Lets a training start with ``load_from`` from a checkpoint that has another number of classes.

    Class layers of another size keep their initial weights, and the log names them (`adapt_class_layers`). A checkpoint
    that is resumed or tested is not changed. `msda_plugin.DetectionRunner` adds this hook; with MMEngine's runner, list
    it in ``custom_hooks``.
    """

    priority = 'HIGHEST'  # before EMAHook, which loads the checkpoint as well

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if runner._resume or not isinstance(runner._train_loop, BaseLoop):
            return
        from msda_plugin.heads.class_layers import adapt_class_layers  # imports MMDetection

        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        adapted = adapt_class_layers(checkpoint.get('state_dict', checkpoint), model)
        if adapted:
            sizes = ', '.join(f'{name} ({old} outputs, now {new})' for name, (old, new) in adapted.items())
            runner.logger.warning(
                f'the checkpoint has another number of classes: {sizes} keep their initial weights; everything else is '
                'loaded'
            )
