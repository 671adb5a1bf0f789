"""The decoder of D-FINE: boxes as distributions over bins, which every layer refines.

Source: Peng et al., D-FINE, https://arxiv.org/abs/2410.13842.
"""

from collections.abc import Callable, Sequence

import torch
from mmcv.cnn import build_activation_layer
from mmengine.model import BaseModule, ModuleList
from torch import Tensor, nn

from msda_plugin.layers.points_per_level_attention import PointsPerLevelAttention
from msda_plugin.layers.token_layout import check_heads
from msda_plugin.layers.transformer_parts import check_num_cp, run_layer
from msda_plugin.ops.functional import Shapes
from msda_plugin.registry import MODELS


def build_mlp(channels: Sequence[int], act: str = 'ReLU') -> nn.Sequential:
    """Linear layers from ``channels[0]`` to ``channels[-1]`` with activations of type ``act`` between them."""
    layers = []
    for before, after in zip(channels, channels[1:], strict=False):
        layers += [nn.Linear(before, after), _build_act(act)]
    return nn.Sequential(*layers[:-1])


def _build_act(act: str) -> nn.Module:
    # Out of place: a linear layer's output is a view, and modifying it copies it in the backward pass.
    return build_activation_layer(dict(type=act, inplace=False))


class Gate(nn.Module):
    """Weighted sum of two inputs with learned weights of each channel, and a layer norm."""

    def __init__(self, embed_dims: int) -> None:
        super().__init__()
        self.gate = nn.Linear(2 * embed_dims, 2 * embed_dims)
        self.norm = nn.LayerNorm(embed_dims)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """(..., embed_dims) each."""
        weight_a, weight_b = self.gate(torch.cat([a, b], -1)).sigmoid().chunk(2, -1)
        return self.norm(weight_a * a + weight_b * b)


class UnprojectedAttention(PointsPerLevelAttention):
    """:class:`PointsPerLevelAttention` without projections of value and output.

    Args:
        embed_dims: channels of queries and values.
        num_heads: must divide ``embed_dims``.
        num_points: number of points on each level.
        method: 'default' or 'discrete'.
    """

    def __init__(self, embed_dims: int, num_heads: int, num_points: Sequence[int], method: str = 'default') -> None:
        if isinstance(num_points, int):
            raise ValueError(f'num_points={num_points}; expected a list with one value per level')
        super().__init__(embed_dims, num_heads, len(num_points), num_points, method, dropout=0.0, batch_first=True)
        self.value_proj = self.output_proj = nn.Identity()


class DFINETransformerDecoderLayer(BaseModule):
    """Self-attention, deformable attention to the memory behind a gate, and a feed-forward network.

    Arguments are those of :class:`DFINETransformerDecoder`.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        feedforward_channels: int,
        num_points: Sequence[int],
        method: str,
        dropout: float,
        act: str,
    ) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(embed_dims, num_heads, dropout, batch_first=True)
        self.norm1 = nn.LayerNorm(embed_dims)
        self.cross_attn = UnprojectedAttention(embed_dims, num_heads, num_points, method)
        self.gateway = Gate(embed_dims)
        self.ffn = nn.Sequential(
            nn.Linear(embed_dims, feedforward_channels),
            _build_act(act),
            nn.Dropout(dropout),
            nn.Linear(feedforward_channels, embed_dims),
        )
        self.norm2 = nn.LayerNorm(embed_dims)
        self.dropout = nn.Dropout(dropout)
        for i in (0, 3):
            nn.init.xavier_uniform_(self.ffn[i].weight)

    def forward(
        self,
        query: Tensor,
        query_pos: Tensor,
        value: Tensor,
        boxes: Tensor,
        spatial_shapes: Shapes,
        self_attn_mask: Tensor | None = None,
    ) -> Tensor:
        """Arguments are those of :meth:`DFINETransformerDecoder.forward`, with ``boxes`` relative to the padded levels.

        ``boxes`` have the shape (bs, num_queries, num_levels, 4).
        """
        key = query + query_pos
        attended = self.self_attn(key, key, query, attn_mask=self_attn_mask, need_weights=False)[0]
        query = self.norm1(query + self.dropout(attended))
        attended = self.cross_attn(
            query,
            value=value,
            identity=query.new_zeros(()),  # the gate adds the query
            query_pos=query_pos,
            reference_points=boxes,
            spatial_shapes=spatial_shapes,
        )
        query = self.gateway(query, self.dropout(attended))
        query = query + self.dropout(self.ffn(query))
        return self.norm2(query.clamp(-65504, 65504))  # the range of float16


@MODELS.register_module()
class DFINETransformerDecoder(BaseModule):
    """The decoder of D-FINE. The branches that predict boxes belong to the head, which :meth:`forward` gets.

    Args:
        num_layers: number of layers.
        embed_dims: channels of queries and memory.
        num_heads: heads of both attentions.
        feedforward_channels: hidden channels of the feed-forward networks.
        num_points: points of the deformable attention on each level, one value per level, the finest first.
        method: 'default' or 'discrete' sampling, see :class:`PointsPerLevelAttention`.
        dropout: dropout rate, 0-1.
        act: type of activations, 'ReLU' as in D-FINE or 'SiLU' as in DEIM.
        eval_layer: index of the layer that predicts in evaluation; layers after it are auxiliary, for training.
        num_cp: recompute the first ``num_cp`` layers in the backward pass instead of keeping their activations.
        init_cfg: as in MMEngine.

    Raises:
        ValueError: If ``eval_layer`` or ``num_cp`` is not within ``num_layers``, or ``num_heads`` does not divide
            ``embed_dims``.
    """

    def __init__(
        self,
        num_layers: int = 6,
        embed_dims: int = 256,
        num_heads: int = 8,
        feedforward_channels: int = 1024,
        num_points: Sequence[int] = (3, 6, 3),
        method: str = 'default',
        dropout: float = 0.0,
        act: str = 'ReLU',
        eval_layer: int = -1,
        num_cp: int = 0,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        check_num_cp(num_cp, num_layers)
        check_heads(embed_dims, num_heads)
        if not -num_layers <= eval_layer < num_layers:
            raise ValueError(f'eval_layer={eval_layer} is out of range for num_layers={num_layers}')
        self.num_layers = num_layers
        self.embed_dims = embed_dims
        self.num_cp = num_cp
        self.eval_layer = eval_layer % num_layers
        self.layers = ModuleList(
            [
                DFINETransformerDecoderLayer(
                    embed_dims, num_heads, feedforward_channels, num_points, method, dropout, act
                )
                for _ in range(num_layers)
            ]
        )
        self.query_pos_head = build_mlp([4, 2 * embed_dims, embed_dims], act)

    @property
    def num_levels(self) -> int:
        """Number of maps in the memory."""
        return self.layers[0].cross_attn.num_levels

    def init_weights(self) -> None:
        """Initialize the weights as published."""
        super().init_weights()
        for i in (0, 2):
            nn.init.xavier_uniform_(self.query_pos_head[i].weight)

    def forward(
        self,
        query: Tensor,
        boxes: Tensor,
        memory: Tensor,
        spatial_shapes: Shapes,
        initial_branch: Callable[[Tensor, Tensor], Tensor],
        refine_branch: Callable[[int, Tensor, Tensor, Tensor | float], tuple[Tensor, Tensor]],
        valid_ratios: Tensor | None = None,
        self_attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Decode the queries.

        Args:
            query: (bs, num_queries, embed_dims).
            boxes: reference boxes of the first layer, (bs, num_queries, 4) as (cx, cy, w, h), 0-1; detached.
            memory: (bs, num_keys, embed_dims), the pixels of all levels, row by row.
            spatial_shapes: (h, w) of each level, as pairs of integers or (num_levels, 2) int64.
            initial_branch: first layer's outputs, reference boxes -> initial boxes, from which distributions count.
            refine_branch: layer, its outputs plus those of the layer before, initial boxes, logits of the layer before
                -> boxes, logits of the distributions (bs, num_queries, 4 * bins).
            valid_ratios: (bs, num_levels, 2), the unpadded share of each level's width and height, 0-1; None: no
                padding.
            self_attn_mask: (num_queries, num_queries) bool, True where a query (row) must not see another; None: all.

        Returns:
            Outputs (L, bs, num_queries, embed_dims), boxes (L, bs, num_queries, 4), logits of the distributions (L, bs,
            num_queries, 4 * bins), and the initial boxes (bs, num_queries, 4). L is ``num_layers`` in training; in
            evaluation there is only ``eval_layer``.
        """
        outputs, all_boxes, distributions = [], [], []
        before, distribution = 0.0, 0.0
        if valid_ratios is None:
            valid_ratios = boxes.new_ones(1, self.num_levels, 2)
        scale = valid_ratios.repeat(1, 1, 2)[:, None]  # (bs or 1, 1, num_levels, 4)
        for i, layer in enumerate(self.layers if self.training else self.layers[: self.eval_layer + 1]):
            query = run_layer(
                layer,
                self.training and i < self.num_cp,
                query=query,
                query_pos=self.query_pos_head(boxes).clamp(-10, 10),
                value=memory,
                boxes=boxes[:, :, None] * scale,
                spatial_shapes=spatial_shapes,
                self_attn_mask=self_attn_mask,
            )
            if i == 0:
                initial_boxes = initial_branch(query, boxes)
                reference = initial_boxes.detach()
            refined, distribution = refine_branch(i, query + before, reference, distribution)
            boxes, before = refined.detach(), query.detach()
            if self.training or i == self.eval_layer:
                outputs.append(query)
                all_boxes.append(refined)
                distributions.append(distribution)
        return torch.stack(outputs), torch.stack(all_boxes), torch.stack(distributions), initial_boxes
