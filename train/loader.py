"""Batches by global sample index: what makes a run resumable on any number of devices and hosts.

Sample k of a run is sample pi_e(k mod n) of the data, epoch e = k div n, pi_e a permutation drawn
from (seed, e): a pure function of k. A batch is G consecutive k; a run's whole data state is the
next k. Each process reads only the rows its devices need, through a grain pipeline of its own, so
neither the device count nor the process count changes which samples a batch holds.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import grain
import jax
import numpy as np

from jaxsys.errors import UsageError
from jaxsys.layered import PyTree


class Samples(Protocol):
    """Numbered samples: pytrees of equal shapes."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


class Batches:
    """A run's batches, each [rows, microbatch_size, ...], from any position on.

    Attributes:
        rows: microbatches in a batch, over all replicas.
        microbatch_size: B, samples in a microbatch.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        rows: int,
        microbatch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        transform: Callable[[Any], Any] | None = None,
        threads: int = 2,
        prefetch: int = 64,
    ) -> None:
        """Describes the batches; nothing is read yet.

        Args:
            samples: a sequence of samples, or any grain MapDataset.
            rows: microbatches in a batch.
            microbatch_size: B.
            seed: of the shuffling.
            shuffle: a new permutation each epoch, or the given order.
            transform: applied to each sample (grain's `map`).
            threads: that read ahead.
            prefetch: samples read ahead.

        Raises:
            UsageError: if there are no samples, or a size is not positive.
        """
        if rows < 1 or microbatch_size < 1:
            raise UsageError(
                f"rows={rows} and microbatch_size={microbatch_size} must be at least 1"
            )
        if len(samples) < 1:
            raise UsageError("there are no samples to train on")
        self.rows, self.microbatch_size = rows, microbatch_size
        self._options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
        source: Any = samples
        if not isinstance(samples, grain.MapDataset):
            source = grain.MapDataset.source(source)
        dataset: grain.MapDataset = source.seed(seed)
        if shuffle:
            dataset = dataset.shuffle()
        if transform is not None:
            dataset = dataset.map(transform)
        self._samples_per_epoch = len(samples)
        self._dataset = dataset.repeat(None)

    @property
    def batch_samples(self) -> int:
        """G, samples in a batch."""
        return self.rows * self.microbatch_size

    @property
    def samples_per_epoch(self) -> int:
        """n."""
        return self._samples_per_epoch

    def example(self) -> PyTree:
        """One whole batch's leaves as they would be at position 0, for their shapes."""
        return next(self.read(0))

    def read(self, position: int, rows: Sequence[int] | None = None) -> Iterator[PyTree]:
        """Batches from global sample `position` on, without end.

        Args:
            position: the next sample's global index.
            rows: which rows of each batch to read, ascending; all if not given.

        Yields:
            leaves [len(rows), B, ...], numpy.
        """
        chosen = list(range(self.rows)) if rows is None else list(rows)
        size = self.microbatch_size
        picks = np.asarray([row * size + b for row in chosen for b in range(size)], np.int64)
        source = _Picked(self._dataset, position, self.batch_samples, picks)
        stream = (
            grain.MapDataset.source(source)
            .to_iter_dataset(self._options)
            .batch(len(picks), drop_remainder=True)
        )
        for batch in stream:
            yield _split_rows(batch, len(chosen), size)

    def indices(self, position: int, rows: Sequence[int] | None = None) -> np.ndarray:
        """The global sample indices of one batch's rows, int64 [len(rows), B]."""
        chosen = np.asarray(range(self.rows) if rows is None else rows, np.int64)
        return position + chosen[:, None] * self.microbatch_size + np.arange(self.microbatch_size)


class _Picked:
    """The samples of chosen places in every batch, numbered through: grain reads ahead over it."""

    def __init__(
        self, dataset: grain.MapDataset, position: int, batch: int, picks: np.ndarray
    ) -> None:
        self._dataset, self._position, self._batch, self._picks = dataset, position, batch, picks

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, index: int) -> Any:
        turn, place = divmod(int(index), len(self._picks))
        return self._dataset[self._position + turn * self._batch + int(self._picks[place])]


def _split_rows(batch: PyTree, rows: int, size: int) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.reshape(rows, size, *leaf.shape[1:]), batch)
