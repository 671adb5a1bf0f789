"""Non-maximum suppression in the config of a DETR of msda_plugin."""

from mmengine.config import ConfigDict

from msda_plugin.engine.data_check import bbox_heads
from msda_plugin.registry import MODELS

NMS = dict(type='nms', iou_threshold=0.7)


def supports_nms(model: ConfigDict) -> bool:
    """Whether ``test_cfg.nms`` is optional for the heads of a model config: those of msda_plugin's DETRs."""
    from msda_plugin.heads.set_prediction import SetPrediction  # imports MMDetection

    kinds = [head.type for _, head in bbox_heads(model)]
    # Without a scope, a name is MMDetection's.
    kinds = [MODELS.get(kind) if isinstance(kind, str) and kind.startswith('msda_plugin.') else kind for kind in kinds]
    return bool(kinds) and all(isinstance(kind, type) and issubclass(kind, SetPrediction) for kind in kinds)


def set_nms(model: ConfigDict, enabled: bool) -> None:
    """Switch non-maximum suppression within each class on (IoU threshold 0.7) or off, in a model config.

    A DETR that was trained for few iterations predicts an object several times. A threshold in the config is kept.

    Raises:
        ValueError: If a head is not one of msda_plugin's DETRs.
    """
    if not supports_nms(model):
        kinds = ', '.join(sorted({str(head.type) for _, head in bbox_heads(model)})) or 'none'
        raise ValueError(
            'non-maximum suppression can be switched on and off for the heads of msda_plugin only, such as '
            f'msda_plugin.DeformableDETRHead; the heads of this config: {kinds}'
        )
    model.test_cfg = model.get('test_cfg') or ConfigDict()
    model.test_cfg.nms = (model.test_cfg.get('nms') or ConfigDict(NMS)) if enabled else None
