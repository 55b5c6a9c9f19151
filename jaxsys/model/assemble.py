"""From a checkpoint's tensors, read some rows at a time, to the parameters, straight onto devices.

Beside the result, the host and each device hold one layer's leaf at most: rows of a tensor are
read and cast into their places in its leaves, and a leaf is written into its layer's place of the
stacked array.
"""

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike

from jaxsys.errors import UsageError
from jaxsys.layered import Parameters
from jaxsys.model.config import DecoderConfig
from jaxsys.model.decoder import by_kind, nest
from jaxsys.model.kinds import BlockKind
from jaxsys.model.leaves import Leaf, Path
from jaxsys.model.names import FileTensor
from jaxsys.model.packed import Packed
from jaxsys.model.rows import Rows

Fetch = Callable[[str], Rows]
"""Tensor name -> its values as the checkpoint has them."""
FetchPacked = Callable[[str], Packed | None]
"""Tensor name -> its codes and exponents, host arrays; None where it is not packed."""
Tensors = Callable[[BlockKind | None], Sequence[FileTensor]]
"""The tensors of one block of a kind; of the edge where it is None."""
Placement = Callable[[Path], Sharding | None]
"""Where a leaf of the parameters, by its path from the root, rests; None: the default device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An open checkpoint, found and checked, whose numbers are still where they lie."""

    config: DecoderConfig
    fetch: Fetch
    tensors: Tensors
    """Which tensors hold the leaves."""
    fetch_packed: FetchPacked = lambda name: None

    def parameters(self, dtype: DTypeLike, placement: Placement | None = None) -> Parameters:
        """Reads every leaf.

        Args:
            dtype: of the result.
            placement: of each leaf, stacked for blocks; the default device if not given.

        Raises:
            UsageError: if a tensor holds NaN or infinity, or values beyond what `dtype` can
                express.
        """
        config, dtype = self.config, jnp.dtype(dtype)
        where = placement or (lambda path: None)
        edge = _edge(self.tensors(None), self.fetch, dtype, lambda path: where(("edge", *path)))
        blocks = {}
        for kind in config.kinds:
            lead = ("blocks", kind.name) if config.pattern else ("blocks",)
            blocks[kind.name] = _stack(
                config.layers_of(kind),
                self.tensors(kind),
                self.fetch,
                dtype,
                lambda path, lead=lead: where((*lead, *path)),
            )
        return {"edge": edge, "blocks": by_kind(config, blocks)}

    def by_leaf(self, dtype: DTypeLike) -> Parameters:
        """Parameters whose leaves are functions that read them when they are called.

        For those who keep leaves in a form of their own: beside that, nothing lies but the leaves
        of one tensor. "blocks" is a function of a layer's number that gives the layer's. Arrays
        come to the default device; what is packed stays so. The functions raise UsageError as
        `parameters` does.
        """
        leaves = Leaves(self, dtype)

        def placed(layer: int | None, path: Path) -> Any:
            value = leaves.take(layer, path)
            if isinstance(value, Packed):
                return jax.device_put(jax.tree.map(np.array, value))
            made = jax.device_put(value)
            if not bool(_is_finite(made)):
                raise not_finite(leaves.name(layer, path), leaves.dtype)
            return made

        def tree(layer: int | None) -> dict[str, Any]:
            paths = [leaf.path for tensor in leaves.tensors(layer) for leaf in tensor.leaves]
            return nest((path, functools.partial(placed, layer, path)) for path in paths)

        return {"edge": tree(None), "blocks": tree}


class Leaves:
    """Leaves of an open checkpoint as host arrays, each read when it is asked for."""

    def __init__(self, checkpoint: Checkpoint, dtype: DTypeLike) -> None:
        self._checkpoint, self.dtype = checkpoint, jnp.dtype(dtype)
        self._held: dict[tuple[int | None, Path], np.ndarray | Packed] = {}

    def tensors(self, layer: int | None) -> Sequence[FileTensor]:
        """Those of a layer by its number; of the edge where it is None."""
        kind = None if layer is None else self._checkpoint.config.kind(layer)
        return self._checkpoint.tensors(kind)

    def name(self, layer: int | None, path: Path) -> str:
        """Of the tensor that holds a leaf."""
        return _named(self._tensor(layer, path).name, **_filled(layer))

    def read(self, layer: int | None, path: Path) -> np.ndarray | Packed:
        """
        Args:
            layer: its number; None for the edge.
            path: of the leaf, within the layer or the edge.

        Returns:
            Its values; they, and those that cannot be read without them, stay until others are
            asked for. What the dtype cannot express is infinite.
        """
        if (layer, path) not in self._held:
            self._held = {}  # before the next ones are there
            self._held = {(layer, leaf.path): value for leaf, value in self._beside(layer, path)}
        return self._held[layer, path]

    def take(self, layer: int | None, path: Path) -> np.ndarray | Packed:
        """The same, of which nothing stays here."""
        value = self.read(layer, path)
        del self._held[layer, path]
        return value

    def _beside(self, layer: int | None, path: Path) -> Iterator[tuple[Leaf, np.ndarray | Packed]]:
        """A leaf, and those that cannot be read without it."""
        tensor, filled = self._tensor(layer, path), _filled(layer)
        held = self._checkpoint.fetch_packed(_named(tensor.name, **filled))
        if held is not None:
            yield from zip(tensor.leaves, _packed_leaves(tensor, held), strict=True)
        else:
            yield from _read(tensor, self._checkpoint.fetch, filled, self.dtype, only=path)

    def _tensor(self, layer: int | None, path: Path) -> FileTensor:
        for tensor in self.tensors(layer):
            if path in [leaf.path for leaf in tensor.leaves]:
                return tensor
        raise KeyError(path)


def _filled(layer: int | None) -> dict[str, int]:
    return {} if layer is None else {"layer": layer}


def _edge(
    tensors: Sequence[FileTensor], fetch: Fetch, dtype: np.dtype, where: Placement
) -> dict[str, Any]:
    """The leaves outside the layers."""
    made: list[tuple[Path, Any]] = []
    for tensor in tensors:
        for leaf, value in _read(tensor, fetch, {}, dtype):
            placed = jax.device_put(value, where(leaf.path))
            if not bool(_is_finite(placed)):
                raise not_finite(tensor.name, dtype)
            made.append((leaf.path, placed))
            del value  # before the next one is there
    return nest(made)


def _stack(
    layers: Sequence[int],
    tensors: Sequence[FileTensor],
    fetch: Fetch,
    dtype: np.dtype,
    where: Placement,
) -> dict[str, Any]:
    """The leaves of the layers of one kind, stacked."""
    made: list[tuple[Path, jax.Array]] = []
    for tensor in tensors:
        places = [where(leaf.path) for leaf in tensor.leaves]
        stacks = [
            jnp.zeros((len(layers), *leaf.shape), dtype, device=place)
            for leaf, place in zip(tensor.leaves, places, strict=True)
        ]
        flags, names = [], []
        for index, layer in enumerate(layers):
            for number, (_, value) in enumerate(_read(tensor, fetch, {"layer": layer}, dtype)):
                placed = jax.device_put(value, _of_layer(places[number]))
                stacks[number], finite = _write(stacks[number], placed, index)
                flags.append(finite)
                names.append(_named(tensor.name, layer=layer))
                finite.block_until_ready()  # or reading runs ahead, and all that is read lies here
                del value, placed
        _check_finite(flags, names, dtype)
        made += [(leaf.path, stack) for leaf, stack in zip(tensor.leaves, stacks, strict=True)]
    return nest(made)


def _of_layer(place: Sharding | None) -> Sharding | None:
    """Where one layer of a stack placed so belongs."""
    if not isinstance(place, NamedSharding):
        return place
    return NamedSharding(place.mesh, PartitionSpec(*tuple(place.spec)[1:]))


def _packed_leaves(tensor: FileTensor, held: Packed) -> list[Packed]:
    """What is packed, leaf by leaf; views."""
    if tensor.form != "woven":
        return [held]
    # Outputs take turns.
    return [jax.tree.map(lambda a, at=at: a[:, at::2], held) for at in (0, 1)]


def _read(
    tensor: FileTensor,
    fetch: Fetch,
    filled: Mapping[str, int],
    dtype: np.dtype,
    *,
    only: Path | None = None,
) -> Iterator[tuple[Leaf, np.ndarray]]:
    """The leaves that a tensor holds, one after the other, items put together.

    They are copies, which outlive the file; what `dtype` cannot express becomes infinity, which is
    found later.

    Args:
        only: those that lie in the same rows as the leaf of this path.
    """
    name = _named(tensor.name, **filled)
    for numbers, first, end in tensor.spans():
        leaves = [tensor.leaves[number] for number in numbers]
        if only is not None and only not in [leaf.path for leaf in leaves]:
            continue
        made = [np.empty(leaf.shape, dtype) for leaf in leaves]
        for item in [None] if tensor.items is None else range(tensor.items):
            rows = fetch(name if item is None else _named(name, item=item))
            for start, piece in rows.pieces(first, end):
                for number, whole in zip(numbers, made, strict=True):
                    with np.errstate(over="ignore"):
                        tensor.fill(
                            number, whole if item is None else whole[item], start - first, piece
                        )
        for leaf in leaves:
            value = made.pop(0)  # so that it goes when its receiver is done with it
            yield leaf, value
            del value


def _named(name: str, **filled: int) -> str:
    for key, value in filled.items():
        name = name.replace(f"{{{key}}}", str(value))
    return name


@functools.partial(jax.jit, donate_argnums=0)
def _write(stack: jax.Array, value: jax.Array, index: int) -> tuple[jax.Array, jax.Array]:
    """The stack with one layer written, in place, and whether the layer is finite."""
    written = jax.lax.dynamic_update_index_in_dim(stack, value, index, 0)
    return written, jnp.isfinite(value).all()


@jax.jit
def _is_finite(value: jax.Array) -> jax.Array:
    return jnp.isfinite(value).all()


def _check_finite(flags: Sequence[jax.Array], names: Sequence[str], dtype: np.dtype) -> None:
    """Raises UsageError naming the first tensor that is not finite."""
    for finite, name in zip(flags, names, strict=True):
        if not bool(finite):
            raise not_finite(name, dtype)


def not_finite(name: str, dtype: np.dtype) -> UsageError:
    """What to say of a tensor that holds NaN or infinity."""
    return UsageError(
        f"tensor {name!r} holds NaN or infinity as {dtype}; the checkpoint is damaged, of a run "
        "that diverged, or needs a dtype of more range"
    )


def check_layers(source: str, config: DecoderConfig, found: Collection[str]) -> None:
    """Raises UsageError if there are fewer tensors than layers, before names are made for all."""
    if config.num_layers > len(found):
        raise UsageError(
            f"{source}: its configuration says {config.num_layers} layers, but it holds "
            f"{len(found)} tensors in all; the file is incomplete or of another model"
        )


def expected_tensors(config: DecoderConfig, tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """Every tensor a checkpoint of this configuration must hold, with its shape there."""
    found: dict[str, tuple[int, ...]] = {}

    def add(tensor: FileTensor, **filled: int) -> None:
        if tensor.items is None:
            found[_named(tensor.name, **filled)] = tensor.shape
            return
        for item in range(tensor.items):
            found[_named(tensor.name, item=item, **filled)] = tensor.shape

    for tensor in tensors(None):
        add(tensor)
    for kind in config.kinds:
        for tensor in tensors(kind):
            for layer in config.layers_of(kind):
                add(tensor, layer=layer)
    return found


def check_tensors(
    source: str,
    expected: dict[str, tuple[int, ...]],
    found: dict[str, tuple[int, ...]],
    *,
    ignored: Iterable[str] = (),
) -> None:
    """Compares names and shapes before anything is read.

    Raises:
        UsageError: if a tensor is missing, unexpected, or of another shape.
    """
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise UsageError(
            f"{source} lacks {len(missing)} tensor(s) that its configuration names, first "
            f"{missing[0]!r}; the file is incomplete or of another architecture"
        )
    extra = sorted(found.keys() - expected.keys() - set(ignored))
    if extra:
        raise UsageError(
            f"{source} holds {len(extra)} tensor(s) that its configuration does not name, first "
            f"{extra[0]!r}; it is of another architecture or has other layers than it says"
        )
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise UsageError(
                f"{source}: tensor {name!r} has shape {tuple(found[name])}, its configuration "
                f"says {shape}"
            )
