"""The image part of Grounding DINO's feature enhancer.

Source: Liu et al., Grounding DINO, https://arxiv.org/abs/2303.05499, section 3.2. Each of its layers fuses image and
text, attends among the text, and attends deformably among the pixels; here is the last alone, for images without text.
"""

from mmengine.model import ModuleList

from msda_plugin.registry import MODELS

from .deformable_detr_layers import DeformableDetrTransformerEncoder, DeformableDetrTransformerEncoderLayer
from .transformer_parts import build_or_default


@MODELS.register_module()
class GroundingDinoImageEncoderLayer(DeformableDetrTransformerEncoderLayer):
    """Deformable DETR's encoder layer with Grounding DINO's settings: a wider FFN, and no dropout.

    Args:
        self_attn_cfg: changes to the deformable self-attention, whose ``dropout`` is 0 here.
        ffn_cfg: changes to the FFN; by default as wide as the attention, ``feedforward_channels`` 2048, ``ffn_drop`` 0.
        norm_cfg: config of the norms; None: ``dict(type='LN')``.
        init_cfg: MMEngine's initialisation config.
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
    """Six such layers: an encoder for :class:`DeformableDETR`; its weights are Grounding DINO's ``layers.{i}.*``.

    It expects Grounding DINO's position encoding, which the detector adds::

        encoder=dict(type='msda_plugin.GroundingDinoImageEncoder'),
        positional_encoding=dict(num_feats=128, normalize=True, offset=0.0, temperature=20)

    Args:
        num_layers: number of layers.
        layer_cfg: config of one layer; None, or whichever fields differ from Grounding DINO's.
        num_cp: the first ``num_cp`` layers recompute their activations in the backward pass.
        init_cfg: MMEngine's initialisation config.
    """

    def __init__(
        self, num_layers: int = 6, layer_cfg: dict | None = None, num_cp: int = -1, init_cfg: dict | list | None = None
    ):
        super().__init__(num_layers, layer_cfg or {}, num_cp, init_cfg)

    def _init_layers(self) -> None:
        self.layers = ModuleList(
            [build_or_default(self.layer_cfg, GroundingDinoImageEncoderLayer) for _ in range(self.num_layers)]
        )
        self.embed_dims = self.layers[0].embed_dims
