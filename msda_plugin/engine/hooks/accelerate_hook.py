"""Runs msda_plugin's operator in a config written without it."""

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from msda_plugin.acceleration import accelerate
from msda_plugin.registry import HOOKS


@HOOKS.register_module()
class AccelerateHook(Hook):
    """Runs :func:`msda_plugin.accelerate` on the runner's model before training, validation or test.

    Add it to any config: ``custom_hooks = [dict(type='msda_plugin.AccelerateHook')]``. Weights, checkpoints and
    optimizer stay compatible.

    Args:
        inference, channels_last, fold, fast_dropout: As in :func:`msda_plugin.accelerate`.
        dtype: As there, or its name: ``'bfloat16'``. Validation and test run in it, training does not.

    Raises:
        ValueError: If the model is quantized, prepared for quantization, or scripted; or ``dtype`` is not supported.
    """

    priority = 'VERY_HIGH'  # before hooks that copy the model, such as EMAHook

    def __init__(
        self,
        inference: bool = False,
        channels_last: bool | None = None,
        fold: bool | None = None,
        fast_dropout: bool = False,
        dtype: str | torch.dtype | None = None,
    ) -> None:
        if isinstance(dtype, str):
            if not isinstance(getattr(torch, dtype, None), torch.dtype):
                raise ValueError(f"dtype is '{dtype}'; expected the name of a dtype of torch, such as 'bfloat16'")
            dtype = getattr(torch, dtype)
        self.switches = dict(
            inference=inference, channels_last=channels_last, fold=fold, fast_dropout=fast_dropout, dtype=dtype
        )

    def before_run(self, runner: Runner) -> None:
        accelerate(runner.model, **self.switches)
