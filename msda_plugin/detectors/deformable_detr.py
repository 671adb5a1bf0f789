"""Deformable DETR: single-scale or multi-scale, with optional box refinement and two stages.

Source: Zhu et al., Deformable DETR, https://arxiv.org/abs/2010.04159. Modules, fields and state-dict keys are
MMDetection's. Encoder, decoder and their attention come from the registry, and the forward pass does not synchronize
with the device.
"""

import copy
from itertools import accumulate

import torch
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttention
from mmdet.models.detectors.deformable_detr import DeformableDETR as MMDetDeformableDETR
from mmdet.models.layers import SinePositionalEncoding
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from msda_plugin.compat import pretrained_last
from msda_plugin.detectors.build_checks import NeckInputCheck, check_given, check_parts
from msda_plugin.detectors.padding import is_padded, padding_masks
from msda_plugin.layers.deformable_detr_layers import DeformableDetrTransformerDecoder, DeformableDetrTransformerEncoder
from msda_plugin.layers.reference_points import pixel_centers, sizes_tensor
from msda_plugin.layers.transformer_parts import build_or_default
from msda_plugin.registry import MODELS

Pairs = tuple[tuple[int, int], ...]


@MODELS.register_module()
class DeformableDETR(NeckInputCheck, MMDetDeformableDETR):
    """Deformable DETR with msda_plugin's layers. Takes the config fields of MMDetection's.

    Args:
        backbone, neck: configs; the neck returns ``num_feature_levels`` maps of ``embed_dims`` channels.
        encoder, decoder: configs of :class:`DeformableDetrTransformerEncoder` and ``...Decoder``; ``type`` is optional
            in them, in ``layer_cfg`` and in its attentions. An attention without ``type`` and ``num_levels`` gets
            ``num_feature_levels``.
        bbox_head: config of the head; the detector sets ``share_pred_layer``, ``num_pred_layer`` and ``as_two_stage``.
        positional_encoding: config; the default ``type`` is ``SinePositionalEncoding``.
        num_queries: maximum number of objects per image.
        with_box_refine: each decoder layer refines the boxes of the previous one.
        as_two_stage: queries start from the encoder's best proposals instead of learned positions.
        num_feature_levels: number of maps from the neck; 1 for single-scale.
        train_cfg, test_cfg, data_preprocessor, init_cfg: as in MMDetection.

    Raises:
        ValueError: If parts do not fit together, or ``test_cfg.max_per_img`` exceeds the number of predicted boxes.
    """

    def __init__(
        self,
        backbone: dict,
        neck: dict | None = None,
        encoder: dict | None = None,
        decoder: dict | None = None,
        bbox_head: dict | None = None,
        positional_encoding: dict | None = None,
        num_queries: int = 100,
        with_box_refine: bool = False,
        as_two_stage: bool = False,
        num_feature_levels: int = 4,
        train_cfg: dict | None = None,
        test_cfg: dict | None = None,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        parts = {
            'encoder': encoder,
            'decoder': decoder,
            'bbox_head': bbox_head,
            'positional_encoding': positional_encoding,
        }
        check_given('DeformableDETR', parts)
        # Copies: building adds fields, and a config may be built again.
        parts = copy.deepcopy(parts)
        for part, name in (('encoder', 'self_attn_cfg'), ('decoder', 'cross_attn_cfg')):
            layer_cfg = parts[part].get('layer_cfg', {})
            if name in layer_cfg and 'type' not in layer_cfg[name]:
                layer_cfg[name] = {'num_levels': num_feature_levels, **layer_cfg[name]}
        super().__init__(
            backbone=backbone,
            neck=neck,
            num_queries=num_queries,
            with_box_refine=with_box_refine,
            as_two_stage=as_two_stage,
            num_feature_levels=num_feature_levels,
            train_cfg=train_cfg,
            test_cfg=test_cfg or {},
            data_preprocessor=data_preprocessor,
            init_cfg=init_cfg,
            **parts,
        )
        self.neck_in_channels = (neck or {}).get('in_channels')
        check_parts(self, neck, num_feature_levels, f'num_feature_levels={num_feature_levels}')
        self._check_levels()

    def _init_layers(self) -> None:
        self.positional_encoding = build_or_default(self.positional_encoding, SinePositionalEncoding)
        self.encoder = build_or_default(self.encoder, DeformableDetrTransformerEncoder)
        self.decoder = build_or_default(self.decoder, DeformableDetrTransformerDecoder)
        self.embed_dims = embed_dims = self.encoder.embed_dims
        if not self.as_two_stage:
            # query_pos, then query
            self.query_embedding = nn.Embedding(self.num_queries, 2 * embed_dims)
        self.level_embed = nn.Parameter(torch.empty(self.num_feature_levels, embed_dims))
        if self.as_two_stage:
            self.memory_trans_fc = nn.Linear(embed_dims, embed_dims)
            self.memory_trans_norm = nn.LayerNorm(embed_dims)
            self.pos_trans_fc = nn.Linear(2 * embed_dims, 2 * embed_dims)
            self.pos_trans_norm = nn.LayerNorm(2 * embed_dims)
        else:
            self.reference_points_fc = nn.Linear(embed_dims, 2)

    def init_weights(self) -> None:
        """Initialize the weights, except for parts that ``init_cfg`` loads from a file (``Pretrained``)."""
        with pretrained_last(self):
            super().init_weights()

    def _check_levels(self) -> None:
        """Raise ValueError if an attention is built for another number of maps."""
        for part in ('encoder', 'decoder'):
            for name, module in getattr(self, part).named_modules():
                if isinstance(module, MultiScaleDeformableAttention) and module.num_levels != self.num_feature_levels:
                    raise ValueError(
                        f'{part}.{name} has num_levels={module.num_levels}, but num_feature_levels='
                        f'{self.num_feature_levels}: set num_levels in its config'
                    )

    def pre_transformer(
        self, mlvl_feats: tuple[Tensor, ...], batch_data_samples: list[DetDataSample] | None = None
    ) -> tuple[dict, dict]:
        """Flatten the maps, and compute position embeddings and padding masks.

        Args:
            mlvl_feats: num_feature_levels maps (bs, embed_dims, h, w).
            batch_data_samples: hold ``batch_input_shape`` and ``img_shape`` of each image, (h, w) in pixels; the
                difference is padding. None: no padding.

        Returns:
            The inputs of the encoder: ``feat`` and ``feat_pos`` (bs, num_keys, embed_dims), ``feat_mask`` (bs,
            num_keys), True on padding, or None, ``spatial_shapes`` as pairs (h, w), ``level_start_index`` (num_levels,)
            int64, ``valid_ratios`` (bs, num_levels, 2); and those of the decoder.

        Raises:
            ValueError: If the number of maps or of their channels is not the one the model was built for.
        """
        sizes = [tuple(feat.shape) for feat in mlvl_feats]
        if len(sizes) != self.num_feature_levels or any(size[1] != self.embed_dims for size in sizes):
            raise ValueError(
                f'the {"neck" if self.with_neck else "backbone"} gave {len(sizes)} maps of '
                f'{[size[1] for size in sizes]} channels, but num_feature_levels={self.num_feature_levels} maps of '
                f'embed_dims={self.embed_dims} are needed: change the neck, or add one such as mmdet.ChannelMapper'
            )
        batch, device = sizes[0][0], mlvl_feats[0].device
        spatial_shapes = tuple(size[-2:] for size in sizes)
        starts = [0, *accumulate(height * width for height, width in spatial_shapes[:-1])]
        level_start_index = sizes_tensor(starts, device)

        if is_padded(batch_data_samples):
            masks, valid_ratios = padding_masks(spatial_shapes, batch, batch_data_samples, device)
            positions = [self.positional_encoding(mask) for mask in masks]
            feat_mask = torch.cat([mask.flatten(1) for mask in masks], 1)
        else:
            feat_mask, valid_ratios = None, torch.ones(batch, len(sizes), 2, device=device)
            # Without padding, positions are the same for every image.
            positions = [
                self.positional_encoding(None, input=feat[:1]).expand(batch, -1, -1, -1) for feat in mlvl_feats
            ]
        # (bs, embed_dims, h, w) -> (bs, num_keys, embed_dims)
        feat = torch.cat([feat.flatten(2).transpose(1, 2) for feat in mlvl_feats], 1)
        feat_pos = torch.cat(
            [
                position.flatten(2).transpose(1, 2) + embed
                for position, embed in zip(positions, self.level_embed, strict=True)
            ],
            1,
        )

        shared = dict(spatial_shapes=spatial_shapes, level_start_index=level_start_index, valid_ratios=valid_ratios)
        return dict(feat=feat, feat_mask=feat_mask, feat_pos=feat_pos, **shared), dict(memory_mask=feat_mask, **shared)

    def forward_encoder(
        self,
        feat: Tensor,
        feat_mask: Tensor | None,
        feat_pos: Tensor,
        spatial_shapes: Pairs,
        level_start_index: Tensor,
        valid_ratios: Tensor,
    ) -> dict:
        """Run the encoder on the outputs of :meth:`pre_transformer`."""
        memory = self.encoder(
            query=feat,
            query_pos=feat_pos,
            key_padding_mask=feat_mask,
            spatial_shapes=spatial_shapes,
            level_start_index=level_start_index,
            valid_ratios=valid_ratios,
        )
        return dict(memory=memory, memory_mask=feat_mask, spatial_shapes=spatial_shapes, valid_ratios=valid_ratios)

    def pre_decoder(
        self, memory: Tensor, memory_mask: Tensor | None, spatial_shapes: Pairs, valid_ratios: Tensor
    ) -> tuple[dict, dict]:
        """Prepare the queries.

        Args:
            memory: (bs, num_keys, embed_dims).
            memory_mask: (bs, num_keys), True on padding; None: no padding.
            spatial_shapes, valid_ratios: as in :meth:`pre_transformer`.

        Returns:
            The decoder's ``query`` and ``query_pos`` (bs, num_queries, embed_dims), ``memory``, and
            ``reference_points`` (bs, num_queries, 2), or (..., 4) boxes in a two-stage model; and, in training, the
            head's ``enc_outputs_class`` (bs, num_keys, num_classes) and ``enc_outputs_coord`` (bs, num_keys, 4), which
            are None in a one-stage model.

        Raises:
            ValueError: If there are more queries than proposals.
        """
        enc_class = enc_coord = None
        if self.as_two_stage:
            if self.num_queries > memory.shape[1]:
                raise ValueError(
                    f'num_queries={self.num_queries} proposals are needed, but the maps {spatial_shapes} have '
                    f'only {memory.shape[1]} pixels: enlarge the images, or lower num_queries'
                )
            output_memory, proposals = self.gen_encoder_output_proposals(
                memory, memory_mask, spatial_shapes, valid_ratios
            )
            enc_class = self.bbox_head.cls_branches[self.decoder.num_layers](output_memory)
            reg_branch = self.bbox_head.reg_branches[self.decoder.num_layers]
            # Class 0 is the score of any object.
            best = enc_class[..., 0].topk(self.num_queries, dim=1).indices[..., None]
            if self.training:
                coord_logits = reg_branch(output_memory) + proposals
                enc_coord = coord_logits.sigmoid()
                coord_logits = coord_logits.gather(1, best.expand(-1, -1, 4)).detach()
            else:
                chosen = output_memory.gather(1, best.expand(-1, -1, output_memory.shape[-1]))
                coord_logits = reg_branch(chosen) + proposals.gather(1, best.expand(-1, -1, 4))
            reference_points = coord_logits.sigmoid()
            position = self.get_proposal_pos_embed(coord_logits, num_pos_feats=self.embed_dims // 2)
            query_pos, query = self.pos_trans_norm(self.pos_trans_fc(position)).chunk(2, -1)
        else:
            query_pos, query = self.query_embedding.weight.expand(memory.shape[0], -1, -1).chunk(2, -1)
            reference_points = self.reference_points_fc(query_pos).sigmoid()
        head_inputs = dict(enc_outputs_class=enc_class, enc_outputs_coord=enc_coord) if self.training else {}
        return dict(query=query, query_pos=query_pos, memory=memory, reference_points=reference_points), head_inputs

    def gen_encoder_output_proposals(
        self, memory: Tensor, memory_mask: Tensor | None, spatial_shapes: Pairs, valid_ratios: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Project the memory, and propose a box at each pixel.

        Arguments are those of :meth:`pre_decoder`.

        Returns:
            The projected memory (bs, num_keys, embed_dims), and the logits of (cx, cy, w, h), (bs, num_keys, 4): boxes
            around the pixel's center, 0.05 * 2^level wide and high. On padding, and where a coordinate is not between
            0.01 and 0.99, the memory is zeroed before the projection and the logits are infinite.
        """
        centers = pixel_centers(spatial_shapes, valid_ratios)
        sides = torch.cat(
            [
                centers.new_full((height * width,), 0.05 * 2**level)
                for level, (height, width) in enumerate(spatial_shapes)
            ]
        )
        proposals = torch.cat([centers, sides[:, None].expand(centers.shape[0], -1, 2)], -1)
        invalid = ((proposals <= 0.01) | (proposals >= 0.99)).any(-1, keepdim=True)
        if memory_mask is not None:
            invalid = invalid | memory_mask[..., None]
        proposals = proposals.logit().masked_fill(invalid, float('inf'))
        return self.memory_trans_norm(self.memory_trans_fc(memory.masked_fill(invalid, 0))), proposals

    def _forward(
        self, batch_inputs: Tensor, batch_data_samples: list[DetDataSample] | None = None
    ) -> tuple[Tensor, Tensor]:
        """``mode='tensor'``: logits and boxes of every decoder layer, as the head returns them."""
        outputs = self.forward_transformer(self.extract_feat(batch_inputs), batch_data_samples)
        return self.bbox_head(outputs['hidden_states'], outputs['references'])
