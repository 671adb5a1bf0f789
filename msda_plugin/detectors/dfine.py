"""D-FINE, and DEIM, which trains it differently.

Sources: Peng et al., D-FINE, https://arxiv.org/abs/2410.13842; Huang et al., DEIM, https://arxiv.org/abs/2412.04234.
"""

import copy
from collections.abc import Sequence

from mmdet.structures import DetDataSample
from torch import Tensor

from msda_plugin.detectors.build_checks import check_given
from msda_plugin.detectors.deformable_detr import Pairs
from msda_plugin.detectors.rtdetr import RTDETR
from msda_plugin.layers.dfine_layers import DFINETransformerDecoder
from msda_plugin.registry import MODELS

DENOISING = dict(num_denoising=100, label_noise_ratio=0.5, box_noise_scale=1.0)


@MODELS.register_module()
class DFINE(RTDETR):
    """D-FINE: RT-DETR with a decoder that refines distributions of the box edges.

    Args:
        backbone: config.
        neck: config, such as :class:`HybridEncoder` with ``variant='dfine'``.
        decoder: config of :class:`DFINETransformerDecoder`; ``type`` is optional. Its ``num_points`` has one value for
            each map that the decoder attends to; those beyond the neck's maps come from convolutions of stride 2.
        bbox_head: config of :class:`DFINEHead`; the detector sets ``num_pred_layer``, ``eval_layer`` and ``dn_cfg``.
        num_queries: maximum number of objects per image.
        in_channels: channels of the neck's maps; None: ``out_channels`` of the neck for each. Maps of other channels
            than the decoder's are projected.
        dn_cfg: fields of :class:`ContrastiveDenoising`; None: training without denoising queries.
        train_cfg, test_cfg, data_preprocessor, init_cfg: as in MMDetection.

    Raises:
        ValueError: If parts do not fit together, or ``test_cfg.max_per_img`` exceeds the number of predicted boxes.
    """

    decoder_class = DFINETransformerDecoder

    def __init__(
        self,
        backbone: dict,
        neck: dict | None = None,
        decoder: dict | None = None,
        bbox_head: dict | None = None,
        num_queries: int = 300,
        in_channels: Sequence[int] | None = None,
        dn_cfg: dict | None = DENOISING,
        train_cfg: dict | None = None,
        test_cfg: dict | None = None,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        check_given('DFINE', {'neck': neck, 'decoder': decoder, 'bbox_head': bbox_head})
        num_layers, num_points = decoder.get('num_layers', 6), decoder.get('num_points', (3, 6, 3))
        if num_layers < 1:
            raise ValueError(f'decoder.num_layers is {num_layers}; expected at least 1')
        bbox_head = copy.deepcopy(bbox_head)
        bbox_head['eval_layer'] = decoder.get('eval_layer', -1) % num_layers
        super().__init__(
            backbone=backbone,
            neck=neck,
            decoder=decoder,
            bbox_head=bbox_head,
            num_queries=num_queries,
            num_feature_levels=len(num_points) if isinstance(num_points, Sequence) else 3,  # the layer refuses numbers
            in_channels=in_channels,
            project_inputs=False,
            dn_cfg=dn_cfg,
            train_cfg=train_cfg,
            test_cfg=test_cfg,
            data_preprocessor=data_preprocessor,
            init_cfg=init_cfg,
        )

    def _check_levels(self) -> None:
        if self.num_feature_levels < len(self.map_channels):
            raise ValueError(
                f'num_points of the decoder has {self.num_feature_levels} values, but the neck gives '
                f'{len(self.map_channels)} maps: give it one value per map'
            )

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
        """Run the decoder; returns the arguments of the head's ``forward``."""
        if memory_mask is None:
            valid_ratios = None
        else:
            memory = memory.masked_fill(memory_mask[..., None], 0)
        names = ('hidden_states', 'references', 'distributions', 'initial_boxes')
        outputs = self.decoder(
            query,
            reference_points,
            memory,
            spatial_shapes,
            self.bbox_head.initial_boxes,
            self.bbox_head.refine,
            valid_ratios,
            self_attn_mask,
        )
        return dict(zip(names, outputs, strict=True))

    def _forward(
        self, batch_inputs: Tensor, batch_data_samples: list[DetDataSample] | None = None
    ) -> tuple[Tensor, Tensor]:
        """``mode='tensor'``: logits and boxes of the decoder layers, as the head returns them."""
        outputs = self.forward_transformer(self.extract_feat(batch_inputs), batch_data_samples)
        return self.bbox_head(outputs['hidden_states'], outputs['references'], outputs['distributions'])

    def fuse(self) -> 'DFINE':
        """Fold RepVGG branches and batch norms, and remove what only the training needs, in place, for inference.

        The results are those of ``eval()``, up to rounding. The state dict has other keys afterwards, so load a
        checkpoint before.
        """
        self.eval()
        super().fuse()
        self.decoder.layers = self.decoder.layers[: self.decoder.eval_layer + 1]
        self.bbox_head.fuse()
        return self
