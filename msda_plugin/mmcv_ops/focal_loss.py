"""Focal loss over sigmoid and softmax scores, with the gradients that mmcv's kernels compute.

Source: Lin et al., Focal Loss for Dense Object Detection, https://arxiv.org/abs/1708.02002. Logarithms are taken of at
least FLT_MIN, as in mmcv. float16 and bfloat16 are computed in float32.
"""

import torch
from torch import Tensor

FLT_MIN = torch.finfo(torch.float32).tiny


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write the loss of each element into `output`.

    Args:
        input: (n, num_classes) logits.
        target: (n,) int64, 0 to num_classes; num_classes is the background.
        weight: (num_classes,), factors by target class (1 for the background), or empty.
        output: (n, num_classes).
    """
    probability, positive = _probability(input), _one_hot(target, input)
    loss = torch.where(
        positive,
        -alpha * (1 - probability) ** gamma * _log(probability),
        -(1 - alpha) * probability**gamma * _log(1 - probability),
    )
    output.copy_(loss * _class_weight(weight, target)[:, None])


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the derivative of each element's loss by its logit into `grad_input`, (n, num_classes)."""
    probability, positive = _probability(input), _one_hot(target, input)
    other = 1 - probability
    grad = torch.where(
        positive,
        -alpha * other**gamma * (other - gamma * probability * _log(probability)),
        -(1 - alpha) * probability**gamma * (gamma * other * _log(other) - probability),
    )
    grad_input.copy_(grad * _class_weight(weight, target)[:, None])


def softmax_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write the loss of each row into `output`.

    Args:
        input: (n, num_classes) softmax probabilities.
        target: (n,) int64; negative targets are ignored.
        weight: (num_classes,), factors by target class, or empty.
        output: (n,).
    """
    probability = _target_probability(input, target)
    loss = -alpha * (1 - probability) ** gamma * _log(probability)
    output.copy_(torch.where(target >= 0, loss * _class_weight(weight, target), 0))


def softmax_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the derivatives by the logits into `grad_input`, (n, num_classes); `buff`, (n,), gets a factor of each."""
    probability = _target_probability(input, target)
    other = 1 - probability
    factor = alpha * (gamma * other ** (gamma - 1) * probability * _log(probability) - other**gamma)
    factor = torch.where(target >= 0, factor * _class_weight(weight, target), 0)
    buff.copy_(factor)
    grad_input.copy_(factor[:, None] * (_one_hot(target, input).to(factor.dtype) - input))


def _accumulation(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _probability(logits: Tensor) -> Tensor:
    return _accumulation(logits).sigmoid()


def _target_probability(softmax: Tensor, target: Tensor) -> Tensor:
    return _accumulation(softmax).gather(1, target.clamp(min=0)[:, None]).squeeze(1)


def _log(probability: Tensor) -> Tensor:
    return probability.clamp(min=FLT_MIN).log()


def _one_hot(target: Tensor, scores: Tensor) -> Tensor:
    return target[:, None] == torch.arange(scores.shape[1], device=scores.device)


def _class_weight(weight: Tensor, target: Tensor) -> Tensor:
    """(n,) factors; 1 where the target is no class or there are no weights."""
    if weight.numel() == 0:
        return target.new_ones(target.shape, dtype=torch.float32)
    is_class = (target >= 0) & (target < len(weight))
    return torch.where(is_class, _accumulation(weight)[target.clamp(0, len(weight) - 1)], 1)
