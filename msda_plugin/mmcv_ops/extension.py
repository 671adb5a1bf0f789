"""The module that ``mmcv._ext`` becomes: mmcv's operators under the names and signatures of its compiled extension.

mmcv looks up further names when it is imported; they exist and raise when called.
"""

from collections.abc import Callable

from msda_plugin.mmcv_ops.carafe import carafe_backward, carafe_forward
from msda_plugin.mmcv_ops.deform_attn import ms_deform_attn_backward, ms_deform_attn_forward
from msda_plugin.mmcv_ops.deform_conv import (
    deform_conv_backward_input,
    deform_conv_backward_parameters,
    deform_conv_forward,
    modulated_deform_conv_backward,
    modulated_deform_conv_forward,
)
from msda_plugin.mmcv_ops.focal_loss import (
    sigmoid_focal_loss_backward,
    sigmoid_focal_loss_forward,
    softmax_focal_loss_backward,
    softmax_focal_loss_forward,
)
from msda_plugin.mmcv_ops.installation import COMPILE
from msda_plugin.mmcv_ops.masked_conv import masked_col2im_forward, masked_im2col_forward
from msda_plugin.mmcv_ops.nms import nms, nms_match, softnms
from msda_plugin.mmcv_ops.roi import roi_align_backward, roi_align_forward, roi_pool_backward, roi_pool_forward

__all__ = [
    'carafe_backward',
    'carafe_forward',
    'deform_conv_backward_input',
    'deform_conv_backward_parameters',
    'deform_conv_forward',
    'get_compiler_version',
    'get_compiling_cuda_version',
    'masked_col2im_forward',
    'masked_im2col_forward',
    'modulated_deform_conv_backward',
    'modulated_deform_conv_forward',
    'ms_deform_attn_backward',
    'ms_deform_attn_forward',
    'nms',
    'nms_match',
    'roi_align_backward',
    'roi_align_forward',
    'roi_pool_backward',
    'roi_pool_forward',
    'sigmoid_focal_loss_backward',
    'sigmoid_focal_loss_forward',
    'softmax_focal_loss_backward',
    'softmax_focal_loss_forward',
    'softnms',
]


def get_compiler_version() -> str:
    return 'none: operators of msda_plugin'


def get_compiling_cuda_version() -> str:
    return 'not available'


def __getattr__(name: str) -> Callable:
    if name.startswith('__'):
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

    def unavailable(*args: object, **kwargs: object) -> None:
        raise NotImplementedError(
            f'The operator {name} is not available, because this mmcv was installed without compiled operators. '
            f'Compile mmcv: {COMPILE}.'
        )

    unavailable.__name__ = unavailable.__qualname__ = name
    return unavailable
