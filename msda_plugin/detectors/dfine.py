"""D-FINE, and DEIM's training of it.

Sources: Peng et al., D-FINE, https://arxiv.org/abs/2410.13842; Huang et al., DEIM, https://arxiv.org/abs/2412.04234.
"""

import copy

import torch
from mmcv.cnn import ConvModule, fuse_conv_bn
from mmdet.models.detectors.base_detr import DetectionTransformer
from mmdet.models.layers import CdnQueryGenerator
from mmdet.structures import DetDataSample
from mmengine.model import ModuleList, xavier_init
from torch import Tensor, nn

from msda_plugin.compat import pretrained_last
from msda_plugin.detectors.build_checks import NeckInputCheck, check_given, check_in_channels, declared_channels
from msda_plugin.detectors.deformable_detr import DeformableDETR, Pairs
from msda_plugin.detectors.padding import is_padded, padding_masks
from msda_plugin.layers.dfine_layers import DFINETransformerDecoder
from msda_plugin.layers.transformer_parts import build_or_default
from msda_plugin.registry import MODELS

DENOISING = dict(label_noise_scale=0.5, box_noise_scale=1.0, group_cfg=dict(dynamic=True, num_dn_queries=100))


@MODELS.register_module()
class DFINE(NeckInputCheck, DetectionTransformer):
    """D-FINE: query selection, a decoder that refines distributions of the box edges, and denoising queries.

    Args:
        backbone, neck: configs; the neck is a :class:`msda_plugin.necks.HybridEncoder` with ``variant='dfine'``, or
            another one with maps of the same number of channels. Other channels than the decoder's are projected.
        decoder: config of :class:`DFINETransformerDecoder`; ``type`` is optional. It sets the number of maps.
        bbox_head: config of :class:`msda_plugin.heads.DFINEHead`; the detector sets ``num_pred_layer`` and
            ``eval_layer``.
        num_queries: number of proposals that the decoder refines, and maximum number of objects per image.
        dn_cfg: config of mmdet's ``CdnQueryGenerator``, without the fields that follow from the other parts; None:
            train without denoising queries.
        train_cfg, test_cfg, data_preprocessor, init_cfg: as in MMDetection.

    Raises:
        ValueError: If parts do not fit together, or ``test_cfg.max_per_img`` exceeds the number of predicted boxes.
    """

    def __init__(
        self,
        backbone: dict,
        neck: dict | None = None,
        decoder: dict | None = None,
        bbox_head: dict | None = None,
        num_queries: int = 300,
        dn_cfg: dict | None = DENOISING,
        train_cfg: dict | None = None,
        test_cfg: dict | None = None,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        parts = dict(neck=neck, decoder=decoder, bbox_head=bbox_head)
        check_given('DFINE', parts)
        # Copies: building adds fields, and a config may be built again.
        decoder, bbox_head = copy.deepcopy(decoder), copy.deepcopy(bbox_head)
        num_layers, eval_layer = decoder.get('num_layers', 6), decoder.get('eval_layer', -1)
        bbox_head.update(num_pred_layer=num_layers + 1, eval_layer=eval_layer % num_layers)
        self.dn_cfg = copy.deepcopy(dn_cfg)
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
        self._check_parts()

    def _init_layers(self) -> None:
        self.decoder = build_or_default(self.decoder, DFINETransformerDecoder)
        self.embed_dims = embed_dims = self.decoder.embed_dims
        self.num_feature_levels = self.decoder.num_levels
        channels = getattr(self.neck, 'out_channels', embed_dims)
        self.input_proj = ModuleList(
            [
                nn.Identity()
                if channels == embed_dims
                else ConvModule(channels, embed_dims, 1, norm_cfg=dict(type='BN'), act_cfg=None)
                for _ in range(self.num_feature_levels)
            ]
        )
        self.memory_trans_fc = nn.Linear(embed_dims, embed_dims)
        self.memory_trans_norm = nn.LayerNorm(embed_dims)
        self.dn_query_generator = None
        if self.dn_cfg is not None:
            self.dn_query_generator = CdnQueryGenerator(
                num_classes=self.bbox_head.num_classes,
                embed_dims=embed_dims,
                num_matching_queries=self.num_queries,
                **self.dn_cfg,
            )

    def init_weights(self) -> None:
        """Initialize the weights, except for parts that ``init_cfg`` loads from a file (``Pretrained``)."""
        with pretrained_last(self):
            super().init_weights()
        nn.init.xavier_uniform_(self.memory_trans_fc.weight)
        for projection in self.input_proj:
            if isinstance(projection, ConvModule):
                xavier_init(projection.conv, distribution='uniform')
        if self.dn_query_generator is not None:
            nn.init.normal_(self.dn_query_generator.label_embedding.weight)

    def _check_parts(self) -> None:
        if self.bbox_head.embed_dims != self.embed_dims:
            raise ValueError(
                f'bbox_head has embed_dims={self.bbox_head.embed_dims}, but the decoder has embed_dims='
                f'{self.embed_dims}: make them equal'
            )
        num_outs = getattr(self.neck, 'num_outs', self.num_feature_levels)
        if num_outs != self.num_feature_levels:
            raise ValueError(
                f'the neck gives {num_outs} maps, but num_points of the decoder has {self.num_feature_levels} values: '
                'give it one value per map'
            )
        if (channels := declared_channels(self.backbone)) is not None:
            check_in_channels(channels, self.neck_in_channels)
        num_boxes = self.num_queries * self.bbox_head.num_classes
        max_per_img = self.test_cfg.get('max_per_img', self.num_queries)
        if max_per_img > num_boxes:
            raise ValueError(
                f'test_cfg.max_per_img={max_per_img} asks for more boxes than there are: num_queries='
                f'{self.num_queries} x {self.bbox_head.num_classes} classes = {num_boxes}; lower max_per_img, or raise '
                'num_queries'
            )

    def forward_transformer(
        self, img_feats: tuple[Tensor, ...], batch_data_samples: list[DetDataSample] | None = None
    ) -> dict:
        """Maps of the neck -> inputs of the head."""
        encoder_inputs, decoder_inputs = self.pre_transformer(img_feats, batch_data_samples)
        queries, head_inputs = self.pre_decoder(
            **self.forward_encoder(**encoder_inputs), batch_data_samples=batch_data_samples
        )
        return self.forward_decoder(**queries, **decoder_inputs) | head_inputs

    def pre_transformer(
        self, img_feats: tuple[Tensor, ...], batch_data_samples: list[DetDataSample] | None = None
    ) -> tuple[dict, dict]:
        """Flatten the maps.

        Args:
            img_feats: num_feature_levels maps (bs, channels, h, w).
            batch_data_samples: hold ``batch_input_shape`` and ``img_shape`` of each image, (h, w) in pixels; the
                difference is padding. None: no padding.

        Returns:
            The arguments of :meth:`forward_encoder`, and those of :meth:`forward_decoder` without the queries.

        Raises:
            ValueError: If the number of maps or of their channels is not the one the model was built for.
        """
        if len(img_feats) != self.num_feature_levels:
            raise ValueError(
                f'the neck gave {len(img_feats)} maps, but num_points of the decoder has {self.num_feature_levels} '
                'values: give it one value per map'
            )
        maps = [projection(x) for projection, x in zip(self.input_proj, img_feats, strict=True)]
        if any(x.shape[1] != self.embed_dims for x in maps):
            raise ValueError(
                f'the neck gave maps of {[x.shape[1] for x in maps]} channels, but embed_dims={self.embed_dims} are '
                'needed: change out_channels of the neck'
            )
        spatial_shapes = tuple(tuple(x.shape[-2:]) for x in maps)
        memory = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)
        memory_mask = valid_ratios = None
        if is_padded(batch_data_samples):
            masks, valid_ratios = padding_masks(spatial_shapes, batch_data_samples, memory.device)
            memory_mask = torch.cat([mask.flatten(1) for mask in masks], 1)
        shared = dict(spatial_shapes=spatial_shapes, valid_ratios=valid_ratios)
        return dict(memory=memory, memory_mask=memory_mask, **shared), shared

    def forward_encoder(self, **inputs: object) -> dict:
        """Return the arguments: the encoder is in the neck."""
        return inputs

    gen_encoder_output_proposals = DeformableDETR.gen_encoder_output_proposals

    def pre_decoder(
        self,
        memory: Tensor,
        memory_mask: Tensor | None,
        spatial_shapes: Pairs,
        valid_ratios: Tensor | None,
        batch_data_samples: list[DetDataSample] | None = None,
    ) -> tuple[dict, dict]:
        """Select the proposals with the highest class scores as queries, and in training add denoising queries.

        Args:
            memory: (bs, num_keys, embed_dims).
            memory_mask: (bs, num_keys), True on padding; None: no padding.
            spatial_shapes: (h, w) of each level.
            valid_ratios: (bs, num_levels, 2), the unpadded share of each level's width and height; None: no padding.
            batch_data_samples: with ``gt_instances``, in training.

        Returns:
            The decoder's ``query`` (bs, num_queries, embed_dims), ``boxes`` (bs, num_queries, 4), ``memory`` and
            ``self_attn_mask``; and, in training, the head's ``enc_outputs_class``, ``enc_outputs_coord`` and
            ``dn_meta``.

        Raises:
            ValueError: If there are more queries than pixels.
        """
        if self.num_queries > memory.shape[1]:
            raise ValueError(
                f'num_queries={self.num_queries} proposals are needed, but the maps {spatial_shapes} have '
                f'only {memory.shape[1]} pixels: enlarge the images, or lower num_queries'
            )
        if valid_ratios is None:
            valid_ratios = memory.new_ones(1, len(spatial_shapes), 2)
        output_memory, proposals = self.gen_encoder_output_proposals(memory, memory_mask, spatial_shapes, valid_ratios)
        enc_class = self.bbox_head.cls_branches[-1](output_memory)
        best = enc_class.amax(-1).topk(self.num_queries, dim=1).indices[..., None]
        query = output_memory.gather(1, best.expand(-1, -1, self.embed_dims))
        anchors = proposals.expand(len(memory), -1, -1).gather(1, best.expand(-1, -1, 4))
        enc_coord = (self.bbox_head.reg_branches[-1](query) + anchors).sigmoid()
        query, boxes, mask = query.detach(), enc_coord.detach(), None
        head_inputs = {}
        if self.training:
            enc_class = enc_class.gather(1, best.expand(-1, -1, enc_class.shape[-1]))
            head_inputs = dict(enc_outputs_class=enc_class, enc_outputs_coord=enc_coord)
            if self.dn_query_generator is not None:
                dn_query, dn_boxes, mask, head_inputs['dn_meta'] = self.dn_query_generator(batch_data_samples)
                # Without objects there are no denoising queries, but the embedding needs a gradient.
                query = query + 0 * self.dn_query_generator.label_embedding.weight.sum()
                query = torch.cat([dn_query, query], 1)
                boxes = torch.cat([dn_boxes.sigmoid(), boxes], 1)
        return dict(query=query, boxes=boxes, memory=memory, self_attn_mask=mask), head_inputs

    def forward_decoder(
        self,
        query: Tensor,
        boxes: Tensor,
        memory: Tensor,
        self_attn_mask: Tensor | None,
        spatial_shapes: Pairs,
        valid_ratios: Tensor | None,
    ) -> dict:
        """Run the decoder on the outputs of :meth:`pre_decoder`; returns the arguments of the head's ``forward``."""
        hidden_states, references, distributions, initial_boxes = self.decoder(
            query,
            boxes,
            memory,
            spatial_shapes,
            self.bbox_head.initial_boxes,
            self.bbox_head.refine,
            valid_ratios,
            self_attn_mask,
        )
        return dict(
            hidden_states=hidden_states, references=references, distributions=distributions, initial_boxes=initial_boxes
        )

    def _forward(
        self, batch_inputs: Tensor, batch_data_samples: list[DetDataSample] | None = None
    ) -> tuple[Tensor, Tensor]:
        """``mode='tensor'``: logits and boxes of the decoder layers, as the head returns them."""
        outputs = self.forward_transformer(self.extract_feat(batch_inputs), batch_data_samples)
        return self.bbox_head(
            **{name: outputs[name] for name in ('hidden_states', 'references', 'distributions', 'initial_boxes')}
        )

    def fuse(self) -> 'DFINE':
        """Fold RepVGG branches and batch norms, and remove what only the training needs, in place.

        The results are those of ``eval()``, up to rounding. The state dict has other keys afterwards, so load a
        checkpoint before.
        """
        self.eval()
        fuse_conv_bn(self.backbone)
        fuse_conv_bn(self.input_proj)
        if hasattr(self.neck, 'fuse'):
            self.neck.fuse()
        self.decoder.layers = self.decoder.layers[: self.decoder.eval_layer + 1]
        self.bbox_head.fuse()
        self.dn_query_generator = None
        return self
