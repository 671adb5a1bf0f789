"""Mixed precision in the config of a training."""

from mmengine.config import Config
from mmengine.device import get_device

from msda_plugin.acceleration.low_precision import cpu_has_bfloat16


def bfloat16_is_faster(device: str | None) -> bool:
    """Whether a training on the CPU is faster in bfloat16: if the CPU has instructions for it.

    Args:
        device: As in a config; None: the GPU if there is one.
    """
    return (device or get_device()) == 'cpu' and cpu_has_bfloat16()


def use_mixed_precision(cfg: Config) -> None:
    """Train in mixed precision: float16 with a scaled loss on GPUs, bfloat16 in channels_last on CPUs."""
    if (cfg.get('device') or get_device()) == 'cpu':  # MMEngine's AmpOptimWrapper refuses CPUs
        hook = dict(type='msda_plugin.AccelerateHook', channels_last=True, training_dtype='bfloat16')
        cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), hook]
    else:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.loss_scale = 'dynamic'
