"""Random numbers that depend only on the seed, the epoch and the sample."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import c_longlong
from multiprocessing import RawValue
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, Runner, set_random_seed
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from msda_plugin.registry import HOOKS


@HOOKS.register_module()
class EpochSeedHook(Hook):
    """Seeds every epoch and every sample, so that a resumed training repeats one without a break, bit for bit.

    At the start of an epoch, the generators of Python, NumPy and torch are seeded from the training's seed and the
    epoch; before a sample is loaded, from these and its position in the epoch. Dropout and augmentation are therefore
    the same after a resume and with any number of data-loading processes, and a resumed training keeps its order of the
    data. (MMEngine seeds once: a resumed training repeats the random numbers of its first epoch, and so do
    non-persistent workers in every epoch.)

    Iteration-based loops keep MMEngine's seeding. `msda_plugin.DetectionRunner` adds this hook; ``default_hooks =
    dict(epoch_seed=None)`` switches it off.
    """

    priority = 'VERY_HIGH'  # before hooks that use random numbers

    def __init__(self) -> None:
        self._epoch: c_longlong | None = None  # shared with the data-loading processes

    def before_train(self, runner: Runner) -> None:
        # If the config has no seed, the resumed one is known only after the sampler was built.
        sampler = runner.train_dataloader.sampler
        if getattr(sampler, 'seed', None) is not None and not runner._randomness_cfg.get('diff_rank_seed'):
            sampler.seed = runner.seed
        if self._epoch is None and isinstance(runner.train_loop, EpochBasedTrainLoop):
            self._epoch = RawValue(c_longlong, -1)
            _seed_samples(runner.train_dataloader, _mix(runner.seed, get_rank()), self._epoch)

    def before_train_epoch(self, runner: Runner) -> None:
        if self._epoch is not None:
            self._epoch.value = runner.epoch
            set_random_seed(_mix(runner.seed, runner.epoch))

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        # Again: a data loader that starts workers, which not every epoch does, has drawn a number.
        if self._epoch is not None and batch_idx == 0:
            set_random_seed(_mix(runner.seed, runner.epoch))


def _mix(*numbers: int) -> int:
    """One seed of 32 bits from several numbers; neighboring numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _seed_samples(loader: DataLoader, seed: int, epoch: c_longlong) -> None:
    """Seed the generators before every sample that ``loader`` loads, in this process or in its workers."""
    if isinstance(loader.dataset, (list, tuple, IterableDataset)):  # no random numbers, or no samples by index
        return
    if loader.num_workers:
        loader.worker_init_fn = _SeedWorker(seed, epoch, loader.batch_size or 1, loader.worker_init_fn)
    else:
        _seed_dataset(loader.dataset, seed, epoch, lambda count: count)


class _SeedWorker:
    """``worker_init_fn`` that seeds the samples of the worker's own copy of the dataset."""

    def __init__(self, seed: int, epoch: c_longlong, batch_size: int, then: Callable[[int], None] | None) -> None:
        self.seed, self.epoch, self.batch_size, self.then = seed, epoch, batch_size, then

    def __call__(self, worker_id: int) -> None:
        if self.then is not None:
            self.then(worker_id)
        info = get_worker_info()

        def position(count: int) -> int:
            """Position in the epoch of the sample number ``count`` of this worker; workers take batches in turn."""
            batch, place = divmod(count, self.batch_size)
            return (batch * info.num_workers + worker_id) * self.batch_size + place

        _seed_dataset(info.dataset, self.seed, self.epoch, position)


def _seed_dataset(dataset: Dataset, seed: int, epoch: c_longlong, position: Callable[[int], int]) -> None:
    """Give this dataset object a ``__getitem__`` that seeds the generators for the sample and restores them.

    The object stays an instance of its class, with its attributes, because hooks and samplers may inspect it.
    """
    kind = type(dataset)
    current, count = -1, 0

    def seeded_getitem(self, index):
        nonlocal current, count
        if epoch.value != current:
            current, count = epoch.value, 0
        with seeded(_mix(seed, current, position(count))):
            count += 1
            return kind.__getitem__(self, index)

    methods = dict(__getitem__=seeded_getitem)
    if hasattr(kind, '__getitems__'):  # torch prefers this method, which loads a batch
        methods['__getitems__'] = lambda self, indices: [self[index] for index in indices]
    dataset.__class__ = type(kind.__name__, (kind,), dict(methods, __module__=kind.__module__))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators of Python, NumPy and torch (CPU) for a block, and restore them."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
