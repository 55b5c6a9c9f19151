"""Which samples a batch holds depends on the position alone: not on hosts, devices or restarts."""

import itertools

import grain
import numpy as np
import pytest

from jaxsys.errors import UsageError
from jaxsys.train import Batches


def indices(batches: Batches, position: int, count: int, rows=None) -> np.ndarray:
    """The sample numbers of `count` batches, [count, rows, B]."""
    stream = itertools.islice(batches.read(position, rows), count)
    return np.stack([batch["index"] for batch in stream])


def test_an_epoch_holds_every_sample_once_and_epochs_differ(counted_samples):
    batches = Batches(counted_samples, rows=2, microbatch_size=4, seed=3)
    first, second = indices(batches, 0, 10).reshape(2, 40)
    assert sorted(first) == sorted(second) == list(range(40))
    assert first.tolist() != second.tolist()


def test_hosts_together_read_the_batch_of_one(counted_samples):
    batches = Batches(counted_samples, rows=4, microbatch_size=2)
    whole = indices(batches, 8, 3)
    for split in ([[0, 1], [2, 3]], [[0], [1], [2], [3]], [[1, 3], [0, 2]]):
        for rows in split:
            assert indices(batches, 8, 3, rows).tolist() == whole[:, rows].tolist()


def test_going_on_with_another_layout_neither_repeats_nor_skips(counted_samples):
    def at(rows, size):
        return Batches(counted_samples, rows=rows, microbatch_size=size, seed=5)

    uninterrupted = indices(at(8, 1), 0, 10).reshape(-1)
    # Five steps of 8 x 1, then 2 rows of 4 (fewer devices), then a batch twice as large.
    before = indices(at(8, 1), 0, 5).reshape(-1)
    fewer = indices(at(2, 4), 40, 1).reshape(-1)
    larger = indices(at(8, 2), 48, 2).reshape(-1)
    assert np.concatenate([before, fewer, larger]).tolist() == uninterrupted.tolist()


def test_seed_shuffle_and_transform(counted_samples):
    def at(**options):
        return indices(
            Batches(counted_samples, rows=1, microbatch_size=8, **options), 0, 2
        ).reshape(-1)

    assert at(shuffle=False).tolist() == list(range(16))
    assert at(seed=1).tolist() == at(seed=1).tolist() != at(seed=2).tolist()
    doubled = at(shuffle=False, transform=lambda s: {**s, "index": s["index"] * 2})
    assert doubled.tolist() == list(range(0, 32, 2))


def test_a_grain_dataset_is_taken_as_it_is(counted_samples):
    dataset = grain.MapDataset.source(counted_samples).filter(lambda s: s["index"] < 1000)[:16]
    batches = Batches(dataset, rows=2, microbatch_size=2, shuffle=False)
    assert indices(batches, 0, 4).reshape(-1).tolist() == list(range(16))


def test_no_samples_and_no_size(counted_samples):
    with pytest.raises(UsageError, match="no samples"):
        Batches([], rows=1, microbatch_size=1)
    with pytest.raises(UsageError, match="at least 1"):
        Batches(counted_samples, rows=0, microbatch_size=1)
