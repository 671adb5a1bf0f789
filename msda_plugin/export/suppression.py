"""Non-maximum suppression with outputs of fixed size, for exported graphs."""

import torch
from torch import Tensor

NO_SCORE = -1.0  # of a box that is no detection; below every score


def keep_best(
    boxes: Tensor, scores: Tensor, labels: Tensor, count: int, iou_threshold: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The boxes with the highest scores, after non-maximum suppression within each label.

    Args:
        boxes: (bs, n, 4), xyxy.
        scores: (bs, n), 0-1; :data:`NO_SCORE` marks a box that is no detection.
        labels: (bs, n) int64.
        count: Number of boxes to return.
        iou_threshold: A box whose IoU with a better one of its label exceeds it is dropped. None: no suppression.

    Returns:
        Boxes (bs, count, 4), scores (bs, count) from high to low and labels (bs, count). Rows after the last detection
        have box 0, score 0 and label -1.
    """
    if iou_threshold is not None:
        # Moved apart, boxes of different labels do not overlap.
        apart = boxes + (labels.to(boxes.dtype) * (boxes.amax((1, 2), keepdim=True)[..., 0] + 1))[..., None]
        kept = greedy_suppression(apart, scores, iou_threshold, count)
        scores = torch.where(kept, scores, NO_SCORE)
    # With `count` more rows, the number of boxes never limits the top-k, whatever the size of the images.
    scores = torch.cat([scores, scores.new_full((1, count), NO_SCORE).expand(scores.shape[0], -1)], 1)
    scores, chosen = scores.topk(count, 1)
    found = scores > NO_SCORE
    chosen = torch.where(found, chosen, 0)
    boxes = boxes.gather(1, chosen[..., None].expand(-1, -1, 4))
    return (
        torch.where(found[..., None], boxes, 0.0),
        torch.where(found, scores, 0.0),
        torch.where(found, labels.gather(1, chosen), -1),
    )


def greedy_suppression(boxes: Tensor, scores: Tensor, iou_threshold: float, count: int) -> Tensor:
    """Choose boxes from the highest score down, skipping those that overlap a chosen one.

    Args:
        boxes: (bs, n, 4), xyxy.
        scores: (bs, n); boxes with :data:`NO_SCORE` are never chosen.
        iou_threshold: Maximum IoU of two chosen boxes.
        count: Maximum number of boxes to choose in each image.

    Returns:
        (bs, n) bool, the chosen boxes.
    """
    if torch.onnx.is_in_onnx_export():
        return _OnnxSuppression.apply(boxes, scores, iou_threshold, count) > 0
    remaining = torch.where(scores > NO_SCORE, scores, -torch.inf)
    state = (torch.zeros((), dtype=torch.int64), remaining, torch.zeros_like(scores, dtype=torch.bool))
    areas = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])

    def undecided(step: Tensor, remaining: Tensor, kept: Tensor) -> Tensor:
        return (step < count) & (remaining.max() > -torch.inf)

    def choose(step: Tensor, remaining: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        score, best = remaining.max(1, keepdim=True)
        box = boxes.gather(1, best[..., None].expand(-1, -1, 4))  # (bs, 1, 4)
        sides = torch.minimum(boxes[..., 2:], box[..., 2:]) - torch.maximum(boxes[..., :2], box[..., :2])
        shared = sides.clamp(min=0).prod(-1)
        overlap = shared / (areas + areas.gather(1, best) - shared)
        chosen = (torch.arange(boxes.shape[1], device=boxes.device) == best) & (score > -torch.inf)
        return step + 1, torch.where(chosen | (overlap > iou_threshold), -torch.inf, remaining), kept | chosen

    if torch.compiler.is_exporting():
        from torch._higher_order_ops.while_loop import while_loop

        return while_loop(undecided, choose, state)[2]
    while undecided(*state):
        state = choose(*state)
    return state[2]


class _OnnxSuppression(torch.autograd.Function):
    """`greedy_suppression` as ONNX's NonMaxSuppression; returns 1 for a chosen box and 0 for others."""

    @staticmethod
    def forward(ctx, boxes: Tensor, scores: Tensor, iou_threshold: float, count: int) -> Tensor:
        return (scores > NO_SCORE).to(scores.dtype)  # of the right shape: the graph has the node

    @staticmethod
    def symbolic(graph, boxes, scores, iou_threshold, count):
        def constant(value, dtype):
            return graph.op('Constant', value_t=torch.tensor(value, dtype=dtype))

        chosen = graph.op(
            'NonMaxSuppression',
            boxes,
            graph.op('Unsqueeze', scores, constant([1], torch.int64)),  # (bs, 1, n): a single class
            constant([count], torch.int64),
            constant([iou_threshold], torch.float32),
            constant([NO_SCORE], torch.float32),
        )  # (number, 3): image, class and box
        places = graph.op('Gather', chosen, constant([0, 2], torch.int64), axis_i=1)
        length = graph.op('Gather', graph.op('Shape', chosen), constant([0], torch.int64), axis_i=0)
        ones = graph.op('ConstantOfShape', length, value_t=torch.ones(1))
        zeros = graph.op('ConstantOfShape', graph.op('Shape', scores), value_t=torch.zeros(1))
        return graph.op('ScatterND', zeros, places, ones).setType(scores.type())
