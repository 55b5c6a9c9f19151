"""What of a batch is cut where several devices share each sequence, and how it gets to them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxsys.context import ContextSplit
from jaxsys.errors import UsageError
from jaxsys.layered import LayeredModel, PyTree


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """A model's sequences and how they lie over devices; without a split each is whole."""

    model: LayeredModel
    split: ContextSplit | None = None

    def specs(self, batch: PyTree, rows: Any) -> PyTree:
        """PartitionSpecs of leaves [M, B, ...]: microbatches over `rows`, sequences as cut."""
        found = jax.tree.map(lambda _: PartitionSpec(rows), batch)
        for name, axis in self._axes(batch).items():
            assert self.split is not None
            cut = PartitionSpec(rows, *[None] * axis, self.split.axis)
            found[name] = jax.tree.map(lambda _, cut=cut: cut, batch[name])
        return found

    def check(self, batch: PyTree) -> None:
        """Raises UsageError unless the sequences of leaves [M, B, ...] are there to be cut."""
        needed = self.model.sequences if self.split is not None else None
        for name in needed or ():
            assert self.split is not None
            if not isinstance(batch, Mapping) or name not in batch:
                raise UsageError(
                    f"a batch has no leaf {name!r}, whose sequences context={self.split.parts} "
                    "devices share (LayeredModel.sequences)"
                )
        for name, axis in self._axes(batch).items():
            assert self.split is not None
            for leaf in jax.tree.leaves(batch[name]):
                self.split.check_length(leaf.shape[axis + 1])

    def own(self, batch: PyTree) -> PyTree:
        """Inside shard_map: the parts that `specs` puts on a device -> its pieces, [M, B, ...]."""
        split = self.split
        if split is None:
            return batch
        pieces = {
            name: jax.tree.map(lambda leaf, s=split, a=axis + 1: s.own(leaf, a), batch[name])
            for name, axis in self._axes(batch).items()
        }
        return {**batch, **pieces} if pieces else batch

    def part(self, microbatch: PyTree) -> PyTree:
        """Shapes of a microbatch [B, ...] -> those of a device's part of it."""
        split = self.split
        if split is None:
            return microbatch

        def cut(leaf: Any, axis: int) -> jax.ShapeDtypeStruct:
            split.check_length(leaf.shape[axis])
            shape = list(leaf.shape)
            shape[axis] //= split.parts
            return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)

        pieces = {
            name: jax.tree.map(lambda leaf, a=axis: cut(leaf, a), microbatch[name])
            for name, axis in self._axes(microbatch).items()
        }
        return {**microbatch, **pieces} if pieces else microbatch

    def _axes(self, batch: PyTree) -> Mapping[str, int]:
        """Leaves that are cut -> the axis of a microbatch's sequences."""
        if self.split is None:
            return {}
        axes = self.model.sequences or {}
        there = batch if isinstance(batch, Mapping) else {}
        return {name: axis for name, axis in axes.items() if name in there}
