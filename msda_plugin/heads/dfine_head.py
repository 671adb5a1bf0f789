"""The head of D-FINE and DEIM: distributions of the box edges, their quality, and losses over all layers at once.

Sources: Peng et al., D-FINE, https://arxiv.org/abs/2410.13842; Huang et al., DEIM, https://arxiv.org/abs/2412.04234.
"""

from collections.abc import Sequence

import numpy as np
import torch
from mmdet.models.layers import inverse_sigmoid
from mmdet.models.losses import GIoULoss, L1Loss
from mmdet.structures import DetDataSample
from mmdet.utils import reduce_mean
from mmengine.model import bias_init_with_prob
from mmengine.structures import InstanceData
from torch import Tensor, nn

from msda_plugin.convert.dfine import bin_values
from msda_plugin.heads.box_ops import box_cxcywh_to_xyxy, box_iou, box_xyxy_to_cxcywh, generalized_box_iou
from msda_plugin.heads.detr_head import GIOU, L1
from msda_plugin.heads.dfine_losses import DecoupledDistillationFocalLoss, FineGrainedLocalizationLoss
from msda_plugin.heads.losses import MatchabilityAwareLoss, VarifocalLoss
from msda_plugin.heads.matching import Matches, Targets
from msda_plugin.heads.rtdetr_head import MATCHING, TOP_300, VARIFOCAL, RTDETRHead, _ground_truth
from msda_plugin.layers.denoising import DenoisingQueries
from msda_plugin.layers.dfine_layers import build_mlp
from msda_plugin.registry import MODELS

FGL = dict(type='msda_plugin.FineGrainedLocalizationLoss', loss_weight=0.15)
DDF = dict(type='msda_plugin.DecoupledDistillationFocalLoss', loss_weight=1.5)
TOP_BINS = 4  # most probable bins that the quality branch gets


@MODELS.register_module()
class DFINEHead(RTDETRHead):
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
        loss_cls: config of :class:`VarifocalLoss`, or of DEIM's :class:`MatchabilityAwareLoss`.
        loss_bbox, loss_iou: configs of mmdet's ``L1Loss`` and ``GIoULoss``.
        loss_fgl: config of :class:`FineGrainedLocalizationLoss`.
        loss_ddf: config of :class:`DecoupledDistillationFocalLoss`.
        train_cfg, test_cfg: as in :class:`RTDETRHead`.
        init_cfg: as in MMEngine.
        num_pred_layer: number of decoder layers plus 1; the last class and box branch score the encoder's proposals.
        eval_layer: decoder layer that predicts in evaluation.
        dn_cfg: fields of :class:`ContrastiveDenoising`; None: training without denoising.

    The detector sets the last three fields.

    Raises:
        ValueError: If a loss or the assigner is of another type, ``reg_max`` is not even, or a scale is not positive.
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
        train_cfg: dict | None = MATCHING,
        test_cfg: dict | None = TOP_300,
        init_cfg: dict | list[dict] | None = None,
        *,
        num_pred_layer: int = 7,
        eval_layer: int = 5,
        dn_cfg: dict | None = None,
    ) -> None:
        if reg_max < 4 or reg_max % 2:
            raise ValueError(f'reg_max={reg_max} is invalid; expected an even number of at least 4')
        if reg_scale <= 0 or up <= 0:
            raise ValueError(f'reg_scale={reg_scale} and up={up}; expected positive numbers')
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
            dn_cfg=dn_cfg,
        )
        self.loss_fgl = MODELS.build(loss_fgl)
        self.loss_ddf = MODELS.build(loss_ddf)
        self._check_loss('loss_fgl', FineGrainedLocalizationLoss)
        self._check_loss('loss_ddf', DecoupledDistillationFocalLoss)
        # In the checkpoint, because the distributions mean nothing without them.
        self.register_buffer('reg_scale', torch.tensor(float(reg_scale)))
        self.register_buffer('bin_values', bin_values(reg_max, self.reg_scale, torch.tensor(float(up))))

    def _unsupported_loss_reason(self) -> str:
        self._check_loss('loss_cls', VarifocalLoss, MatchabilityAwareLoss)
        self._check_loss('loss_bbox', L1Loss)
        self._check_loss('loss_iou', GIoULoss)
        return ''

    def _check_loss(self, name: str, *kinds: type[nn.Module]) -> None:
        loss = getattr(self, name)
        if type(loss) not in kinds:
            names = ' or '.join(kind.__name__ for kind in kinds)
            raise ValueError(f'{name} of {type(self).__name__} is a {type(loss).__name__}; expected {names}')

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
        # Not in low precision under autocast, as a matrix product would be.
        probabilities = logits.unflatten(-1, (4, -1)).softmax(-1, dtype=self.bin_values.dtype)
        distances = (probabilities * self.bin_values).sum(-1)
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
        self.denoising = None

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
        denoising: DenoisingQueries | None = None,
    ) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            batch_data_samples: hold ``gt_instances`` and ``img_shape`` of each image.
            hidden_states, references, distributions: as in :meth:`forward`; denoising queries come first.
            initial_boxes: (bs, num_queries, 4).
            enc_outputs_class: logits of the selected proposals, (bs, num_matching_queries, num_classes).
            enc_outputs_coord: their boxes, (bs, num_matching_queries, 4).
            denoising: the denoising queries.

        Returns:
            As :meth:`loss_by_feat`.
        """
        logits, boxes = self(hidden_states, references, distributions)
        return self.loss_by_feat(
            torch.cat([logits, self.cls_branches[0](hidden_states[:1])]),
            torch.cat([boxes, initial_boxes[None]]),
            distributions,
            enc_outputs_class,
            enc_outputs_coord,
            *_ground_truth(batch_data_samples),
            denoising=denoising,
        )

    def loss_by_feat(
        self,
        all_logits: Tensor,
        all_boxes: Tensor,
        distributions: Tensor,
        enc_logits: Tensor,
        enc_boxes: Tensor,
        batch_gt_instances: Sequence[InstanceData],
        batch_img_metas: Sequence[dict],
        denoising: DenoisingQueries | None = None,
    ) -> dict[str, Tensor]:
        """Losses from the predictions of the decoder layers, of the initial boxes, and of the proposals.

        Classes are matched layer by layer. Boxes and distributions of all of them are matched to the union of these
        matches, in which a query has the object that most layers give it.

        Args:
            all_logits: (L + 1, bs, num_queries, num_classes), of L decoder layers and the initial boxes; denoising
                queries come first.
            all_boxes: (L + 1, bs, num_queries, 4) as (cx, cy, w, h), 0 to 1 over the image.
            distributions: (L, bs, num_queries, 4 * num_bins).
            enc_logits, enc_boxes: (bs, num_matching_queries, num_classes or 4).
            batch_gt_instances: ``bboxes`` (n, 4) as (x1, y1, x2, y2) in pixels and ``labels`` (n,); n may be 0.
            batch_img_metas: ``img_shape`` (h, w) of each image.
            denoising: the denoising queries.

        Returns:
            Scalars ``loss_cls``, ``loss_bbox``, ``loss_iou``, ``loss_fgl`` and ``loss_ddf``. Those of the last layer
            have no prefix, earlier layers have ``d0.`` ..., the initial boxes ``initial_``, the proposals ``enc_``, and
            denoising queries have ``dn_`` before the name of the loss.
        """
        num_dn = 0 if denoising is None else len(denoising)
        targets = Targets.from_instances(batch_gt_instances, batch_img_metas, all_logits.device)
        noisy = [x[:, :, :num_dn].float() for x in (all_logits, all_boxes, distributions)]
        logits, boxes, distributions = (x[:, :, num_dn:].float() for x in (all_logits, all_boxes, distributions))
        logits, boxes = torch.cat([logits, enc_logits[None].float()]), torch.cat([boxes, enc_boxes[None].float()])
        names = [f'd{i}.' for i in range(len(distributions) - 1)] + ['', 'initial_', 'enc_']

        matches = self.matcher.match([(logits, boxes, targets)])[0]
        union = union_of_matches(matches, logits.shape[1:3], targets)
        num_boxes, num_union = reduce_mean(boxes.new_tensor([sum(targets.counts), len(union[0])])).clamp(min=1)
        # The distillation weighs matched and unmatched queries by the square roots of their numbers; the denoising
        # queries get the same shares.
        positive, negative = len(union[0]) ** 0.5, (logits.shape[1] * logits.shape[2] - len(union[0])) ** 0.5
        share = positive / (positive + negative)
        losses = self._losses(logits, boxes, targets, matches, num_boxes, union, num_union)
        losses |= self._distribution_losses(logits, boxes, distributions, targets, union, num_union, share)
        loss_dict = _named(losses, names)
        if denoising is not None:
            pairs = denoising.positives(targets.counts, targets.labels.shape[1])
            matches = Matches(*(index.expand(len(noisy[0]), -1) for index in pairs))
            total = num_boxes * denoising.num_groups
            losses = self._losses(*noisy[:2], targets, matches, total, pairs, total)
            losses |= self._distribution_losses(*noisy, targets, pairs, total, share)
            loss_dict |= _named(losses, [f'{name}dn_' for name in names])
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
        share: float,
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
            matched = torch.zeros_like(score[0], dtype=torch.bool)
            matched[union[0]] = True
            losses['ddf'] = self.loss_ddf(distributions[:-1], distributions[-1], score, matched, share)
        return losses


def _named(losses: dict[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    return {
        f'{prefix}loss_{name}': loss
        for name, values in losses.items()
        for prefix, loss in zip(names, values.unbind(), strict=False)
    }


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
    to_low, to_high = (size * (0.5 + part / reg_scale) for part in distances.chunk(2, -1))
    return box_xyxy_to_cxcywh(torch.cat([center - to_low, center + to_high], -1))


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
