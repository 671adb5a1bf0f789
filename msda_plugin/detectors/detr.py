"""DETR: detection as the prediction of a set, by attention over one map of the image.

Source: Carion et al., End-to-End Object Detection with Transformers, https://arxiv.org/abs/2005.12872. Modules, fields
and state-dict keys are MMDetection's; here encoder, decoder and their attention come from the registry, and no forward
waits for the device.
"""

import copy

from mmdet.models.detectors.detr import DETR as MMDetDETR
from mmdet.models.layers import SinePositionalEncoding
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from msda_plugin.compat import pretrained_last
from msda_plugin.detectors.build_checks import check_given, check_parts
from msda_plugin.detectors.padding import is_padded, padding_masks
from msda_plugin.layers.detr_layers import DetrTransformerDecoder, DetrTransformerEncoder
from msda_plugin.layers.transformer_parts import build_or_default
from msda_plugin.registry import MODELS


@MODELS.register_module()
class DETR(MMDetDETR):
    """DETR on our layers. A config of MMDetection's becomes ours by its types.

    Args:
        backbone, neck: configs; the last of them gives one map of ``embed_dims`` channels.
        encoder, decoder: configs of :class:`DetrTransformerEncoder` and ``...Decoder``; ``type`` is optional, also that
            of ``layer_cfg`` and of the attentions in it.
        bbox_head: config of the head.
        positional_encoding: config; without ``type`` a ``SinePositionalEncoding``.
        num_queries: how many objects a picture can have at most.
        train_cfg, test_cfg, data_preprocessor, init_cfg: as in MMDetection.

    Raises:
        ValueError: parts do not fit one another, or ``test_cfg.max_per_img`` asks for more boxes than there are.
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
        # Copies: building fills in fields, and a config may be built again.
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
        check_parts(self, neck, 1, 'DETR takes 1 map')

    def _init_layers(self) -> None:
        self.positional_encoding = build_or_default(self.positional_encoding, SinePositionalEncoding)
        self.encoder = build_or_default(self.encoder, DetrTransformerEncoder)
        self.decoder = build_or_default(self.decoder, DetrTransformerDecoder)
        self.embed_dims = self.encoder.embed_dims
        self.query_embedding = nn.Embedding(self.num_queries, self.embed_dims)

    def init_weights(self) -> None:
        """Initialise the weights; what ``init_cfg`` wants loaded (``Pretrained``) stays as loaded."""
        with pretrained_last(self):
            super().init_weights()

    def pre_transformer(
        self, img_feats: tuple[Tensor, ...], batch_data_samples: list[DetDataSample] | None = None
    ) -> tuple[dict, dict]:
        """Flatten the map, and embed and mask its pixels.

        Args:
            img_feats: one map (bs, embed_dims, h, w).
            batch_data_samples: give ``batch_input_shape`` and each ``img_shape``, (h, w) in pixels: what lies beyond is
                padding. None: there is no padding.

        Returns:
            The inputs of the encoder: ``feat`` and ``feat_pos`` (bs, h * w, embed_dims), ``feat_mask`` (bs, h * w),
            True on padding, or None; and those of the decoder, ``memory_pos`` and ``memory_mask``, which are the same.

        Raises:
            ValueError: there is another number of maps, or the map has another number of channels.
        """
        if len(img_feats) != 1 or img_feats[0].shape[1] != self.embed_dims:
            channels = [feat.shape[1] for feat in img_feats]
            raise ValueError(
                f'the neck gave {len(channels)} maps of {channels} channels, but DETR takes 1 map of '
                f'embed_dims={self.embed_dims}'
            )
        (feat,) = img_feats
        if is_padded(batch_data_samples):
            [mask], _ = padding_masks([feat.shape[-2:]], batch_data_samples, feat.device)
            position, mask = self.positional_encoding(mask), mask.flatten(1)
        else:
            # The same for every image.
            position, mask = self.positional_encoding(None, input=feat[:1]).expand(len(feat), -1, -1, -1), None
        # (bs, embed_dims, h, w) -> (bs, h * w, embed_dims)
        feat, position = feat.flatten(2).transpose(1, 2), position.flatten(2).transpose(1, 2)
        return dict(feat=feat, feat_mask=mask, feat_pos=position), dict(memory_mask=mask, memory_pos=position)
