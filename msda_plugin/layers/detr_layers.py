"""Encoder and decoder of DETR, with attention layers that the config chooses.

Source: Carion et al., DETR, https://arxiv.org/abs/2005.12872, appendix A.3. Modules and state-dict keys are
MMDetection's. Unlike MMDetection's, the attention is built from the registry, and the decoder supports checkpointing
as well; checkpointing needs PyTorch alone.
"""

import torch
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks.transformer import MultiheadAttention
from mmdet.models.layers.transformer import detr_layers as mmdet_layers
from mmengine.model import ModuleList
from torch import Tensor

from msda_plugin.layers.transformer_parts import (
    build_attention,
    build_ffn,
    build_norms,
    build_or_default,
    check_num_cp,
    run_layer,
)
from msda_plugin.registry import MODELS


@MODELS.register_module()
class DetrTransformerEncoderLayer(mmdet_layers.DetrTransformerEncoderLayer):
    """x = norm(x + attention(x)), x = norm(x + ffn(x)); queries and keys include the position embedding.

    Fields are MMDetection's: ``self_attn_cfg`` (``type`` defaults to ``self_attn_class``), ``ffn_cfg`` and
    ``norm_cfg``.
    """

    self_attn_class = MultiheadAttention

    def _init_layers(self) -> None:
        self.self_attn = build_attention(self.self_attn_cfg, self.self_attn_class)
        self.embed_dims = self.self_attn.embed_dims
        self.ffn = build_ffn(self.ffn_cfg)
        self.norms = build_norms(self.norm_cfg, self.embed_dims, 2)


@MODELS.register_module()
class DetrTransformerDecoderLayer(mmdet_layers.DetrTransformerDecoderLayer):
    """Self-attention among the queries, cross-attention to the memory and FFN, each followed by a norm.

    Fields are MMDetection's: ``self_attn_cfg`` (``type`` defaults to mmcv's ``MultiheadAttention``), ``cross_attn_cfg``
    (``type`` defaults to ``cross_attn_class``), ``ffn_cfg`` and ``norm_cfg``.
    """

    cross_attn_class = MultiheadAttention

    def _init_layers(self) -> None:
        self.self_attn = build_attention(self.self_attn_cfg)
        self.cross_attn = build_attention(self.cross_attn_cfg, self.cross_attn_class)
        self.embed_dims = self.self_attn.embed_dims
        self.ffn = build_ffn(self.ffn_cfg)
        self.norms = build_norms(self.norm_cfg, self.embed_dims, 3)


@MODELS.register_module()
class DetrTransformerEncoder(mmdet_layers.DetrTransformerEncoder):
    """The encoder of DETR.

    Args:
        num_layers: number of layers.
        layer_cfg: config of one layer; ``type`` defaults to ``layer_class``.
        num_cp: number of layers, from the first, that recompute their activations in the backward pass.
        init_cfg: MMEngine's initialization config.

    Raises:
        ValueError: If ``num_cp`` exceeds ``num_layers``.
    """

    layer_class = DetrTransformerEncoderLayer

    def __init__(self, num_layers: int, layer_cfg: dict, num_cp: int = -1, init_cfg: dict | None = None) -> None:
        check_num_cp(num_cp, num_layers)
        super().__init__(num_layers, layer_cfg, num_cp, init_cfg)

    def _init_layers(self) -> None:
        self.layers = ModuleList([build_or_default(self.layer_cfg, self.layer_class) for _ in range(self.num_layers)])
        self.embed_dims = self.layers[0].embed_dims

    def forward(
        self, query: Tensor, query_pos: Tensor, key_padding_mask: Tensor | None, **inputs: Tensor | None
    ) -> Tensor:
        """Encode the pixels of a feature map.

        Args:
            query: (bs, num_keys, embed_dims), the pixels row by row.
            query_pos: position embedding, with the query's shape.
            key_padding_mask: (bs, num_keys), True on padding; None: no padding.
            **inputs: further inputs of the layers.

        Returns:
            The memory, (bs, num_keys, embed_dims).
        """
        for i, layer in enumerate(self.layers):
            query = run_layer(
                layer,
                self.training and i < self.num_cp,
                query=query,
                query_pos=query_pos,
                key_padding_mask=key_padding_mask,
                **inputs,
            )
        return query


@MODELS.register_module()
class DetrTransformerDecoder(mmdet_layers.DetrTransformerDecoder):
    """The decoder of DETR.

    Args:
        num_layers: number of layers.
        layer_cfg: config of one layer; ``type`` defaults to ``layer_class``.
        post_norm_cfg: config of the norm applied to the output of each layer; None: a layer norm.
        return_intermediate: return the outputs of all layers instead of the last one only.
        num_cp: number of layers, from the first, that recompute their activations in the backward pass.
        init_cfg: MMEngine's initialization config.

    Raises:
        ValueError: If ``num_cp`` exceeds ``num_layers``.
    """

    layer_class = DetrTransformerDecoderLayer

    def __init__(
        self,
        num_layers: int,
        layer_cfg: dict,
        post_norm_cfg: dict | None = None,
        return_intermediate: bool = True,
        num_cp: int = -1,
        init_cfg: dict | None = None,
    ) -> None:
        check_num_cp(num_cp, num_layers)
        super().__init__(num_layers, layer_cfg, post_norm_cfg, return_intermediate, init_cfg)
        self.num_cp = num_cp

    def _init_layers(self) -> None:
        self.layers = ModuleList([build_or_default(self.layer_cfg, self.layer_class) for _ in range(self.num_layers)])
        self.embed_dims = self.layers[0].embed_dims
        self._init_post_norm()

    def _init_post_norm(self) -> None:
        self.post_norm = build_norm_layer(self.post_norm_cfg or dict(type='LN'), self.embed_dims)[1]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_pos: Tensor,
        key_pos: Tensor,
        key_padding_mask: Tensor | None,
    ) -> Tensor:
        """Decode the queries.

        Args:
            query, query_pos: (bs, num_queries, embed_dims).
            key, value: the memory, (bs, num_keys, embed_dims).
            key_pos: position embedding of the memory, with its shape.
            key_padding_mask: (bs, num_keys), True on padding; None: no padding.

        Returns:
            Outputs of all layers, (num_layers, bs, num_queries, embed_dims), or without ``return_intermediate`` of the
            last layer, (1, bs, num_queries, embed_dims).
        """
        outputs = []
        for i, layer in enumerate(self.layers):
            query = run_layer(
                layer,
                self.training and i < self.num_cp,
                query=query,
                key=key,
                value=value,
                query_pos=query_pos,
                key_pos=key_pos,
                key_padding_mask=key_padding_mask,
            )
            outputs.append(query)
        return self.post_norm(torch.stack(outputs if self.return_intermediate else outputs[-1:]))
