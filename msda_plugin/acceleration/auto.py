"""Importing this module makes mmcv's deformable attention run msda_plugin's operator, in the whole process.

For tools that run no hooks: ``custom_imports = dict(imports=['msda_plugin.auto'])`` in the config. The import replaces
the ``forward`` of mmcv's ``MultiScaleDeformableAttention``. This includes existing layers, and subclasses that do not
override ``forward``. :func:`uninstall` restores mmcv's.

For training, use the hook: :func:`msda_plugin.accelerate` also reduces the memory of the model's other layers.
"""

import torch
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttention as StockAttention
from mmengine.logging import print_log

from msda_plugin.acceleration.mmcv_models import STOCK_FORWARD
from msda_plugin.layers.multi_scale_deformable_attention import MultiScaleDeformableAttention
from msda_plugin.ops import backend_for


def install() -> None:
    """Replace the ``forward`` of mmcv's layer, and log it. A second call has no effect."""
    if StockAttention.forward is MultiScaleDeformableAttention.forward:
        return
    StockAttention.forward = MultiScaleDeformableAttention.forward
    devices = ['cpu', 'cuda'] if torch.cuda.is_available() else ['cpu']
    backends = ((device, *backend_for(device, torch.float32)) for device in devices)
    print_log(
        "msda_plugin.auto: mmcv's MultiScaleDeformableAttention now runs msda_plugin's operator; "
        + ', '.join(f'backend on {device}: {name} ({reason})' for device, name, reason in backends),
        logger='current',
    )


def uninstall() -> None:
    """Restore the ``forward`` of mmcv's layer."""
    StockAttention.forward = STOCK_FORWARD


install()
