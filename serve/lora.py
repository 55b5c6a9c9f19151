"""Low-rank adapters of many names on one base: tables of slots on the device, and their products.

    y = x W^T + (x A_s^T) B_s,   s the slot of the row's adapter

Matrices that the server fuses have one adapter together: A of its parts one below the other, B in
the corners of zeros, so that each part keeps its own (`weights` says which are fused, and how).
Every slot of a table is as wide as the largest rank; narrower adapters have zeros.

A batch of many adapters takes two products a matrix, whatever its rows have: all rows times all
A of the slots in use, zeros where a row has another adapter or none, times all B. Each slot is read
once, and a row without adapter gets an exact zero. (Rows could gather their own A and B instead,
which reads a slot as often as rows have it.) Source: S-LoRA (Sheng et al., 2311.03285) and Punica
(Chen et al., 2310.18547) group rows likewise, by kernels of their own.

Legend: S slots, U slots in use, R rank of a table, D inputs, N outputs, M rows.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Float, Int

from jaxsys.errors import UsageError
from jaxsys.model import DecoderConfig
from jaxsys.model.kinds import BlockKind
from jaxsys.model.leaves import block_leaves
from jaxsys.model.peft import LayerAdapters, largest_rank, read_layers
from jaxsys.serve.split import SPLIT, cut, devices_of
from jaxsys.serve.weights import FUSED, fuse

UNSERVED = ("experts/", "shared/weight", "attention/latent_up")
"""How the paths of kernels begin that no adapter is added to."""


class Pair(NamedTuple):
    """One matrix's adapters."""

    a: jax.Array
    """[S, R, D]."""
    b: jax.Array
    """[S, R, N], with scale / rank."""


Table = dict[str, Pair]
"""Of one layer, by matrix as `LayerWeights.matrices` has them."""


class AdaptedLayer(NamedTuple):
    """The adapters of one layer, and which row has which."""

    table: Table
    slots: Int[Array, " U"]
    rows: Int[Array, " B"]

    def added(
        self, y: Float[Array, "B ..."], x: Float[Array, "B ..."], name: str
    ) -> Float[Array, "B ..."]:
        """y, the product of x and the matrix `name`, with what each row's adapter adds."""
        pair = self.table.get(name)
        return y if pair is None else y + grouped(x, pair, self.slots, self.rows).reshape(y.shape)


class Adapted(NamedTuple):
    """What a pass is told of adapters."""

    tables: tuple[Table, ...]
    """Of each layer."""
    slots: Int[Array, " U"]
    """Those in use."""
    rows: Int[Array, " B"]
    """Each row's place in `slots`; -1 has none."""

    def layer(self, index: int) -> AdaptedLayer:
        """Of one layer."""
        return AdaptedLayer(self.tables[index], self.slots, self.rows)


def grouped(
    x: Float[Array, "B ..."], pair: Pair, slots: Int[Array, " U"], rows: Int[Array, " B"]
) -> Float[Array, "M N"]:
    """What adapters add to the product of x [B, ..., D] and their matrix."""
    a, b = pair
    if slots.shape[0] < a.shape[0]:
        a, b = a[slots], b[slots]
    used, rank, width = a.shape
    flat = x.reshape(-1, width)
    narrow = jax.lax.dot_general(
        flat,
        a.reshape(used * rank, width),
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    of_tokens = jnp.repeat(rows, flat.shape[0] // rows.shape[0])
    own = of_tokens[:, None] == jnp.arange(used, dtype=rows.dtype)[None]
    narrow = jnp.where(own[..., None], narrow.reshape(-1, used, rank), 0.0)
    return narrow.reshape(-1, used * rank).astype(x.dtype) @ b.reshape(used * rank, -1)


class Module(NamedTuple):
    """A matrix that has adapters."""

    name: str
    parts: tuple[str, ...]
    """The kernels that it fuses."""
    inputs: int
    columns: tuple[int, ...]
    """Outputs of each part."""


def modules(config: DecoderConfig, kind: BlockKind) -> list[Module]:
    """The matrices of a layer that may have adapters."""
    leaves = {
        "/".join(leaf.path): leaf
        for leaf in block_leaves(config, kind)
        if leaf.is_matrix and not "/".join(leaf.path).startswith(UNSERVED)
    }
    found = []
    for name, fused in FUSED.items():
        held = [(part, leaves.pop(part)) for part in fused if part in leaves]
        if name == "qkv" and config.latent is not None:  # its queries are not fused
            leaves.update(held)
        elif held:
            found.append(_module(name, held))
    return found + [
        _module(_FUSED_NAMES.get(path, path), [(path, leaf)]) for path, leaf in leaves.items()
    ]


_FUSED_NAMES = {"attention/out": "out"}


def _module(name: str, held: Sequence[tuple[str, Any]]) -> Module:
    columns = tuple(leaf.shape[-1] for _, leaf in held)
    return Module(name, tuple(path for path, _ in held), held[0][1].shape[-2], columns)


class AdapterSlots:
    """The slots of one instance. All but `read` is for the thread that dispatches."""

    def __init__(
        self,
        config: DecoderConfig,
        dtype: jnp.dtype,
        *,
        count: int,
        rank: int,
        placement: Sharding,
    ):
        """
        Args:
            dtype: that the passes compute in.
            count: most adapters at once.
            rank: the largest of them.
            placement: as the weights', one device's or those of a mesh of `jaxsys.serve.split`.
        """
        self.config = config
        self.dtype = dtype
        self.count = count
        self.rank = rank
        self._mesh: Mesh | None = None
        self._placement = placement
        if isinstance(placement, NamedSharding) and isinstance(placement.mesh, Mesh):
            self._mesh = placement.mesh
        self._modules = {kind.name: modules(config, kind) for kind in config.kinds}
        self._taken: dict[str, int] = {}
        self._kept: dict[str, list[Table]] = {}
        self.tables: tuple[Table, ...] = self._empty()
        for index in {
            config.kind(layer).name: layer for layer in range(config.num_layers)
        }.values():
            self._write(index, 0, self._zeros(index))  # compiled before anyone waits for it

    def slot(self, key: str | None) -> int | None:
        """Where an adapter lies; None where there is none."""
        return None if key is None else self._taken.get(key)

    def read(self, folder: str | Path) -> list[Table]:
        """A folder's adapters as the tables take them; touches no device.

        Raises:
            UsageError: if it is none of this model's, or wider than a slot.
        """
        widest = largest_rank(folder)
        if widest > self.rank:
            raise UsageError(
                f"{folder} has adapters of rank {widest}; at most {self.rank} is served: start "
                f"with --max-lora-rank {widest}"
            )
        layers = read_layers(folder, self.config)
        return [self._host(index, own, str(folder)) for index, own in enumerate(layers)]

    def put(self, key: str, values: list[Table]) -> None:
        """Writes what was read into a free slot.

        Raises:
            UsageError: if there is none.
        """
        free = sorted(set(range(self.count)) - set(self._taken.values()))
        if not free:
            raise UsageError(f"{self.count} adapters are loaded, as many as fit; unload one")
        for index, own in enumerate(values):
            self._write(index, free[0], own)
        self._taken[key], self._kept[key] = free[0], values

    def drop(self, key: str) -> None:
        """Frees a slot, which no request may use any more."""
        self._taken.pop(key, None)
        self._kept.pop(key, None)

    def rebuild(self) -> None:
        """After a fault of the device: writes anew what it may have lost."""
        if not any(leaf.is_deleted() for leaf in jax.tree.leaves(self.tables)):
            return
        self.tables = self._empty()
        for key, slot in self._taken.items():
            for index, own in enumerate(self._kept[key]):
                self._write(index, slot, own)

    # --- inside -------------------------------------------------------------------------------

    def _of(self, index: int) -> list[Module]:
        return self._modules[self.config.kind(index).name]

    def _placed(self, name: str) -> tuple[Sharding, Sharding]:
        """Where A and B of a matrix lie: split as the matrix is."""
        if self._mesh is None:
            return self._placement, self._placement
        split, none = SPLIT.get(name), PartitionSpec()
        last = cut(2)
        specs = (last if split == "inputs" else none, last if split == "outputs" else none)
        return NamedSharding(self._mesh, specs[0]), NamedSharding(self._mesh, specs[1])

    def _empty(self) -> tuple[Table, ...]:
        def pair(module: Module) -> Pair:
            rank = self.rank * len(module.parts)
            shapes = ((self.count, rank, module.inputs), (self.count, rank, sum(module.columns)))
            places = self._placed(module.name)
            return Pair(
                *(
                    jnp.zeros(shape, self.dtype, device=place)
                    for shape, place in zip(shapes, places, strict=True)
                )
            )

        return tuple(
            {module.name: pair(module) for module in self._of(index)}
            for index in range(self.config.num_layers)
        )

    def _zeros(self, index: int) -> Table:
        return self._host(index, {}, "")

    def _host(self, index: int, own: LayerAdapters, source: str) -> Table:
        """One layer's adapters in the form of a slot, in the host's memory."""
        table: dict[str, Any] = {}
        unserved = set(own)
        for module in self._of(index):
            rank = self.rank * len(module.parts)
            a = np.zeros((rank, module.inputs), np.float32)
            b = [np.zeros((rank, columns), np.float32) for columns in module.columns]
            for place, path in enumerate(module.parts):
                if path not in own:
                    continue
                unserved.discard(path)
                left, right = own[path]
                span = slice(place * self.rank, place * self.rank + left.shape[1])
                a[span], b[place][span] = left.T, right
            fused = fuse(self.config, module.name, b, devices_of(self._mesh))
            table[module.name] = Pair(
                cast(Any, a.astype(self.dtype)), fused.reshape(rank, -1).astype(self.dtype)
            )
        if unserved:
            raise UsageError(
                f"{source} has adapters of {min(unserved)!r}, which are not served; merge them "
                "into the model instead"
            )
        return table

    def _write(self, index: int, slot: int, own: Table) -> None:
        tables = list(self.tables)
        tables[index] = _written(tables[index], own, np.int32(slot))
        self.tables = tuple(tables)


@functools.partial(jax.jit, donate_argnums=0)
def _written(table: Table, own: Table, slot: jax.Array) -> Table:
    return jax.tree.map(lambda whole, one: whole.at[slot].set(one), table, own)
