"""DETR: detection as set prediction, with attention over one map of the image.

Source: Carion et al., End-to-End Object Detection with Transformers, https://arxiv.org/abs/2005.12872. Modules, fields
and state-dict keys are MMDetection's. Encoder, decoder and their attention come from the registry, and the forward pass
does not synchronize with the device.
"""

import copy

from mmdet.models.detectors.detr import DETR as MMDetDETR
from mmdet.models.layers import SinePositionalEncoding
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from msda_plugin.compat import pretrained_last
from msda_plugin.detectors.build_checks import NeckInputCheck, check_given, check_parts
from msda_plugin.detectors.padding import is_padded, padding_masks
from msda_plugin.layers.detr_layers import DetrTransformerDecoder, DetrTransformerEncoder
from msda_plugin.layers.transformer_parts import build_or_default
from msda_plugin.registry import MODELS


@MODELS.register_module()
class DETR(NeckInputCheck, MMDetDETR):
    """DETR with msda_plugin's layers. Takes the config fields of MMDetection's.

    Args:
        backbone, neck: configs; the neck, or the backbone without a neck, returns one map of ``embed_dims`` channels.
        encoder, decoder: configs of :class:`DetrTransformerEncoder` and ``...Decoder``; ``type`` is optional in them,
            in ``layer_cfg`` and in its attentions.
        bbox_head: config of the head.
        positional_encoding: config; the default ``type`` is ``SinePositionalEncoding``.
        num_queries: maximum number of objects per image.
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
        check_given('DETR', parts)
        # Copies: building adds fields, and a config may be built again.
        super().__init__(
            backbone=backbone,
            neck=neck,
            num_queries=num_queries,
            train_cfg=train_cfg,
            test_cfg=test_cfg or {},
            data_preprocessor=data_preprocessor,
            init_cfg=init_cfg,
            **copy.deepcopy(parts),
        )
        self.neck_in_channels = (neck or {}).get('in_channels')
        check_parts(self, neck, 1, 'DETR takes 1 map')

    def _init_layers(self) -> None:
        self.positional_encoding = build_or_default(self.positional_encoding, SinePositionalEncoding)
        self.encoder = build_or_default(self.encoder, DetrTransformerEncoder)
        self.decoder = build_or_default(self.decoder, DetrTransformerDecoder)
        self.embed_dims = self.encoder.embed_dims
        self.query_embedding = nn.Embedding(self.num_queries, self.embed_dims)

    def init_weights(self) -> None:
        """Initialize the weights, except for parts that ``init_cfg`` loads from a file (``Pretrained``)."""
        with pretrained_last(self):
            super().init_weights()

    def pre_transformer(
        self, img_feats: tuple[Tensor, ...], batch_data_samples: list[DetDataSample] | None = None
    ) -> tuple[dict, dict]:
        """Flatten the map, and compute position embeddings and the padding mask.

        Args:
            img_feats: one map (bs, embed_dims, h, w).
            batch_data_samples: hold ``batch_input_shape`` and ``img_shape`` of each image, (h, w) in pixels; the
                difference is padding. None: no padding.

        Returns:
            The inputs of the encoder: ``feat`` and ``feat_pos`` (bs, h * w, embed_dims), ``feat_mask`` (bs, h * w),
            True on padding, or None; and those of the decoder, ``memory_pos`` and ``memory_mask``, which are the same.

        Raises:
            ValueError: If there is not exactly one map of ``embed_dims`` channels.
        """
        if len(img_feats) != 1 or img_feats[0].shape[1] != self.embed_dims:
            channels = [feat.shape[1] for feat in img_feats]
            raise ValueError(
                f'the {"neck" if self.with_neck else "backbone"} gave {len(channels)} maps of {channels} channels, but '
                f'DETR takes 1 map of embed_dims={self.embed_dims}: change the neck, or add one such as '
                'mmdet.ChannelMapper'
            )
        (feat,) = img_feats
        if is_padded(batch_data_samples):
            [mask], _ = padding_masks([feat.shape[-2:]], feat.shape[0], batch_data_samples, feat.device)
            position, mask = self.positional_encoding(mask), mask.flatten(1)
        else:
            # Without padding, positions are the same for every image.
            position, mask = self.positional_encoding(None, input=feat[:1]).expand(feat.shape[0], -1, -1, -1), None
        # (bs, embed_dims, h, w) -> (bs, h * w, embed_dims)
        feat, position = feat.flatten(2).transpose(1, 2), position.flatten(2).transpose(1, 2)
        return dict(feat=feat, feat_mask=mask, feat_pos=position), dict(memory_mask=mask, memory_pos=position)
