"""Epochs that are a part of a dataset."""

import pytest
from mmengine.registry import DATA_SAMPLERS

from msda_plugin.engine.part_sampler import PartSampler


def epochs(sampler, number):
    found = []
    for epoch in range(number):
        sampler.set_epoch(epoch)
        found.append(list(sampler))
    return found


@pytest.mark.parametrize('size, part', [(10, 3), (10, 5), (4, 10), (7, 7)])
def test_every_pass_has_every_sample_once(size, part):
    drawn = sum(epochs(PartSampler(range(size), part, seed=1), 20), [])
    assert len(drawn) == 20 * part
    for begin in range(0, 20 * part - size + 1, size):
        assert sorted(drawn[begin : begin + size]) == list(range(size))
    assert drawn[:size] != drawn[size : 2 * size]


def test_depends_on_seed_and_epoch_only():
    sampler = DATA_SAMPLERS.build(
        dict(type='msda_plugin.PartSampler', num_samples=3), default_args=dict(dataset=range(10), seed=5)
    )
    assert len(sampler) == 3
    before = epochs(sampler, 6)
    sampler.set_epoch(4)
    assert list(sampler) == before[4] and epochs(PartSampler(range(10), 3, seed=6), 6) != before


def test_processes_share_the_samples(monkeypatch):
    whole = epochs(PartSampler(range(10), 4, seed=1), 5)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr('mmengine.dataset.sampler.get_dist_info', lambda rank=rank: (rank, 2))
        parts.append(epochs(PartSampler(range(10), 4, seed=1), 5))
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(each) for each in whole]
    assert all(len(each) == 2 for part in parts for each in part)


def test_no_samples():
    with pytest.raises(ValueError, match='num_samples must be at least 1, got 0'):
        PartSampler(range(3), 0)
