"""Epochs that are a part of a large dataset."""

from collections.abc import Iterator, Sized

import torch
from mmengine.dataset import DefaultSampler

from msda_plugin.registry import DATA_SAMPLERS


@DATA_SAMPLERS.register_module()
class PartSampler(DefaultSampler):
    """Draws ``num_samples`` samples an epoch, so that a training can end, validate and resume within a pass.

    Consecutive epochs continue a shuffled pass through the dataset, and then begin the next one. The samples depend on
    seed and epoch only.

    Args:
        dataset: The dataset.
        num_samples: Samples per epoch, of all processes together.
        seed: As in ``DefaultSampler``.

    Raises:
        ValueError: If ``num_samples`` is below 1.
    """

    def __init__(self, dataset: Sized, num_samples: int, seed: int | None = None) -> None:
        if num_samples < 1:
            raise ValueError(f'num_samples must be at least 1, got {num_samples}')
        super().__init__(dataset, shuffle=True, seed=seed)
        self.num_samples = -(-num_samples // self.world_size)
        self.total_size = self.num_samples * self.world_size

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * self.total_size
        passes = range(first // len(self.dataset), (first + self.total_size - 1) // len(self.dataset) + 1)
        indices = torch.cat([self._shuffled(number) for number in passes])
        begin = first - passes[0] * len(self.dataset)
        return iter(indices[begin + self.rank : begin + self.total_size : self.world_size].tolist())

    def _shuffled(self, number: int) -> torch.Tensor:
        return torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(self.seed + number))
