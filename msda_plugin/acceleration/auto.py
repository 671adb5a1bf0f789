"""Import this module, and every model that is built with mmcv's deformable attention runs our operator.

For tools that run no hooks: ``custom_imports = dict(imports=['msda_plugin.auto'])`` in the config. The import exchanges
one method, the forward of mmcv's ``MultiScaleDeformableAttention``, for ours. Layers that exist already follow as well,
and so do subclasses without a forward of their own. :func:`uninstall` puts mmcv's back.

What else :func:`msda_plugin.accelerate` does for the memory of a training takes a model: use the hook to train.
"""

import torch
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttention as StockAttention
from mmengine.logging import print_log

from msda_plugin.acceleration.convert_model import STOCK_FORWARD
from msda_plugin.layers.multi_scale_deformable_attention import MultiScaleDeformableAttention
from msda_plugin.ops import backend_for


def install() -> None:
    """Let mmcv's layer run our operator, in the whole process. Says so once; does nothing the second time."""
    if StockAttention.forward is MultiScaleDeformableAttention.forward:
        return
    StockAttention.forward = MultiScaleDeformableAttention.forward
    devices = ['cpu', 'cuda'] if torch.cuda.is_available() else ['cpu']
    backends = ((device, *backend_for(device, torch.float32)) for device in devices)
    print_log(
        "msda_plugin.auto: mmcv's MultiScaleDeformableAttention runs the operator of msda_plugin from now on; "
        + ', '.join(f'backend on {device}: {name} ({reason})' for device, name, reason in backends),
        logger='current',
    )


def uninstall() -> None:
    """Give mmcv's layer its own forward back."""
    StockAttention.forward = STOCK_FORWARD


install()
