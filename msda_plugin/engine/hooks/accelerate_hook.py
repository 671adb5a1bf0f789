"""Runs msda_plugin's operator in a config written without it."""

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from msda_plugin.acceleration import accelerate
from msda_plugin.registry import HOOKS


@HOOKS.register_module()
class AccelerateHook(Hook):
    """Runs :func:`msda_plugin.accelerate` on the runner's model before training, validation or test.

    Add it to any config: ``custom_hooks = [dict(type='msda_plugin.AccelerateHook')]``. Weights, checkpoints and
    optimizer stay compatible.

    Args:
        inference, channels_last, fold, fast_dropout: As in :func:`msda_plugin.accelerate`.
        dtype, training_dtype: As there, or their names: ``'bfloat16'``. Validation and test run in the first, training
            in the second.

    Raises:
        ValueError: If the model is quantized, prepared for quantization, or scripted; or a dtype is not supported.
    """

    priority = 'VERY_HIGH'  # before hooks that copy the model, such as EMAHook

    def __init__(
        self,
        inference: bool = False,
        channels_last: bool | None = None,
        fold: bool | None = None,
        fast_dropout: bool = False,
        dtype: str | torch.dtype | None = None,
        training_dtype: str | torch.dtype | None = None,
    ) -> None:
        self.switches = dict(
            inference=inference,
            channels_last=channels_last,
            fold=fold,
            fast_dropout=fast_dropout,
            dtype=_dtype('dtype', dtype),
            training_dtype=_dtype('training_dtype', training_dtype),
        )

    def before_run(self, runner: Runner) -> None:
        self.accelerate(runner.model)

    def accelerate(self, model: nn.Module) -> None:
        """Run :func:`msda_plugin.accelerate` on a model, with the arguments of this hook."""
        accelerate(model, **self.switches)


def _dtype(argument: str, given: str | torch.dtype | None) -> torch.dtype | None:
    found = getattr(torch, given, None) if isinstance(given, str) else given
    if given is not None and not isinstance(found, torch.dtype):
        raise ValueError(f"{argument} is '{given}'; expected the name of a dtype of torch, such as 'bfloat16'")
    return found
