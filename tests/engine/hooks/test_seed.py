"""Random numbers of a sample depend on the seed, the epoch and its position only."""

import random
from functools import partial
from multiprocessing import RawValue

import numpy as np
import pytest
import torch
from mmengine.dataset import worker_init_fn
from torch.utils.data import DataLoader, Dataset, Subset

from msda_plugin.engine.hooks import EpochSeedHook
from msda_plugin.engine.hooks.seed import _seed_samples


class Draws(Dataset):
    flag = 'a'

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return index, random.random(), np.random.rand(), float(torch.rand(()))


def epochs(workers, dataset=None, seed=5, numbers=(0, 1), persistent=True, indices=None, then=None):
    loader = DataLoader(
        dataset or Draws(),
        batch_size=2,
        num_workers=workers,
        sampler=indices,
        worker_init_fn=then,
        persistent_workers=persistent and workers > 0,
        collate_fn=list,
    )
    epoch = RawValue('q', -1)
    _seed_samples(loader, seed, epoch)
    drawn = []
    for epoch.value in numbers:
        drawn.append([sample for batch in loader for sample in batch])
    return drawn


@pytest.mark.parametrize('workers, persistent', [(1, True), (2, True), (2, False), (3, True)])
def test_any_number_of_workers(workers, persistent):
    assert epochs(workers, persistent=persistent) == epochs(0)


def test_each_sample_epoch_and_seed_gives_different_numbers():
    first, second = epochs(0)
    assert len({number for sample in first + second for number in sample[1:]}) == 2 * 7 * 3
    assert epochs(0, numbers=(1,)) == [second]  # as in a training that is resumed there
    assert epochs(0, seed=6)[0] != first


def test_an_image_that_is_sampled_twice_gets_different_numbers():
    (drawn,) = epochs(2, indices=[3, 3, 4, 3], numbers=(0,))
    assert len({sample[1:] for sample in drawn}) == 4


def test_the_generators_of_the_model_are_not_changed():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), float(torch.rand(()))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    loader = DataLoader(dataset := Draws(), batch_size=2, sampler=[0, 1], generator=torch.Generator())
    _seed_samples(loader, 5, RawValue('q', 0))
    list(loader)
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == expected
    assert isinstance(dataset, Draws) and type(dataset).__name__ == 'Draws' and dataset.flag == 'a'


def test_the_worker_init_fn_of_the_config_and_batched_getitems():
    then = partial(worker_init_fn, num_workers=1, rank=0, seed=0)
    subset = Subset(Draws(), range(7))  # torch asks it for batches
    assert epochs(1, dataset=subset, then=then) == epochs(0)


def test_a_list_is_not_changed():
    assert epochs(0, dataset=[1, 2, 3], numbers=(0,)) == [[1, 2, 3]]


def test_starting_workers_does_not_change_the_numbers():
    """A resumed training starts its workers in an epoch in which an uninterrupted one already has them."""

    class Runner:
        seed, epoch = 3, 1

    hook, drawn = EpochSeedHook(), []
    hook._epoch = RawValue('q', -1)
    for numbers_drawn in (0, 1):
        hook.before_train_epoch(Runner())
        torch.rand(numbers_drawn)
        hook.before_train_iter(Runner(), 0)
        drawn.append(torch.rand(2).tolist())
        hook.before_train_iter(Runner(), 1)
        drawn[-1] += torch.rand(2).tolist()
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 4
