"""A detector as a function of raw images, with its pre- and post-processing: what an exported file computes.

Of Grounding DINO, it is the image backbone and the neck: everything after them needs the text.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from mmdet.models.dense_heads import DETRHead, RPNHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.dense_heads.mask2former_head import Mask2FormerHead
from mmdet.models.detectors import GroundingDINO, MaskFormer, SingleStageDetector, TwoStageDetector
from mmdet.models.detectors.base_detr import DetectionTransformer
from mmdet.models.roi_heads import StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.models.seg_heads import MaskFormerFusionHead
from torch import Tensor, nn
from torch.nn import functional as F

from msda_plugin.acceleration.convert_model import stock_class
from msda_plugin.detectors.build_checks import NeckInputCheck
from msda_plugin.export.card import Size, tensors
from msda_plugin.export.masks import bounding_boxes, paste
from msda_plugin.export.roi_align import align_rois
from msda_plugin.export.suppression import NO_SCORE, keep_best
from msda_plugin.heads.box_ops import box_cxcywh_to_xyxy
from msda_plugin.heads.set_prediction import SetPrediction
from msda_plugin.layers.reference_points import sizes_tensor

Detections = tuple[Tensor, ...]  # boxes, scores and labels, and masks if the detector predicts them
Samples = list[SimpleNamespace]


class CannotExportError(ValueError):
    """A detector, or a part of it, that cannot be exported."""


class DeployableDetector(nn.Module):
    """Raw images in, detections out; made of plain tensor operations, so that it can be exported.

    Args:
        model: A detector of MMDetection or msda_plugin, from `msda_plugin.engine.inference.load_detector`: a detection
            transformer, a detector with a dense head such as RetinaNet, Faster R-CNN, Mask R-CNN, or Mask2Former for
            instance segmentation; or Grounding DINO, whose image features are computed.

    Raises:
        CannotExportError: If the detector, its head or its preprocessor is of another kind.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._predict = _predictor(model)
        preprocessor = model.data_preprocessor
        if not hasattr(preprocessor, 'pad_size_divisor') or not hasattr(preprocessor, '_channel_conversion'):
            raise CannotExportError(
                f'the data_preprocessor is a {type(preprocessor).__name__}; expected a DetDataPreprocessor'
            )
        # Files are read as BGR, and a model that converts them was trained on RGB.
        self.bgr = not preprocessor._channel_conversion
        self.divisor, self.pad_value = preprocessor.pad_size_divisor, float(preprocessor.pad_value)
        mean, std = torch.zeros(3), torch.ones(3)
        if preprocessor._enable_normalize:
            mean, std = preprocessor.mean.flatten().cpu(), preprocessor.std.flatten().cpu()
        self.register_buffer('mean', mean.view(-1, 1, 1).clone(), persistent=False)
        self.register_buffer('std', std.view(-1, 1, 1).clone(), persistent=False)

    @property
    def detects(self) -> bool:
        """Whether the outputs are detections; those of Grounding DINO are the feature maps of its neck."""
        return not isinstance(self.model, GroundingDINO)

    @property
    def note(self) -> str:
        """What is not in the graph; empty for a whole detector."""
        if self.detects:
            return ''
        return (
            f'image backbone and neck of {type(self.model).__name__}; the language model, the encoder that fuses text '
            'and image, and the decoder are not in the file'
        )

    def tensors(self, batch: int | None, size: Size | None) -> tuple[dict[str, dict], dict[str, dict]]:
        """Shape and dtype of the inputs and outputs by name, as in a card; None is any size."""
        if self.detects:
            return tensors(batch, size, self.max_detections, self.predicts_masks)
        inputs, _ = tensors(batch, size, 0)
        with torch.no_grad():
            *maps, mask = self(torch.zeros(1, *(size or (64, 64)), 3, dtype=torch.uint8))
        sides = [list(part.shape[-2:]) if size else [None, None] for part in (*maps, mask)]
        outputs = {
            f'features_{level}': dict(shape=[batch, part.shape[1], *side], dtype='float32')
            for level, (part, side) in enumerate(zip(maps, sides, strict=False))
        }
        return inputs, outputs | dict(padding_mask=dict(shape=[batch, *sides[-1]], dtype='bool'))

    @property
    def max_detections(self) -> int:
        """Number of rows of the outputs; 0 if they are no detections."""
        if not self.detects:
            return 0
        if isinstance(self.model, MaskFormer):
            return _mask2former_count(self.model)
        head = self.model.roi_head if hasattr(self.model, 'roi_head') else self.model.bbox_head
        cfg = head.test_cfg
        return cfg.get('max_per_img') or self.model.num_queries

    @property
    def predicts_masks(self) -> bool:
        """Whether the outputs contain masks."""
        return isinstance(self.model, MaskFormer) or getattr(self.model, 'with_mask', False)

    @property
    def pad_color(self) -> tuple[int, ...]:
        """RGB color, 0-255, of a pixel that equals the detector's padding after normalization."""
        color = (self.mean + self.std * self.pad_value).flatten().round().clamp(0, 255).int().tolist()
        return tuple(color[::-1] if self.bgr else color)

    def check_size(self, size: tuple[int, int] | None) -> None:
        """Raise CannotExportError for images (height, width), None if of any size, that need a mask of padding."""
        transformer = self.detects and isinstance(self.model, DetectionTransformer)
        masked = transformer and not isinstance(self.model, NeckInputCheck)
        if masked and any(side is None or side % self.divisor for side in size or (None,)) and self.divisor > 1:
            raise CannotExportError(
                f'{type(self.model).__name__} pads images to multiples of {self.divisor}, and MMDetection leaves the '
                'mask of the padding out of exported graphs; choose --size with sides that are multiples of '
                f'{self.divisor}'
            )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Detect objects, or compute the features of Grounding DINO.

        Args:
            images: (bs, height, width, 3) uint8, RGB, resized as in the config. Normalization, order of channels and
                padding to a multiple of ``pad_size_divisor`` are part of this function.

        Returns:
            ``boxes`` (bs, n, 4) float32, x1 y1 x2 y2 in pixels of ``images``; ``scores`` (bs, n) float32, 0-1, from
            high to low; ``labels`` (bs, n) int64; and ``masks`` (bs, n, height, width) bool if :attr:`predicts_masks`.
            n is the maximum number of detections per image; the rows after the last detection have label -1, score 0,
            box 0, and an empty mask. Of Grounding DINO, the maps (bs, channels, h, w) float32 of the neck, fine to
            coarse, and ``padding_mask`` (bs, padded height, padded width) bool, True on padding.
        """
        height, width = images.shape[1], images.shape[2]
        inputs = images.permute(0, 3, 1, 2).contiguous()  # mmcv's RoIAlign misreads channels-last maps on the CPU
        if self.bgr:
            inputs = inputs.flip(1)
        inputs = (inputs.float() - self.mean) / self.std
        if self.divisor > 1:
            inputs = F.pad(inputs, (0, -width % self.divisor, 0, -height % self.divisor), value=self.pad_value)
        sample = SimpleNamespace(
            img_shape=(height, width),
            ori_shape=(height, width),
            batch_input_shape=(inputs.shape[2], inputs.shape[3]),
            pad_shape=(inputs.shape[2], inputs.shape[3]),
            scale_factor=(1.0, 1.0),
        )
        sample.metainfo = vars(sample).copy()
        outputs = self._predict(self.model, inputs, [sample])
        return tuple(output.float() if output.is_floating_point() else output for output in outputs)


def _predictor(model: nn.Module) -> Callable[[nn.Module, Tensor, Samples], Detections]:
    """The function that computes the outputs of a model."""
    if isinstance(model, GroundingDINO):
        return _image_features
    if isinstance(model, DetectionTransformer):
        head = model.bbox_head
        own = type(head)._predict_by_feat_single
        if own not in (DETRHead._predict_by_feat_single, SetPrediction._predict_by_feat_single):
            raise CannotExportError(
                f'{type(head).__name__} computes its detections in a way of its own, which cannot be exported'
            )
        return _detection_transformer
    if isinstance(model, TwoStageDetector):
        _check_dense_head(model.rpn_head)
        _check_roi_head(model.roi_head)
        return _two_stage_detector
    if isinstance(model, SingleStageDetector) and hasattr(model, 'bbox_head'):
        _check_dense_head(model.bbox_head)
        return _dense_detector
    if isinstance(model, MaskFormer):
        _check_mask2former(model)
        return _mask2former
    raise CannotExportError(
        f'{type(model).__name__} cannot be exported; expected a detection transformer, a detector with a dense head '
        'such as RetinaNet, Faster R-CNN, Mask R-CNN, or Mask2Former'
    )


def _clip(boxes: Tensor, sample: SimpleNamespace) -> Tensor:
    """Boxes (..., 4), xyxy, inside the image."""
    return torch.minimum(boxes.clamp(min=0), _image_sides(sample, boxes))


def _image_sides(sample: SimpleNamespace, boxes: Tensor) -> Tensor:
    """(width, height, width, height) of the image, in the dtype of boxes (..., 4)."""
    height, width = sample.img_shape
    return sizes_tensor([width, height, width, height], boxes.device).to(boxes.dtype)


def _nms_threshold(cfg: dict) -> float | None:
    """IoU threshold of the suppression in a test_cfg; None if it has none.

    Raises:
        CannotExportError: If it is another kind of suppression.
    """
    nms = cfg.get('nms')
    if nms is None:
        return None
    if nms.get('type', 'nms') != 'nms' or nms.get('class_agnostic') or nms.get('offset'):
        raise CannotExportError(
            f"test_cfg.nms is {dict(nms)}; only dict(type='nms', iou_threshold=…) within each class can be exported"
        )
    return float(nms.get('iou_threshold', nms.get('iou_thr')))


# ---- detection transformers -----------------------------------------------------------------------------------------
def _detection_transformer(model: DetectionTransformer, inputs: Tensor, samples: Samples) -> Detections:
    head = model.bbox_head
    outputs = head(**model.forward_transformer(model.extract_feat(inputs), samples))
    logits, boxes = outputs[0][-1].float(), outputs[1][-1].float()  # of the last layer
    count = head.test_cfg.get('max_per_img', logits.shape[1])
    if head.loss_cls.use_sigmoid:
        scores, index = logits.sigmoid().flatten(1).topk(count, 1)
        labels = index % head.num_classes
        query = index // head.num_classes
    else:
        scores, labels = logits.softmax(-1)[..., :-1].max(-1)
        scores, query = scores.topk(count, 1)
        labels = labels.gather(1, query)
    boxes = box_cxcywh_to_xyxy(boxes.gather(1, query[..., None].expand(-1, -1, 4)))
    boxes = _clip(boxes * _image_sides(samples[0], boxes), samples[0])
    threshold = _nms_threshold(head.test_cfg)
    return (boxes, scores, labels) if threshold is None else keep_best(boxes, scores, labels, count, threshold)


# ---- Grounding DINO -------------------------------------------------------------------------------------------------
def _image_features(model: GroundingDINO, inputs: Tensor, samples: Samples) -> tuple[Tensor, ...]:
    (height, width), (rows, columns) = samples[0].img_shape, samples[0].batch_input_shape
    below = torch.arange(rows, device=inputs.device) >= height
    right = torch.arange(columns, device=inputs.device) >= width
    return *model.extract_feat(inputs), (below[:, None] | right).expand(inputs.shape[0], -1, -1)


# ---- dense heads ----------------------------------------------------------------------------------------------------
def _check_dense_head(head: nn.Module) -> None:
    kept = ('predict', 'predict_by_feat', '_predict_by_feat_single', '_bbox_post_process')
    base = RPNHead if isinstance(head, RPNHead) else BaseDenseHead
    if not isinstance(head, BaseDenseHead) or any(
        getattr(type(head), name) is not getattr(base, name) for name in kept
    ):
        raise CannotExportError(
            f'{type(head).__name__} computes its detections in a way of its own, which cannot be exported'
        )
    _nms_threshold(head.test_cfg)


def _dense_candidates(
    head: BaseDenseHead, feats: tuple[Tensor, ...], sample: SimpleNamespace, cfg: dict
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best boxes of each level: boxes (bs, n, 4), scores (bs, n), labels (bs, n), levels (n,)."""
    maps, deltas, *factors = head(feats)
    batch = maps[0].shape[0]
    priors = head.prior_generator.grid_priors(
        [level.shape[-2:] for level in maps], dtype=maps[0].dtype, device=maps[0].device
    )
    found = []
    for number, (level, delta, prior) in enumerate(zip(maps, deltas, priors, strict=True)):
        logits = level.permute(0, 2, 3, 1).reshape(batch, -1, head.cls_out_channels).float()
        scores = logits.sigmoid() if head.use_sigmoid_cls else logits.softmax(-1)[..., :-1]
        num_classes = scores.shape[-1]
        scores = scores.flatten(1)  # (bs, priors * classes)
        count = cfg.get('nms_pre', -1)
        count = scores.shape[1] if count <= 0 else _at_most(count, scores.shape[1])
        scores, index = scores.topk(count, 1)
        place = index // num_classes
        delta = delta.permute(0, 2, 3, 1).reshape(batch, -1, head.bbox_coder.encode_size).float()
        delta = delta.gather(1, place[..., None].expand(-1, -1, delta.shape[-1]))
        prior = prior.float()[place.flatten()]
        boxes = head.bbox_coder.decode(prior, delta.flatten(0, 1)).view(batch, -1, 4)
        scores = torch.where(scores > cfg.get('score_thr', 0), scores, NO_SCORE)
        if factors:
            factor = factors[0][number].permute(0, 2, 3, 1).reshape(batch, -1).float().sigmoid().gather(1, place)
            scores = torch.where(scores > NO_SCORE, scores * factor, NO_SCORE)
        found.append((_clip(boxes, sample), scores, index % num_classes, torch.full_like(index, number)))
    boxes, scores, labels, levels = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    smallest = cfg.get('min_bbox_size', -1)
    if smallest >= 0:
        large = ((boxes[..., 2:] - boxes[..., :2]) > smallest).all(-1)
        scores = torch.where(large, scores, NO_SCORE)
    return boxes, scores, labels, levels


def _at_most(count: int, available: int | Tensor) -> int | Tensor:
    if isinstance(available, Tensor):
        return torch.minimum(torch.tensor(count), available)
    return torch.sym_min(count, available)


def _dense_detector(model: SingleStageDetector, inputs: Tensor, samples: Samples) -> Detections:
    head = model.bbox_head
    boxes, scores, labels, _ = _dense_candidates(head, model.extract_feat(inputs), samples[0], head.test_cfg)
    return keep_best(boxes, scores, labels, head.test_cfg.max_per_img, _nms_threshold(head.test_cfg))


# ---- Faster R-CNN and Mask R-CNN ------------------------------------------------------------------------------------
def _check_roi_head(head: nn.Module) -> None:
    if type(head) is not StandardRoIHead or type(head.bbox_roi_extractor) is not SingleRoIExtractor:
        raise CannotExportError(f'{type(head).__name__} cannot be exported; expected the RoI head of Faster R-CNN')
    if head.with_mask:
        _check_mask_head(head)
    box_head = type(head.bbox_head)
    own = any(
        getattr(box_head, name) is not getattr(BBoxHead, name)
        for name in ('predict_by_feat', '_predict_by_feat_single')
    )
    if own or head.bbox_head.custom_cls_channels or not head.bbox_head.with_reg:
        raise CannotExportError(
            f'{box_head.__name__} computes its detections in a way of its own, which cannot be exported'
        )
    _nms_threshold(head.test_cfg)


def _check_mask_head(head: StandardRoIHead) -> None:
    if type(head.mask_head) is not FCNMaskHead or type(head.mask_roi_extractor) is not SingleRoIExtractor:
        raise CannotExportError(
            f'{type(head.mask_head).__name__} cannot be exported; expected the mask head of Mask R-CNN, with a '
            'SingleRoIExtractor'
        )
    if head.test_cfg.mask_thr_binary < 0:
        raise CannotExportError(
            f'test_cfg.rcnn.mask_thr_binary is {head.test_cfg.mask_thr_binary}; only binary masks can be exported: '
            'choose a threshold of at least 0'
        )


def _two_stage_detector(model: TwoStageDetector, inputs: Tensor, samples: Samples) -> Detections:
    feats, cfg = model.extract_feat(inputs), model.rpn_head.test_cfg
    boxes, scores, _, levels = _dense_candidates(model.rpn_head, feats, samples[0], cfg)
    rois, _, found = keep_best(boxes, scores, levels, cfg.max_per_img, _nms_threshold(cfg))
    batch, count = rois.shape[0], rois.shape[1]
    pooled = _pool(model.roi_head, model.roi_head.bbox_roi_extractor, feats, rois)
    head, cfg = model.roi_head.bbox_head, model.roi_head.test_cfg
    logits, deltas = head(pooled)
    scores = logits.float().softmax(-1)[:, :-1]
    num_classes = scores.shape[1]
    scores = torch.where(scores > cfg.score_thr, scores, NO_SCORE).view(batch, count, num_classes)
    scores = torch.where(found[..., None] >= 0, scores, NO_SCORE)  # the last rows may be empty
    kinds = 1 if head.reg_class_agnostic else num_classes
    starts = rois.flatten(0, 1)[:, None].expand(-1, kinds, 4).reshape(-1, 4)
    boxes = head.bbox_coder.decode(starts, deltas.float().reshape(-1, 4)).view(batch, count, kinds, 4)
    boxes = _clip(boxes, samples[0]).expand(-1, -1, num_classes, 4)
    labels = torch.arange(num_classes, device=boxes.device).expand_as(scores)
    found = keep_best(boxes.flatten(1, 2), scores.flatten(1), labels.flatten(1), cfg.max_per_img, _nms_threshold(cfg))
    return (*found, _roi_masks(model.roi_head, feats, found, samples[0])) if model.roi_head.with_mask else found


def _pool(head: StandardRoIHead, extractor: SingleRoIExtractor, feats: tuple[Tensor, ...], boxes: Tensor) -> Tensor:
    """Features of the boxes (bs, n, 4): (bs * n, channels, h, w)."""
    image = torch.arange(boxes.shape[0], device=boxes.device).to(boxes.dtype).view(-1, 1, 1)
    rois = torch.cat([image.expand(-1, boxes.shape[1], 1), boxes], -1).flatten(0, 1)
    pooled = align_rois(extractor, feats, rois)
    return head.shared_head(pooled) if head.with_shared_head else pooled


def _roi_masks(
    head: StandardRoIHead, feats: tuple[Tensor, ...], found: tuple[Tensor, Tensor, Tensor], sample: SimpleNamespace
) -> Tensor:
    """Masks (bs, n, height, width) bool of the detections."""
    boxes, _, labels = found
    maps = head.mask_head(_pool(head, head.mask_roi_extractor, feats, boxes)).float()
    if head.mask_head.class_agnostic:
        maps = maps[:, 0]
    else:
        row = torch.arange(maps.shape[0], device=maps.device)
        maps = maps[row, labels.flatten().clamp(min=0)]
    empty = labels.flatten()[:, None] < 0
    corners = torch.where(empty, torch.ones(4, device=boxes.device).cumsum(0), boxes.flatten(0, 1))  # of size > 0
    masks = paste(maps.sigmoid(), corners, *sample.img_shape) >= head.test_cfg.mask_thr_binary
    return (masks & ~empty[..., None]).unflatten(0, labels.shape)


# ---- Mask2Former ----------------------------------------------------------------------------------------------------
def _check_mask2former(model: MaskFormer) -> None:
    head, fusion = model.panoptic_head, model.panoptic_fusion_head
    if type(head) is not Mask2FormerHead or stock_class(fusion) is not MaskFormerFusionHead:
        raise CannotExportError(
            f'{type(model).__name__} with {type(head).__name__} and {type(fusion).__name__} cannot be exported; '
            'expected those of Mask2Former'
        )
    if not fusion.test_cfg.get('instance_on', False):
        raise CannotExportError(
            'test_cfg.instance_on is False, and only instances can be exported, no panoptic segmentation; set it to '
            'True, or choose a model for instance segmentation'
        )


def _mask2former_count(model: MaskFormer) -> int:
    return model.panoptic_fusion_head.test_cfg.get('max_per_image', 100)


def _mask2former(model: MaskFormer, inputs: Tensor, samples: Samples) -> Detections:
    head, fusion = model.panoptic_head, model.panoptic_fusion_head
    logits, maps = (outputs[-1].float() for outputs in head(model.extract_feat(inputs), samples))
    num_classes = fusion.num_classes
    scores, index = logits.softmax(-1)[..., :-1].flatten(1).topk(_mask2former_count(model), 1)
    labels, query = index % num_classes, index // num_classes
    image = torch.arange(maps.shape[0], device=maps.device)[:, None]
    (height, width), padded = samples[0].img_shape, samples[0].batch_input_shape
    maps = F.interpolate(maps[image, query], size=padded, mode='bilinear', align_corners=False)
    maps = maps[:, :, :height, :width]
    masks = maps > 0
    # The mean probability of the pixels of the mask.
    area = masks.float().sum((2, 3))
    scores = scores * (maps.sigmoid() * masks).sum((2, 3)) / (area + 1e-6)
    # Things come first, from high to low score, and then empty rows in place of stuff.
    scores, order = torch.where(labels < fusion.num_things_classes, scores, NO_SCORE).sort(1, descending=True)
    found = scores > NO_SCORE
    masks = masks[image, order] & found[..., None, None]
    labels = torch.where(found, labels.gather(1, order), -1)
    return bounding_boxes(masks), torch.where(found, scores, 0.0), labels, masks
