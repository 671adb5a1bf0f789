"""The image part of Grounding DINO's feature enhancer.

Source: Liu et al., Grounding DINO, https://arxiv.org/abs/2303.05499, section 3.2. Each layer of the feature enhancer
has image-text fusion, text self-attention and deformable self-attention of the image. This encoder has the deformable
self-attention only, for images without text.
"""

from msda_plugin.layers.deformable_detr_layers import (
    DeformableDetrTransformerEncoder,
    DeformableDetrTransformerEncoderLayer,
)
from msda_plugin.registry import MODELS


@MODELS.register_module()
class GroundingDinoImageEncoderLayer(DeformableDetrTransformerEncoderLayer):
    """Deformable DETR's encoder layer with Grounding DINO's defaults: a wider FFN and no dropout.

    Args:
        self_attn_cfg: fields of the deformable self-attention; ``dropout`` defaults to 0.
        ffn_cfg: fields of the FFN; ``embed_dims`` defaults to the attention's, ``feedforward_channels`` to 2048 and
            ``ffn_drop`` to 0.
        norm_cfg: config of the norms; None: ``dict(type='LN')``.
        init_cfg: MMEngine's initialization config.
    """

    def __init__(
        self,
        self_attn_cfg: dict | None = None,
        ffn_cfg: dict | None = None,
        norm_cfg: dict | None = None,
        init_cfg: dict | list | None = None,
    ):
        self_attn_cfg = {'embed_dims': 256, 'dropout': 0.0, **(self_attn_cfg or {})}
        ffn_cfg = {
            'embed_dims': self_attn_cfg['embed_dims'],
            'feedforward_channels': 2048,
            'ffn_drop': 0.0,
            **(ffn_cfg or {}),
        }
        super().__init__(self_attn_cfg, ffn_cfg, norm_cfg or dict(type='LN'), init_cfg)


@MODELS.register_module()
class GroundingDinoImageEncoder(DeformableDetrTransformerEncoder):
    """Grounding DINO's image encoder, for :class:`DeformableDETR`; its weights are Grounding DINO's ``layers.{i}.*``.

    The detector must use Grounding DINO's position encoding::

        encoder=dict(type='msda_plugin.GroundingDinoImageEncoder'),
        positional_encoding=dict(num_feats=128, normalize=True, offset=0.0, temperature=20)

    Args:
        num_layers: number of layers.
        layer_cfg: fields of one layer that differ from Grounding DINO's.
        num_cp: number of layers, from the first, that recompute their activations in the backward pass.
        init_cfg: MMEngine's initialization config.
    """

    layer_class = GroundingDinoImageEncoderLayer

    def __init__(
        self, num_layers: int = 6, layer_cfg: dict | None = None, num_cp: int = -1, init_cfg: dict | list | None = None
    ):
        super().__init__(num_layers, layer_cfg or {}, num_cp, init_cfg)
