"""The attention layers of mmcv, on msda_plugin's operator, and the layers around them with less memory and work."""

from mmcv.cnn.bricks.transformer import FFN
from mmcv.cnn.bricks.transformer import MultiheadAttention as StockMultiheadAttention
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttention as StockAttention
from mmengine.model import Sequential
from torch import nn

from msda_plugin.acceleration.convert_model import change_class
from msda_plugin.acceleration.memory_efficient import Dropout, LinearReLUDropout, MultiheadAttention
from msda_plugin.acceleration.text_fusion import MMDetectionTextFusion
from msda_plugin.layers.multi_scale_deformable_attention import MultiScaleDeformableAttention

MASK_MODELS = (
    'mmdet.models.detectors.mask2former.Mask2Former',
    'mmdet.models.detectors.maskformer.MaskFormer',
    'mmdet.models.seg_heads.panoptic_fusion_heads.maskformer_fusion_head.MaskFormerFusionHead',
)
STOCK_FORWARD = StockAttention.forward  # read before msda_plugin.auto replaces it


def examine(layer: nn.Module) -> tuple[type[nn.Module] | None, str]:
    """The class that a layer changes to, and the reason why it cannot change."""
    if 'forward' in vars(layer) or type(layer).forward not in (STOCK_FORWARD, MultiScaleDeformableAttention.forward):
        return None, f'{type(layer).__name__} overrides forward'
    return MultiScaleDeformableAttention, ''


def change_other_layers(model: nn.Module) -> None:
    """Make the layers around cheaper: mmcv's transformer layers, and MMDetection's fusions of text and of masks.

    Only modules of exactly the stock classes change.
    """
    for module in model.modules():
        if isinstance(module, MultiScaleDeformableAttention):
            parts = [module.dropout]
        elif type(module) is StockMultiheadAttention:
            parts = [module.attn, module.proj_drop]
        elif type(module) is FFN:
            parts = list(module.layers)
        elif _is(module, 'mmdet.models.utils.vlfuse_helper.BiMultiHeadAttention'):
            change_class(module, MMDetectionTextFusion)
            continue
        elif _is(module, *MASK_MODELS) and not {'predict', 'instance_postprocess'} & set(vars(module)):
            from msda_plugin.acceleration import mask_fusion  # needs MMDetection

            fusion = hasattr(module, 'instance_postprocess')
            change_class(module, mask_fusion.MaskFusion if fusion else mask_fusion.MaskFormer)
            continue
        else:
            continue
        for part in parts:
            if type(part) is nn.Dropout:
                change_class(part, Dropout)
            elif type(part) is nn.MultiheadAttention:
                change_class(part, MultiheadAttention)
            elif type(part) is Sequential and [type(step) for step in part][1:] == [nn.ReLU, nn.Dropout]:
                change_class(part, LinearReLUDropout)


def _is(module: nn.Module, *names: str) -> bool:
    """Whether a module is exactly of one of these classes of MMDetection, which need not be installed."""
    return f'{type(module).__module__}.{type(module).__name__}' in names and 'forward' not in vars(module)
