"""Contrastive denoising: noisy copies of the ground truth as additional queries of a training.

Sources: Zhang et al., DINO, https://arxiv.org/abs/2203.03605, section 3.3; the details are those of RT-DETR's published
code. MMDetection's ``CdnQueryGenerator`` differs in the padding queries and in the clamping of the boxes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from mmdet.models.layers import inverse_sigmoid
from torch import Tensor, nn


@dataclass(frozen=True)
class DenoisingQueries:
    """Queries to prepend to the N matching queries of a decoder. Each of G groups has T positive, then T negative ones.

    Attributes:
        content: (B, 2 * G * T, embed_dims), embedded labels.
        boxes: (B, 2 * G * T, 4), logits of (cx, cy, w, h).
        attn_mask: (2 * G * T + N, 2 * G * T + N) bool, True where a query (row) must not attend to another one.
        num_groups: G.
        size: T, the largest number of objects in an image, at least 1.
    """

    content: Tensor
    boxes: Tensor
    attn_mask: Tensor
    num_groups: int
    size: int

    def __len__(self) -> int:
        return self.boxes.shape[1]

    def positives(self, counts: Sequence[int], num_targets: int) -> tuple[Tensor, Tensor]:
        """The pairs of positive queries and their objects.

        Args:
            counts: number of objects in each image.
            num_targets: number of padded objects of each image, of which the targets are numbered.

        Returns:
            Indices (P,) into the B * 2 * G * T queries, and (P,) into the B * num_targets objects; P is the sum of
            ``counts`` times G.
        """
        queries, targets = [], []
        for image, count in enumerate(counts):
            index = torch.arange(count)
            groups = torch.arange(self.num_groups)[:, None] * 2 * self.size
            queries.append((image * len(self) + groups + index).flatten())
            targets.append((image * num_targets + index).repeat(self.num_groups))
        both = torch.stack([torch.cat(queries), torch.cat(targets)])
        return tuple(both.to(self.boxes.device, non_blocking=True).unbind())


class ContrastiveDenoising(nn.Module):
    """Makes denoising queries from the objects of a batch.

    A positive query has a box shifted by less than half of its size (times ``box_noise_scale``), a negative one by more
    than half and less than its size. Some labels are replaced by random ones.

    Args:
        num_classes: number of object classes.
        embed_dims: channels of the queries.
        num_denoising: total number of positive queries per image, as far as groups of all objects fit; at least one
            group is made.
        label_noise_ratio: twice the share of labels that are replaced, 0 to 2.
        box_noise_scale: size of the shifts; 0: none.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        num_classes: int,
        embed_dims: int,
        num_denoising: int = 100,
        label_noise_ratio: float = 0.5,
        box_noise_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if num_denoising < 1 or not 0 <= label_noise_ratio <= 2 or box_noise_scale < 0:
            raise ValueError(
                f'num_denoising={num_denoising}, label_noise_ratio={label_noise_ratio} and box_noise_scale='
                f'{box_noise_scale}; expected at least 1, 0 to 2 and at least 0. Set dn_cfg=None for a training '
                'without denoising'
            )
        self.num_classes = num_classes
        self.num_denoising = num_denoising
        self.label_noise_ratio = label_noise_ratio
        self.box_noise_scale = box_noise_scale
        # The last row is the zero vector of the padding.
        self.label_embedding = nn.Embedding(num_classes + 1, embed_dims, padding_idx=num_classes)
        nn.init.normal_(self.label_embedding.weight[:-1])

    def forward(self, labels: Tensor, boxes: Tensor, counts: Sequence[int], num_queries: int) -> DenoisingQueries:
        """Make the queries.

        Args:
            labels: (B, T) int64, 0 to num_classes - 1, padded.
            boxes: (B, T, 4) as (cx, cy, w, h), 0 to 1 over the image, padded.
            counts: number of objects in each image. Without any object in the batch, the queries are padding; they keep
                the embedding in the graph, which distributed training needs.
            num_queries: number of matching queries.
        """
        batch, size, device = len(labels), max(labels.shape[1], 1), labels.device
        num_groups = max(self.num_denoising // max(max(counts), 1), 1)
        known = torch.arange(size) < torch.tensor(counts)[:, None]
        known = known.to(device, non_blocking=True)
        if labels.shape[1] == 0:
            labels = labels.new_zeros(batch, 1)
            boxes = boxes.new_tensor([0.5, 0.5, 0.1, 0.1]).expand(batch, 1, 4)
        else:
            boxes = boxes.masked_fill(~known[..., None], 0)
        # Labels that are no class index are clamped here; the matching reports them.
        labels = labels.clamp(0, self.num_classes - 1).masked_fill(~known, self.num_classes).repeat(1, 2 * num_groups)
        boxes, known = boxes.repeat(1, 2 * num_groups, 1), known.repeat(1, 2 * num_groups)

        if self.label_noise_ratio > 0:
            replaced = torch.rand(labels.shape, device=device) < 0.5 * self.label_noise_ratio
            random = torch.randint(0, self.num_classes, labels.shape, dtype=torch.int32, device=device)
            labels = torch.where(replaced & known, random.to(labels.dtype), labels)
        if self.box_noise_scale > 0:
            boxes = self._shift(boxes, num_groups, size)
        num_denoising = boxes.shape[1]

        total = num_denoising + num_queries
        # Group of each query; matching queries are a last group that nothing but itself is hidden from.
        group = torch.arange(total, device=device) // (2 * size)
        group = group.clamp(max=num_groups)
        is_matching = group == num_groups
        attn_mask = (group[:, None] != group) & ~is_matching
        return DenoisingQueries(
            self.label_embedding(labels), inverse_sigmoid(boxes, eps=1e-5), attn_mask, num_groups, size
        )

    def _shift(self, boxes: Tensor, num_groups: int, size: int) -> Tensor:
        """Shift the corners of (B, 2 * num_groups * size, 4) boxes, those of the second half of each group further."""
        center, sides = boxes.chunk(2, -1)
        corners = torch.cat([center - sides / 2, center + sides / 2], -1)
        sign = torch.randint(0, 2, boxes.shape, dtype=boxes.dtype, device=boxes.device) * 2 - 1
        length = torch.rand_like(boxes)
        negative = torch.arange(2 * num_groups * size, device=boxes.device) // size % 2
        shift = sign * (length + negative[:, None]) * torch.cat([sides, sides], -1) * 0.5 * self.box_noise_scale
        low, high = (corners + shift).clamp(0, 1).chunk(2, -1)
        return torch.cat([(low + high) / 2, high - low], -1)
