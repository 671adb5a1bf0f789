"""Encoder and decoder of DETR, with every attention built from its config.

Source: Carion et al., DETR, https://arxiv.org/abs/2005.12872, appendix A.3. Modules and state-dict keys are
MMDetection's; here the attention comes from the registry and forms no weights that nobody reads, and checkpointing is
plain torch, in the decoder too.
"""

import torch
from mmcv.cnn import build_norm_layer
from mmdet.models.layers.transformer import detr_layers as mmdet_layers
from mmengine.model import BaseModule, ModuleList
from torch import Tensor

from msda_plugin.layers.transformer_parts import build_attention, build_ffn, build_or_default, check_num_cp, run_layer
from msda_plugin.registry import MODELS


@MODELS.register_module()
class DetrTransformerEncoderLayer(mmdet_layers.DetrTransformerEncoderLayer):
    """x = norm(x + attention(x)), x = norm(x + ffn(x)); the position is added to queries and keys.

    Fields are MMDetection's: ``self_attn_cfg`` (its ``type`` is optional and defaults to mmcv's multi-head attention),
    ``ffn_cfg`` and ``norm_cfg``.
    """

    def _init_layers(self) -> None:
        self.self_attn = build_attention(self.self_attn_cfg)
        self.embed_dims = self.self_attn.embed_dims
        self.ffn = build_ffn(self.ffn_cfg)
        self.norms = ModuleList([build_norm_layer(self.norm_cfg, self.embed_dims)[1] for _ in range(2)])


@MODELS.register_module()
class DetrTransformerDecoderLayer(mmdet_layers.DetrTransformerDecoderLayer):
    """Self-attention among the queries, attention to the memory, FFN, each followed by a norm.

    Fields are MMDetection's: ``self_attn_cfg`` and ``cross_attn_cfg`` (``type`` defaults to mmcv's multi-head
    attention), ``ffn_cfg``, ``norm_cfg``.
    """

    def _init_layers(self) -> None:
        self.self_attn = build_attention(self.self_attn_cfg)
        self.cross_attn = build_attention(self.cross_attn_cfg)
        self.embed_dims = self.self_attn.embed_dims
        self.ffn = build_ffn(self.ffn_cfg)
        self.norms = ModuleList([build_norm_layer(self.norm_cfg, self.embed_dims)[1] for _ in range(3)])


@MODELS.register_module()
class DetrTransformerEncoder(mmdet_layers.DetrTransformerEncoder):
    """The encoder of DETR.

    Args:
        num_layers: number of layers.
        layer_cfg: config of one layer; its ``type`` is optional.
        num_cp: the first ``num_cp`` layers recompute their activations in the backward pass.
    """

    def __init__(self, num_layers: int, layer_cfg: dict, num_cp: int = -1, init_cfg: dict | None = None) -> None:
        check_num_cp(num_cp, num_layers)
        super().__init__(num_layers=num_layers, layer_cfg=layer_cfg, num_cp=num_cp, init_cfg=init_cfg)

    def _init_layers(self) -> None:
        self.layers = ModuleList(
            [build_or_default(self.layer_cfg, DetrTransformerEncoderLayer) for _ in range(self.num_layers)]
        )
        self.embed_dims = self.layers[0].embed_dims

    def forward(self, query: Tensor, query_pos: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """Encode the pixels of one map.

        Args:
            query: (bs, num_keys, embed_dims), the pixels row by row.
            query_pos: their position embedding, with the query's shape.
            key_padding_mask: (bs, num_keys), True on padding; None: there is none.

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
            )
        return query


@MODELS.register_module()
class DetrTransformerDecoder(mmdet_layers.DetrTransformerDecoder):
    """The decoder of DETR.

    Args:
        num_layers: number of layers.
        layer_cfg: config of one layer; its ``type`` is optional.
        post_norm_cfg: config of the norm that the outputs of all layers go through; None: a layer norm.
        return_intermediate: return the outputs of all layers, not of the last one alone.
        num_cp: the first ``num_cp`` layers recompute their activations in the backward pass.
    """

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
        # BaseModule's, past MMDetection's, which knows no num_cp.
        BaseModule.__init__(self, init_cfg=init_cfg)
        self.num_layers = num_layers
        self.layer_cfg = layer_cfg
        self.post_norm_cfg = post_norm_cfg or dict(type='LN')
        self.return_intermediate = return_intermediate
        self.num_cp = num_cp
        self._init_layers()

    def _init_layers(self) -> None:
        self.layers = ModuleList(
            [build_or_default(self.layer_cfg, DetrTransformerDecoderLayer) for _ in range(self.num_layers)]
        )
        self.embed_dims = self.layers[0].embed_dims
        self.post_norm = build_norm_layer(self.post_norm_cfg, self.embed_dims)[1]

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
            key_pos: the position embedding of the memory, with its shape.
            key_padding_mask: (bs, num_keys), True on padding; None: there is none.

        Returns:
            Outputs (num_layers, bs, num_queries, embed_dims); of the last layer alone, (1, bs, num_queries,
            embed_dims), unless ``return_intermediate``.
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
