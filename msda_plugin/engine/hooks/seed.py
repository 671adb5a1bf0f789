"""Random numbers of a training that follow from its seed, the epoch and the sample, and from nothing else."""

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
    """Makes every epoch a function of seed, epoch and the state that a checkpoint holds.

    At the beginning of an epoch Python's, NumPy's and torch's generators are seeded from the seed of the training and
    the epoch, and before a sample is loaded from these and its position in the epoch. Thus a training that is killed
    and resumed draws what one without a break draws, dropout and augmentation alike, with any number of processes
    that load data. (MMEngine seeds once: a resumed training draws the numbers of its first epoch again; so do workers
    that are not persistent, in every epoch.)

    Iteration-based loops, which know no epochs, are left to MMEngine's seeding. `msda_plugin.DetectionRunner` adds this
    hook by itself.
    """

    priority = 'VERY_HIGH'  # before hooks that draw numbers

    def __init__(self) -> None:
        self._epoch: c_longlong | None = None  # shared with the processes that load data, which may outlive an epoch

    def before_train(self, runner: Runner) -> None:
        if self._epoch is None and isinstance(runner.train_loop, EpochBasedTrainLoop):
            self._epoch = RawValue(c_longlong, -1)
            _seed_samples(runner.train_dataloader, _mix(runner.seed, get_rank()), self._epoch)

    def before_train_epoch(self, runner: Runner) -> None:
        if self._epoch is not None:
            self._epoch.value = runner.epoch
            set_random_seed(_mix(runner.seed, runner.epoch))

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        # Once more: a data loader draws a number for its workers when it starts them, which some epochs do.
        if self._epoch is not None and batch_idx == 0:
            set_random_seed(_mix(runner.seed, runner.epoch))


def _mix(*numbers: int) -> int:
    """One seed of 32 bits from several numbers; neighbouring ones give seeds that are far from each other."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _seed_samples(loader: DataLoader, seed: int, epoch: c_longlong) -> None:
    """Seed the generators anew for every sample that `loader` loads, here or in its workers."""
    if isinstance(loader.dataset, (list, tuple, IterableDataset)):  # which draw nothing, or have no samples to ask for
        return
    if loader.num_workers:
        loader.worker_init_fn = _SeedWorker(seed, epoch, loader.batch_size or 1, loader.worker_init_fn)
    else:
        _seed_dataset(loader.dataset, seed, epoch, lambda count: count)


class _SeedWorker:
    """Called in each worker when it starts: what it has then is its own copy of the data set."""

    def __init__(self, seed: int, epoch: c_longlong, batch_size: int, then: Callable[[int], None] | None) -> None:
        self.seed, self.epoch, self.batch_size, self.then = seed, epoch, batch_size, then

    def __call__(self, worker_id: int) -> None:
        if self.then is not None:
            self.then(worker_id)
        info = get_worker_info()

        def position(count: int) -> int:
            """In the epoch, of the sample that is number `count` in this worker: batches are dealt out in turn."""
            batch, place = divmod(count, self.batch_size)
            return (batch * info.num_workers + worker_id) * self.batch_size + place

        _seed_dataset(info.dataset, self.seed, self.epoch, position)


def _seed_dataset(dataset: Dataset, seed: int, epoch: c_longlong, position: Callable[[int], int]) -> None:
    """Give this one data set a ``__getitem__`` that draws from generators seeded for the sample, and restores them.

    It stays an instance of its class, with its attributes: hooks and samplers that look into it see no wrapper.
    """
    kind = type(dataset)
    current, count = -1, 0

    def seeded_getitem(self, index):
        nonlocal current, count
        if epoch.value != current:
            current, count = epoch.value, 0
        with _seeded(_mix(seed, current, position(count))):
            count += 1
            return kind.__getitem__(self, index)

    methods = dict(__getitem__=seeded_getitem)
    if hasattr(kind, '__getitems__'):  # of a whole batch, which torch asks for where there is such a method
        methods['__getitems__'] = lambda self, indices: [self[index] for index in indices]
    dataset.__class__ = type(kind.__name__, (kind,), dict(methods, __module__=kind.__module__))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
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
