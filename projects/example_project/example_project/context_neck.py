"""A neck that applies deformable attention to the coarsest map before a feature pyramid."""

from collections.abc import Sequence

from mmengine.model import BaseModule
from torch import Tensor

from example_project.registry import MODELS


@MODELS.register_module()
class ContextNeck(BaseModule):
    """Deformable attention on the coarsest map, then another neck.

    Args:
        attention: config of an attention on maps (B, C, H, W), such as ``msda_plugin.DeformableAttention``.
        neck: config of the following neck.
        init_cfg: MMEngine's initialization config.
    """

    def __init__(self, attention: dict, neck: dict, init_cfg: dict | list | None = None):
        super().__init__(init_cfg)
        self.attention = MODELS.build(attention)
        self.neck = MODELS.build(neck)

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps (B, C_i, H_i, W_i), finest first, to the output of the inner neck."""
        *finer, coarsest = inputs
        return self.neck([*finer, self.attention(coarsest)])
