"""Predictions, objects and comparisons of losses for the tests of the heads."""

import torch
from mmengine.structures import InstanceData

LAYERS, QUERIES, KEYS = 3, 12, 40
IMAGE_SHAPES = [(64, 96), (50, 80), (64, 70)]


def make_predictions(num_outputs, *shape, seed=0):
    """Logits (*shape, num_outputs) and boxes (*shape, 4), leaves."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, num_outputs, generator=generator) - 2
    boxes = torch.rand(*shape, 4, generator=generator) * torch.tensor([0.8, 0.8, 0.4, 0.4]) + 0.05
    return [logits.requires_grad_(), boxes.requires_grad_()]


def make_objects(counts, num_classes=5):
    """Ground truth of three images with ``counts`` objects, and their meta information."""
    generator = torch.Generator().manual_seed(sum(counts))
    instances = []
    for count, (height, width) in zip(counts, IMAGE_SHAPES, strict=True):
        low = torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) * 0.6
        high = low + torch.rand(count, 2, generator=generator) * 20 + 2
        instances.append(
            InstanceData(
                bboxes=torch.cat([low, high], 1), labels=torch.randint(num_classes, (count,), generator=generator)
            )
        )
    return instances, [dict(img_shape=shape) for shape in IMAGE_SHAPES]


def losses_and_gradients(head, inputs):
    # MMDetection's classification loss has shape (1,) if it is averaged over processes.
    losses = {name: loss.squeeze() for name, loss in head.loss_by_feat(*inputs).items()}
    # Different weights, so that exchanged losses are noticed.
    total = sum((i + 1) * loss for i, loss in enumerate(losses.values()))
    return losses, torch.autograd.grad(total, [leaf for leaf in inputs if isinstance(leaf, torch.Tensor)])


def assert_same(ours, theirs, inputs):
    losses, gradients = losses_and_gradients(ours, inputs)
    expected, expected_gradients = losses_and_gradients(theirs, inputs)
    assert list(losses) == list(expected)
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f'{name}: {m}')
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)
