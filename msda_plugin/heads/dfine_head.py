"""The head of D-FINE and DEIM: distributions of the box edges, their quality, and losses over all layers at once.

Sources: Peng et al., D-FINE, https://arxiv.org/abs/2410.13842; Huang et al., DEIM, https://arxiv.org/abs/2412.04234.
"""

from collections.abc import Sequence

import numpy as np
import torch
from mmdet.models.layers import inverse_sigmoid
from mmdet.models.losses import GIoULoss, L1Loss, VarifocalLoss
from mmdet.structures import DetDataSample
from mmdet.utils import reduce_mean
from mmengine.model import bias_init_with_prob
from mmengine.structures import InstanceData
from torch import Tensor, nn

from msda_plugin.heads.box_ops import box_cxcywh_to_xyxy, box_iou, box_xyxy_to_cxcywh, generalized_box_iou
from msda_plugin.heads.deformable_detr_head import DeformableDETRHead
from msda_plugin.heads.detr_head import GIOU, L1
from msda_plugin.heads.dfine_losses import MatchabilityAwareLoss, quality_loss
from msda_plugin.heads.matching import Matches, Targets
from msda_plugin.layers.dfine_layers import build_mlp
from msda_plugin.registry import MODELS

VARIFOCAL = dict(type='mmdet.VarifocalLoss', alpha=0.75, gamma=2.0)
FGL = dict(type='msda_plugin.FineGrainedLocalizationLoss', loss_weight=0.15)
DDF = dict(type='msda_plugin.DecoupledDistillationFocalLoss', loss_weight=1.5)
TOP_300 = dict(max_per_img=300)
TOP_BINS = 4  # most probable bins that the quality branch gets


@MODELS.register_module()
class DFINEHead(DeformableDETRHead):
    """Head of :class:`msda_plugin.detectors.DFINE`.

    An edge of a box has a distribution over ``reg_max`` + 1 bins. Its mean is the distance that the edge moves from the
    initial box, which the first layer predicts; all layers refine the logits.

    Args:
        num_classes: number of object classes.
        embed_dims: channels of the decoder's outputs.
        reg_max: number of bins minus 1; even.
        reg_scale: curvature of the distances of the bins; higher values give finer bins near 0.
        up: the outermost distances are ±2 ``up`` times the size of the initial box.
        act: type of activations, 'ReLU' as in D-FINE or 'SiLU' as in DEIM.
        loss_cls: config of mmdet's ``VarifocalLoss``, or of DEIM's :class:`MatchabilityAwareLoss`.
        loss_bbox, loss_iou: configs of mmdet's ``L1Loss`` and ``GIoULoss``.
        loss_fgl: config of :class:`FineGrainedLocalizationLoss`.
        loss_ddf: config of :class:`DecoupledDistillationFocalLoss`.
        train_cfg, test_cfg: as in :class:`DETRHead`.
        init_cfg: as in MMEngine.
        num_pred_layer: number of decoder layers plus 1; the last class and box branch score the encoder's proposals.
        eval_layer: decoder layer that predicts in evaluation.

    The detector sets the last two fields.

    Raises:
        ValueError: If a loss or the assigner is of another type, or ``reg_max`` is not even.
    """

    def __init__(
        self,
        num_classes: int,
        embed_dims: int = 256,
        reg_max: int = 32,
        reg_scale: float = 4.0,
        up: float = 0.5,
        act: str = 'ReLU',
        loss_cls: dict = VARIFOCAL,
        loss_bbox: dict = L1,
        loss_iou: dict = GIOU,
        loss_fgl: dict = FGL,
        loss_ddf: dict = DDF,
        train_cfg: dict | None = None,
        test_cfg: dict | None = TOP_300,
        init_cfg: dict | list[dict] | None = None,
        *,
        num_pred_layer: int = 7,
        eval_layer: int = 5,
    ) -> None:
        if reg_max < 4 or reg_max % 2:
            raise ValueError(f'reg_max={reg_max} is invalid; expected an even number of at least 4')
        self.reg_max = reg_max
        self.act = act
        self.eval_layer = eval_layer
        super().__init__(
            num_classes,
            embed_dims,
            loss_cls=loss_cls,
            loss_bbox=loss_bbox,
            loss_iou=loss_iou,
            train_cfg=train_cfg,
            test_cfg=test_cfg,
            init_cfg=init_cfg,
            num_pred_layer=num_pred_layer,
            as_two_stage=True,
        )
        if train_cfg and self.matcher is None:
            raise ValueError(
                f"{type(self).__name__} needs train_cfg.assigner of type 'HungarianAssigner' with FocalLossCost, "
                f'BBoxL1Cost and IoUCost; got {train_cfg["assigner"]}'
            )
        self.loss_fgl = MODELS.build(loss_fgl)
        self.loss_ddf = MODELS.build(loss_ddf)
        # In the checkpoint, because the distributions mean nothing without them.
        self.register_buffer('reg_scale', torch.tensor(float(reg_scale)))
        self.register_buffer('bin_values', bin_values(reg_max, reg_scale, up))

    def _unsupported_loss_reason(self) -> str:
        for name, kinds in (
            ('loss_cls', (VarifocalLoss, MatchabilityAwareLoss)),
            ('loss_bbox', (L1Loss,)),
            ('loss_iou', (GIoULoss,)),
        ):
            loss = getattr(self, name)
            if type(loss) not in kinds:
                names = ' or '.join(kind.__name__ for kind in kinds)
                raise ValueError(f'{name} of {type(self).__name__} is a {type(loss).__name__}; expected {names}')
        return ''

    def _init_layers(self) -> None:
        dims, num_layers, num_bins = self.embed_dims, self.num_pred_layer - 1, self.reg_max + 1
        self.cls_branches = nn.ModuleList([nn.Linear(dims, self.cls_out_channels) for _ in range(num_layers + 1)])
        self.reg_branches = nn.ModuleList(
            [build_mlp([dims, dims, dims, 4 * num_bins], self.act) for _ in range(num_layers)]
        )
        self.reg_branches.append(build_mlp([dims, dims, dims, 4], self.act))
        self.initial_branch = build_mlp([dims, dims, dims, 4], self.act)
        self.quality_branches = nn.ModuleList(
            [build_mlp([4 * (TOP_BINS + 1), 64, 1], self.act) for _ in range(num_layers)]
        )

    def init_weights(self) -> None:
        """Class scores of 0.01; boxes, distributions and qualities that start at 0."""
        for branch in self.cls_branches:
            nn.init.constant_(branch.bias, bias_init_with_prob(0.01))
        for branch in (*self.reg_branches, self.initial_branch, *self.quality_branches):
            nn.init.zeros_(branch[-1].weight)
            nn.init.zeros_(branch[-1].bias)

    # ---- predictions -------------------------------------------------------------------------------------------------
    def initial_boxes(self, hidden_state: Tensor, boxes: Tensor) -> Tensor:
        """First layer's outputs (bs, num_queries, embed_dims) and its reference boxes (bs, num_queries, 4) -> boxes."""
        return (self.initial_branch(hidden_state) + inverse_sigmoid(boxes, eps=1e-5)).sigmoid()

    def refine(
        self, layer: int, hidden_state: Tensor, initial: Tensor, before: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """Refine the distributions of a layer.

        Args:
            layer: index of the layer.
            hidden_state: (bs, num_queries, embed_dims), outputs of this layer plus those of the layer before.
            initial: initial boxes, (bs, num_queries, 4) as (cx, cy, w, h), 0-1.
            before: logits of the layer before, (bs, num_queries, 4 * num_bins); 0 in the first layer.

        Returns:
            Boxes (bs, num_queries, 4), and logits (bs, num_queries, 4 * num_bins) of the distances of the left, upper,
            right and lower edge.
        """
        logits = self.reg_branches[layer](hidden_state) + before
        distances = logits.unflatten(-1, (4, -1)).softmax(-1) @ self.bin_values
        return move_edges(initial, distances, self.reg_scale), logits

    def forward(
        self, hidden_states: Tensor, references: Tensor, distributions: Tensor, initial_boxes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Predict classes and boxes of the queries.

        Args:
            hidden_states: (L, bs, num_queries, embed_dims), with all decoder layers in training and ``eval_layer`` in
                evaluation.
            references: boxes of these layers, (L, bs, num_queries, 4) as (cx, cy, w, h), 0 to 1 over the input.
            distributions: logits of their edges, (L, bs, num_queries, 4 * num_bins).
            initial_boxes: not used.

        Returns:
            Logits (L, bs, num_queries, num_classes), with the quality of the distributions added, and the boxes.
        """
        layers = range(len(hidden_states)) if self.training else [self.eval_layer]
        logits = [
            self.cls_branches[i](hidden_state) + self._quality(i, distribution)
            for i, hidden_state, distribution in zip(layers, hidden_states, distributions, strict=True)
        ]
        return torch.stack(logits), references

    def _quality(self, layer: int, distribution: Tensor) -> Tensor:
        """Logits (bs, num_queries, 1) from the shape of the distributions (bs, num_queries, 4 * num_bins)."""
        top = distribution.unflatten(-1, (4, -1)).softmax(-1).topk(TOP_BINS, dim=-1).values
        statistics = torch.cat([top, top.mean(-1, keepdim=True)], -1)
        return self.quality_branches[layer](statistics.flatten(-2))

    def predict(
        self, batch_data_samples: list[DetDataSample], rescale: bool = True, **outputs: Tensor
    ) -> list[InstanceData]:
        """Boxes, scores and labels of each image; ``outputs`` are the arguments of :meth:`forward`."""
        return self.predict_by_feat(
            *self(**outputs), batch_img_metas=[sample.metainfo for sample in batch_data_samples], rescale=rescale
        )

    def fuse(self) -> None:
        """Remove the branches that only the training needs."""
        used = self.eval_layer
        for branches in (self.cls_branches, self.quality_branches):
            for i in range(len(branches)):
                if i not in (used, self.num_pred_layer - 1):
                    branches[i] = nn.Identity()
        for i in range(used + 1, self.num_pred_layer - 1):
            self.reg_branches[i] = nn.Identity()

    # ---- losses ------------------------------------------------------------------------------------------------------
    def loss(
        self,
        batch_data_samples: list[DetDataSample],
        hidden_states: Tensor,
        references: Tensor,
        distributions: Tensor,
        initial_boxes: Tensor,
        enc_outputs_class: Tensor,
        enc_outputs_coord: Tensor,
        dn_meta: dict | None = None,
    ) -> dict[str, Tensor]:
        """Losses of all layers.

        Args:
            batch_data_samples: with ``gt_instances``.
            hidden_states, references, distributions: as in :meth:`forward`, with the denoising queries first.
            initial_boxes: (bs, num_queries, 4).
            enc_outputs_class: logits of the chosen proposals, (bs, num_matching_queries, num_classes).
            enc_outputs_coord: their boxes, (bs, num_matching_queries, 4).
            dn_meta: ``num_denoising_queries`` and ``num_denoising_groups``; None: no denoising queries.
        """
        logits, boxes = self(hidden_states, references, distributions)
        return self.loss_by_feat(
            torch.cat([logits, self.cls_branches[0](hidden_states[:1])]),
            torch.cat([boxes, initial_boxes[None]]),
            distributions,
            enc_outputs_class,
            enc_outputs_coord,
            [sample.gt_instances for sample in batch_data_samples],
            [sample.metainfo for sample in batch_data_samples],
            dn_meta,
        )

    def loss_by_feat(
        self,
        logits: Tensor,
        boxes: Tensor,
        distributions: Tensor,
        enc_logits: Tensor,
        enc_boxes: Tensor,
        batch_gt_instances: Sequence[InstanceData],
        batch_img_metas: Sequence[dict],
        dn_meta: dict | None = None,
    ) -> dict[str, Tensor]:
        """Losses from the predictions of the decoder layers, of the initial boxes, and of the proposals.

        Classes are matched layer by layer. Boxes and distributions of all of them are matched to the union of these
        matches, in which a query has the object that most layers give it.

        Args:
            logits: (L + 1, bs, num_queries, num_classes), of L decoder layers and the initial boxes, with the denoising
                queries first.
            boxes: (L + 1, bs, num_queries, 4) as (cx, cy, w, h), 0 to 1 over the input.
            distributions: (L, bs, num_queries, 4 * num_bins).
            enc_logits, enc_boxes: (bs, num_matching_queries, num_classes or 4).
            batch_gt_instances: ``bboxes`` (n, 4) as (x1, y1, x2, y2) in pixels and ``labels`` (n,); n may be 0.
            batch_img_metas: ``img_shape`` (h, w) of each image.
            dn_meta: as in :meth:`loss`.

        Returns:
            Scalars ``loss_cls``, ``loss_bbox``, ``loss_iou``, ``loss_fgl`` and ``loss_ddf``: those of the last layer
            without prefix, ``d0.`` ... of earlier layers, ``initial_`` of the initial boxes, ``enc_`` of the
            proposals, and with ``dn_`` those of the denoising queries.
        """
        num_layers, num_dn = len(distributions), dn_meta['num_denoising_queries'] if dn_meta else 0
        targets = Targets.from_instances(batch_gt_instances, batch_img_metas, logits.device)
        logits, boxes, distributions = (
            (x[:, :, :num_dn].float(), x[:, :, num_dn:].float()) for x in (logits, boxes, distributions)
        )
        all_logits = torch.cat([logits[1], enc_logits[None].float()])
        all_boxes = torch.cat([boxes[1], enc_boxes[None].float()])
        matches = self.matcher.match([(all_logits, all_boxes, targets)])[0]
        union = union_of_matches(matches, all_boxes.shape[1:3], targets)
        num_boxes, num_union = reduce_mean(all_boxes.new_tensor([sum(targets.counts), len(union[0])])).clamp(min=1)

        names = [f'd{i}.' for i in range(num_layers - 1)] + ['', 'initial_', 'enc_']
        # Distillation weighs matched queries by the square root of their number, for the denoising queries as well.
        matched = distributions[1].new_zeros(distributions[1][0, ..., 0].numel(), dtype=torch.bool)
        matched[union[0]] = True
        positive, negative = matched.sum().sqrt(), (~matched).sum().sqrt()
        share = positive / (positive + negative)
        losses = self._losses(all_logits, all_boxes, targets, matches, num_boxes, union, num_union)
        losses |= self._distribution_losses(
            all_logits, all_boxes, distributions[1], targets, union, num_union, matched, share
        )
        loss_dict = _named(losses, names)
        if num_dn:
            groups = dn_meta['num_denoising_groups']
            matches = denoising_matches(targets, num_dn, groups, len(names) - 1)
            union = matches.predictions[0], matches.targets[0]
            total = num_boxes * groups
            matched = distributions[0].new_zeros(distributions[0][0, ..., 0].numel(), dtype=torch.bool)
            matched[union[0]] = True
            losses = self._losses(logits[0], boxes[0], targets, matches, total, union, total)
            losses |= self._distribution_losses(
                logits[0], boxes[0], distributions[0], targets, union, total, matched, share
            )
            loss_dict |= _named(losses, [f'{name}dn_' if '.' in name or not name else f'dn_{name}' for name in names])
        return loss_dict

    def _losses(
        self,
        logits: Tensor,
        boxes: Tensor,
        targets: Targets,
        matches: Matches,
        num_boxes: Tensor,
        union: tuple[Tensor, Tensor],
        num_union: Tensor,
    ) -> dict[str, Tensor]:
        """``cls``, ``bbox`` and ``iou`` loss (S,), from logits (S, B, Q, C), boxes (S, B, Q, 4) and their matches."""
        boxes, expected = boxes.flatten(1, 2), targets.boxes.flatten(0, 1)
        chosen = boxes.detach().gather(1, matches.predictions[..., None].expand(-1, -1, 4))
        sizes = targets.sizes.expand_as(targets.boxes).flatten(0, 1)
        # In pixels, because eps of the IoU is an absolute area.
        quality = box_iou(
            box_cxcywh_to_xyxy(chosen * sizes[matches.targets]), box_cxcywh_to_xyxy((expected * sizes)[matches.targets])
        )
        index = matches.predictions * logits.shape[-1] + targets.labels.flatten()[matches.targets]
        if isinstance(self.loss_cls, VarifocalLoss):
            weights = quality if self.loss_cls.iou_weighted else torch.ones_like(quality)
            loss_cls = self.loss_cls.loss_weight * quality_loss(
                logits.flatten(1), index, quality, weights, self.loss_cls.alpha, self.loss_cls.gamma
            )
        else:
            loss_cls = self.loss_cls(logits.flatten(1), index, quality)

        chosen, expected, sizes = boxes[:, union[0]], expected[union[1]], sizes[union[1]]
        overlap = generalized_box_iou(
            box_cxcywh_to_xyxy(chosen * sizes), box_cxcywh_to_xyxy(expected * sizes), self.loss_iou.eps
        )
        return {
            'cls': loss_cls / num_boxes,
            'bbox': self.loss_bbox.loss_weight * (chosen - expected).abs().sum((1, 2)) / num_union,
            'iou': self.loss_iou.loss_weight * (1 - overlap).sum(1) / num_union,
        }

    def _distribution_losses(
        self,
        logits: Tensor,
        boxes: Tensor,
        distributions: Tensor,
        targets: Targets,
        union: tuple[Tensor, Tensor],
        num_union: Tensor,
        matched: Tensor,
        share: Tensor,
    ) -> dict[str, Tensor]:
        """``fgl`` loss (L,) of all layers, and ``ddf`` loss (L - 1,) of those before the last.

        The first L of the logits and boxes are those of the decoder layers, entry L of the boxes are the initial ones.
        """
        num_layers = len(distributions)
        distributions = distributions.flatten(1, 2).unflatten(-1, (4, -1))  # (L, B * Q, 4, bins)
        boxes, expected = boxes.detach().flatten(1, 2), targets.boxes.flatten(0, 1)[union[1]]
        sizes = targets.sizes.expand_as(targets.boxes).flatten(0, 1)[union[1]]
        # (L, N)
        quality = box_iou(
            box_cxcywh_to_xyxy(boxes[:num_layers, union[0]] * sizes), box_cxcywh_to_xyxy(expected * sizes)
        )
        distances = edge_distances(boxes[num_layers, union[0]], expected, self.reg_scale)
        losses = {'fgl': self.loss_fgl(distributions[:, union[0]], distances, self.bin_values, quality) / num_union}
        if num_layers > 1:
            score = logits[num_layers - 1].detach().sigmoid().amax(-1).flatten().repeat(num_layers - 1, 1)
            score[:, union[0]] = quality[:-1]
            losses['ddf'] = self.loss_ddf(distributions[:-1], distributions[-1], score, matched, share)
        return losses


def _named(losses: dict[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    return {
        f'{prefix}loss_{name}': loss
        for name, values in losses.items()
        for prefix, loss in zip(names, values.unbind(), strict=False)
    }


def bin_values(reg_max: int, reg_scale: float, up: float = 0.5) -> Tensor:
    """Distances that the bins stand for, (reg_max + 1,): symmetric, finer near 0 (D-FINE, equation 4)."""
    limit = abs(up * reg_scale)
    steps = torch.arange(1, reg_max // 2, dtype=torch.float64)
    right = (limit + 1) ** (2 / (reg_max - 2) * steps) - 1
    right = torch.cat([right, right.new_tensor([2 * limit])])
    return torch.cat([-right.flip(0), right.new_zeros(1), right]).float()


def move_edges(boxes: Tensor, distances: Tensor, reg_scale: Tensor) -> Tensor:
    """Move the left, upper, right and lower edges of boxes outwards.

    Args:
        boxes: (..., 4) as (cx, cy, w, h).
        distances: (..., 4), in units of the box size divided by ``reg_scale``.
        reg_scale: scalar.

    Returns:
        (..., 4) as (cx, cy, w, h).
    """
    center, size = boxes.chunk(2, -1)
    outwards = size * (0.5 + distances.unflatten(-1, (2, 2)).transpose(-1, -2) / reg_scale).transpose(-1, -2).unbind(-2)
    return box_xyxy_to_cxcywh(torch.cat([center - outwards[0], center + outwards[1]], -1))


def edge_distances(boxes: Tensor, expected: Tensor, reg_scale: Tensor) -> Tensor:
    """Inverse of :func:`move_edges`: the distances that move ``boxes`` to ``expected``, all (..., 4)."""
    center, size = boxes.chunk(2, -1)
    low, high = box_cxcywh_to_xyxy(expected).chunk(2, -1)
    return (torch.cat([center - low, high - center], -1) / (size + 1e-16).repeat(1, 2) - 0.5) * reg_scale


def union_of_matches(matches: Matches, size: tuple[int, int], targets: Targets) -> tuple[Tensor, Tensor]:
    """The pairs that any of the layers matched; a query of several objects keeps the most frequent one.

    Args:
        matches: of all layers.
        size: number of images and of queries.
        targets: the padded objects.

    Returns:
        (N,) indices into the B * Q predictions, and (N,) into the B * T padded targets.
    """
    num_targets = targets.labels.shape[1]
    device = matches.predictions.device
    predictions, objects = matches.predictions.cpu().numpy(), matches.targets.cpu().numpy()
    votes = np.zeros((size[0] * size[1], max(num_targets, 1)), np.int64)
    np.add.at(votes, (predictions, objects % max(num_targets, 1)), 1)
    rows = np.flatnonzero(votes.max(1))
    columns = votes[rows].argmax(1) + rows // size[1] * num_targets
    pairs = torch.from_numpy(np.stack([rows, columns])).to(device, non_blocking=True)
    return pairs[0], pairs[1]


def denoising_matches(targets: Targets, num_queries: int, num_groups: int, num_layers: int) -> Matches:
    """The objects that the positive denoising queries were made from.

    An image has ``num_groups`` groups of one positive and then one negative query for each of the T padded objects.
    """
    num_targets = targets.labels.shape[1]
    predictions, objects = [], []
    for image, count in enumerate(targets.counts):
        query = np.arange(num_groups)[:, None] * 2 * num_targets + np.arange(count)
        predictions.append(image * num_queries + query.ravel())
        objects.append(np.tile(image * num_targets + np.arange(count), num_groups))
    both = torch.from_numpy(np.stack([np.concatenate(predictions), np.concatenate(objects)]).astype(np.int64))
    both = both.to(targets.labels.device, non_blocking=True)[:, None].expand(-1, num_layers, -1)
    return Matches(both[0], both[1])
