"""RT-DETR and RT-DETRv2: real-time detection transformers.

Sources: Zhao et al., "DETRs Beat YOLOs on Real-time Object Detection", https://arxiv.org/abs/2304.08069; Lv et al.,
RT-DETRv2, https://arxiv.org/abs/2407.17140. Fields are named as in MMDetection's DINO. The forward pass does not
synchronize with the device.
"""

import copy
from collections.abc import Sequence
from itertools import accumulate

import torch
from mmcv.cnn import ConvModule, fuse_conv_bn
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttention
from mmdet.models.detectors.base_detr import DetectionTransformer
from mmdet.structures import DetDataSample
from mmengine.model import ModuleList
from torch import Tensor, nn

from msda_plugin.compat import pretrained_last
from msda_plugin.detectors.build_checks import (
    NeckInputCheck,
    check_given,
    check_in_channels,
    check_max_per_img,
    declared_channels,
)
from msda_plugin.detectors.deformable_detr import DeformableDETR, Pairs
from msda_plugin.detectors.padding import is_padded, padding_masks
from msda_plugin.layers.denoising import DenoisingQueries
from msda_plugin.layers.reference_points import sizes_tensor
from msda_plugin.layers.rtdetr_layers import RTDETRTransformerDecoder
from msda_plugin.layers.transformer_parts import build_or_default
from msda_plugin.registry import MODELS


@MODELS.register_module()
class RTDETR(NeckInputCheck, DetectionTransformer):
    """RT-DETR: a neck that encodes the maps, selection of queries by class score, and a deformable decoder.

    Args:
        backbone: config.
        neck: config, such as :class:`HybridEncoder`.
        decoder: config of :class:`RTDETRTransformerDecoder`; ``type`` is optional in it, in ``layer_cfg`` and in its
            attentions. A cross-attention without ``type`` and ``num_levels`` gets ``num_feature_levels``.
        bbox_head: config of :class:`RTDETRHead`; the detector sets ``num_pred_layer`` and ``dn_cfg``.
        num_queries: maximum number of objects per image.
        num_feature_levels: number of maps that the decoder attends to. Those beyond the neck's maps come from
            convolutions of stride 2.
        in_channels: channels of the neck's maps; None: ``out_channels`` of the neck for each.
        project_inputs: project every map to the decoder's channels by a 1x1 convolution and a batch norm, also where
            the channels are the same, as RT-DETR does. False: only maps with other channels, as D-FINE does.
        dn_cfg: fields of :class:`ContrastiveDenoising`; None: training without denoising queries.
        learn_query_content: queries start from learned vectors instead of the selected pixels.
        train_cfg, test_cfg, data_preprocessor, init_cfg: as in MMDetection.

    Raises:
        ValueError: If parts do not fit together, or ``test_cfg.max_per_img`` exceeds the number of predicted boxes.
    """

    decoder_class: type[nn.Module] = RTDETRTransformerDecoder

    def __init__(
        self,
        backbone: dict,
        neck: dict | None = None,
        decoder: dict | None = None,
        bbox_head: dict | None = None,
        num_queries: int = 300,
        num_feature_levels: int = 3,
        in_channels: Sequence[int] | None = None,
        project_inputs: bool = True,
        dn_cfg: dict | None = None,
        learn_query_content: bool = False,
        train_cfg: dict | None = None,
        test_cfg: dict | None = None,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        check_given(type(self).__name__, {'neck': neck, 'decoder': decoder, 'bbox_head': bbox_head})
        if num_queries < 1:
            raise ValueError(f'num_queries is {num_queries}; expected at least 1')
        # Copies: building adds fields, and a config may be built again.
        decoder, bbox_head = copy.deepcopy(decoder), copy.deepcopy(bbox_head)
        layer_cfg = decoder.get('layer_cfg', {})
        if 'cross_attn_cfg' in layer_cfg and 'type' not in layer_cfg['cross_attn_cfg']:
            layer_cfg['cross_attn_cfg'] = {'num_levels': num_feature_levels, **layer_cfg['cross_attn_cfg']}
        bbox_head.update(num_pred_layer=decoder.get('num_layers', 6) + 1, dn_cfg=dn_cfg)
        self.num_feature_levels = num_feature_levels
        self.learn_query_content = learn_query_content
        self.project_inputs = project_inputs
        self.map_channels = tuple(in_channels or self._neck_channels(neck))
        super().__init__(
            backbone=backbone,
            neck=neck,
            decoder=decoder,
            bbox_head=bbox_head,
            num_queries=num_queries,
            train_cfg=train_cfg,
            test_cfg=test_cfg or {},
            data_preprocessor=data_preprocessor,
            init_cfg=init_cfg,
        )
        self.neck_in_channels = neck.get('in_channels')
        channels = declared_channels(self.backbone)
        if channels is not None:
            check_in_channels(channels, self.neck_in_channels)
        check_max_per_img(self)

    @staticmethod
    def _neck_channels(neck: dict) -> list[int]:
        """Channels of each map of a neck, from its config."""
        channels = neck.get('out_channels', 256)
        if not isinstance(channels, int):
            return list(channels)
        count = neck.get('num_outs') or len(neck.get('in_channels', ()))
        if not count:
            raise ValueError(
                'the number of maps does not follow from the config of the neck: set in_channels of the detector to '
                'the channels of each map that the neck returns'
            )
        return [channels] * count

    def _init_layers(self) -> None:
        self.decoder = build_or_default(self.decoder, self.decoder_class)
        self.embed_dims = dims = self.decoder.embed_dims
        if self.bbox_head.embed_dims != dims:
            raise ValueError(
                f'all parts need the same number of channels, but embed_dims are {self.bbox_head.embed_dims} in '
                f'bbox_head and {dims} in decoder'
            )
        self._check_levels()
        extra = self.num_feature_levels - len(self.map_channels)
        channels = [self.map_channels[-1]] + [dims] * extra
        norm = dict(norm_cfg=dict(type='BN'), act_cfg=None)
        self.input_proj = ModuleList(
            [
                ConvModule(c, dims, 1, **norm) if self.project_inputs or c != dims else nn.Identity()
                for c in self.map_channels
            ]
            + [ConvModule(c, dims, 3, stride=2, padding=1, **norm) for c in channels[:extra]]
        )
        self.memory_trans_fc = nn.Linear(dims, dims)
        self.memory_trans_norm = nn.LayerNorm(dims)
        if self.learn_query_content:
            self.query_embedding = nn.Embedding(self.num_queries, dims)

    def _check_levels(self) -> None:
        """Raise ValueError if the number of maps does not fit, or an attention is built for another number."""
        levels = self.num_feature_levels
        if levels < len(self.map_channels):
            raise ValueError(
                f'num_feature_levels={levels}, but the neck gives {len(self.map_channels)} maps of '
                f'{list(self.map_channels)} channels: raise num_feature_levels, or give the neck fewer maps'
            )
        for name, module in self.decoder.named_modules():
            if isinstance(module, MultiScaleDeformableAttention) and module.num_levels != levels:
                raise ValueError(
                    f'decoder.{name} has num_levels={module.num_levels}, but num_feature_levels={levels}: set '
                    'num_levels in its config'
                )

    def init_weights(self) -> None:
        """Initialize the weights, except for parts that ``init_cfg`` loads from a file (``Pretrained``)."""
        with pretrained_last(self):
            super().init_weights()
            nn.init.xavier_uniform_(self.memory_trans_fc.weight)
            if self.learn_query_content:
                nn.init.xavier_uniform_(self.query_embedding.weight)
            for proj in self.input_proj:
                if isinstance(proj, ConvModule):
                    nn.init.xavier_uniform_(proj.conv.weight)

    def forward_transformer(
        self, img_feats: tuple[Tensor, ...], batch_data_samples: list[DetDataSample] | None = None
    ) -> dict:
        """Run selection and decoder on the neck's maps; returns the inputs of the head."""
        encoder_inputs, decoder_inputs = self.pre_transformer(img_feats, batch_data_samples)
        selected, head_inputs = self.pre_decoder(
            **self.forward_encoder(**encoder_inputs), batch_data_samples=batch_data_samples
        )
        return head_inputs | self.forward_decoder(**decoder_inputs, **selected)

    def pre_transformer(
        self, mlvl_feats: tuple[Tensor, ...], batch_data_samples: list[DetDataSample] | None = None
    ) -> tuple[dict, dict]:
        """Project and flatten the maps, and compute padding masks.

        Args:
            mlvl_feats: maps (bs, in_channels[i], h, w) of the neck.
            batch_data_samples: hold ``batch_input_shape`` and ``img_shape`` of each image, (h, w) in pixels; the
                difference is padding, in which no query is selected, and which the decoder does not attend to. None: no
                padding.

        Returns:
            The inputs of :meth:`pre_decoder`: ``memory`` (bs, num_keys, embed_dims), ``memory_mask`` (bs, num_keys),
            True on padding, or None, ``spatial_shapes`` as pairs (h, w), ``valid_ratios`` (bs, num_levels, 2); and
            those of the decoder.

        Raises:
            ValueError: If the number of maps or of their channels is not the one the model was built for.
        """
        channels = tuple(feat.shape[1] for feat in mlvl_feats)
        if channels != self.map_channels:
            raise ValueError(
                f'the neck gave {len(channels)} maps of {list(channels)} channels, but in_channels='
                f'{list(self.map_channels)} were expected: make them equal'
            )
        feats = [proj(feat) for proj, feat in zip(self.input_proj, mlvl_feats, strict=False)]
        for i in range(len(feats), self.num_feature_levels):
            feats.append(self.input_proj[i](mlvl_feats[-1] if i == len(mlvl_feats) else feats[-1]))
        batch, device = feats[0].shape[0], feats[0].device
        spatial_shapes = tuple(tuple(feat.shape[-2:]) for feat in feats)
        starts = [0, *accumulate(height * width for height, width in spatial_shapes[:-1])]
        level_start_index = sizes_tensor(starts, device)
        if is_padded(batch_data_samples):
            masks, valid_ratios = padding_masks(spatial_shapes, batch, batch_data_samples, device)
            mask = torch.cat([mask.flatten(1) for mask in masks], 1)
        else:
            mask, valid_ratios = None, torch.ones(batch, len(feats), 2, device=device)
        # (bs, embed_dims, h, w) -> (bs, num_keys, embed_dims)
        memory = torch.cat([feat.flatten(2).transpose(1, 2) for feat in feats], 1)
        shared = dict(memory=memory, memory_mask=mask, spatial_shapes=spatial_shapes, valid_ratios=valid_ratios)
        return shared, dict(shared, level_start_index=level_start_index)

    def forward_encoder(self, **inputs: Tensor) -> dict:
        """Return the inputs: the neck has encoded the maps."""
        return inputs

    # Both use `memory_trans_fc` and `memory_trans_norm`.
    gen_encoder_output_proposals = DeformableDETR.gen_encoder_output_proposals

    def pre_decoder(
        self,
        memory: Tensor,
        memory_mask: Tensor | None,
        spatial_shapes: Pairs,
        valid_ratios: Tensor,
        batch_data_samples: list[DetDataSample] | None = None,
    ) -> tuple[dict, dict]:
        """Select the pixels with the highest class scores as queries, and add denoising queries in training.

        Args:
            memory, memory_mask, spatial_shapes, valid_ratios: as :meth:`pre_transformer` returns them.
            batch_data_samples: in training with ground truth, the objects of the denoising queries.

        Returns:
            The decoder's ``query`` (bs, num_queries, embed_dims), ``reference_points`` (bs, num_queries, 4) and
            ``self_attn_mask``; and, in training, the head's ``enc_outputs_class`` (bs, num_queries, num_classes),
            ``enc_outputs_coord`` (bs, num_queries, 4) and ``denoising``.

        Raises:
            ValueError: If there are more queries than pixels.
        """
        if self.num_queries > memory.shape[1]:
            raise ValueError(
                f'num_queries={self.num_queries} pixels are needed, but the maps {spatial_shapes} have only '
                f'{memory.shape[1]}: enlarge the images, or lower num_queries'
            )
        output_memory, proposals = self.gen_encoder_output_proposals(memory, memory_mask, spatial_shapes, valid_ratios)
        last = self.bbox_head.num_pred_layer - 1
        scores = self.bbox_head.cls_branches[last](output_memory)
        best = scores.max(-1).values.topk(self.num_queries, dim=1).indices[..., None]
        chosen = output_memory.gather(1, best.expand(-1, -1, output_memory.shape[-1]))
        coord_logits = self.bbox_head.reg_branches[last](chosen) + proposals.gather(1, best.expand(-1, -1, 4))

        query = (
            self.query_embedding.weight.expand(memory.shape[0], -1, -1) if self.learn_query_content else chosen.detach()
        )
        reference_logits, mask = coord_logits.detach(), None
        head_inputs = {}
        if self.training:
            denoising = self._denoising_queries(batch_data_samples)
            head_inputs = dict(
                enc_outputs_class=scores.gather(1, best.expand(-1, -1, scores.shape[-1])),
                enc_outputs_coord=coord_logits.sigmoid(),
                denoising=denoising,
            )
            if denoising is not None:
                query = torch.cat([denoising.content, query], 1)
                reference_logits = torch.cat([denoising.boxes, reference_logits], 1)
                mask = denoising.attn_mask
        return dict(query=query, reference_points=reference_logits.sigmoid(), self_attn_mask=mask), head_inputs

    def _denoising_queries(self, samples: list[DetDataSample] | None) -> DenoisingQueries | None:
        if samples is None or 'gt_instances' not in samples[0]:
            return None
        return self.bbox_head.denoising_queries(samples, self.num_queries)

    def forward_decoder(
        self,
        query: Tensor,
        memory: Tensor,
        memory_mask: Tensor | None,
        reference_points: Tensor,
        spatial_shapes: Pairs,
        level_start_index: Tensor,
        valid_ratios: Tensor,
        self_attn_mask: Tensor | None = None,
    ) -> dict:
        """Run the decoder; returns ``hidden_states`` and ``references`` as the head takes them."""
        hidden_states, references = self.decoder(
            query=query,
            value=memory,
            key_padding_mask=memory_mask,
            self_attn_mask=self_attn_mask,
            reference_points=reference_points,
            spatial_shapes=spatial_shapes,
            level_start_index=level_start_index,
            valid_ratios=valid_ratios,
            reg_branches=self.bbox_head.reg_branches,
        )
        return dict(hidden_states=hidden_states, references=references)

    def _forward(
        self, batch_inputs: Tensor, batch_data_samples: list[DetDataSample] | None = None
    ) -> tuple[Tensor, Tensor]:
        """``mode='tensor'``: logits and boxes of every decoder layer, as the head returns them."""
        outputs = self.forward_transformer(self.extract_feat(batch_inputs), batch_data_samples)
        return self.bbox_head(outputs['hidden_states'], outputs['references'])

    def fuse(self) -> 'RTDETR':
        """Fold RepVGG branches and batch norms into plain convolutions, in place, for inference.

        The results are those of ``eval()``, up to rounding. The state dict has other keys afterwards, so load a
        checkpoint before.
        """
        for part in (self.backbone, self.neck):
            if hasattr(part, 'fuse'):
                part.fuse()
        fuse_conv_bn(self)
        return self
