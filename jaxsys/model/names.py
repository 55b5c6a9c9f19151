"""Which tensors of a checkpoint hold which leaves, stated once for reading and writing.

Checkpoints keep kernels [out, in], one tensor a layer, experts apart or together, some matrices
joined; we keep kernels [in, out], layers stacked and matrices apart. A `FileTensor` says which
leaves one tensor holds and how. Families differ in names alone, see `jaxsys.model.families`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxsys.model.config import DecoderConfig
from jaxsys.model.families import FAMILIES, Family
from jaxsys.model.kinds import BlockKind
from jaxsys.model.leaves import Leaf, Path, block_leaves, edge_leaves

Form = Literal["plain", "turned", "rows", "woven"]

MODULES: Mapping[str, str] = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.o_proj",
    "attention/query_norm": "self_attn.q_norm",
    "attention/key_norm": "self_attn.k_norm",
    "attention/query_down": "self_attn.q_a_proj",
    "attention/query_down_norm": "self_attn.q_a_layernorm",
    "attention/query_up": "self_attn.q_b_proj",
    "attention/latent_down": "self_attn.kv_a_proj_with_mqa",
    "attention/latent_norm": "self_attn.kv_a_layernorm",
    "attention/latent_up": "self_attn.kv_b_proj",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
    "experts/router": "mlp.gate",
    "experts/gate": "mlp.experts.{item}.gate_proj",
    "experts/up": "mlp.experts.{item}.up_proj",
    "experts/down": "mlp.experts.{item}.down_proj",
    "shared/gate": "mlp.shared_experts.gate_proj",
    "shared/up": "mlp.shared_experts.up_proj",
    "shared/down": "mlp.shared_experts.down_proj",
    "shared/weight": "mlp.shared_expert_gate",
}
"""Llama's names, and those that most families give what Llama lacks."""

WHOLE: Mapping[str, str] = {
    "attention/sinks": "self_attn.sinks",
    "experts/correction": "mlp.gate.e_score_correction_bias",
}
"""Tensors that are no module's weight or bias."""

LAYER = "model.layers.{layer}."


@dataclass(frozen=True, slots=True, kw_only=True)
class FileTensor:
    """One tensor of a checkpoint, of one layer where it belongs to a block."""

    name: str
    """With {layer} and {item} unfilled; items are the places of the leaves' first axis."""
    leaves: tuple[Leaf, ...]
    form: Form = "plain"
    """`turned`: the last two axes change places. `rows`: leaves one below the other, each turned
    where it is a kernel. `woven`: two leaves take turns on the last axis."""
    halves: bool = False
    """Whether rotary pairs lie side by side here and apart in the leaf."""
    more: float = 0.0
    """What the tensor's numbers are more than the leaf's."""

    @property
    def items(self) -> int | None:
        """How many tensors share the name."""
        return self.leaves[0].shape[0] if "{item}" in self.name else None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor, of one item."""
        shapes = [self._own(leaf) for leaf in self.leaves]
        if self.form == "woven":
            return (*shapes[0][:-1], 2 * shapes[0][-1])
        if self.form == "rows":
            turned = [_turned_shape(shape) for shape in shapes]
            return (sum(shape[0] for shape in turned), *turned[0][1:])
        return _turned_shape(shapes[0]) if self.form == "turned" else shapes[0]

    def spans(self) -> list[tuple[tuple[int, ...], int, int]]:
        """Which leaves, by number, lie in which rows of the tensor, of one item."""
        if self.form == "rows":
            ends = np.cumsum([_turned_shape(self._own(leaf))[0] for leaf in self.leaves]).tolist()
            starts = [0, *ends[:-1]]
            return [
                ((number,), *span) for number, span in enumerate(zip(starts, ends, strict=True))
            ]
        return [(tuple(range(len(self.leaves))), 0, self.shape[0])]

    def fill(self, number: int, leaf: np.ndarray, start: int, rows: np.ndarray) -> None:
        """Writes what some rows of the tensor hold of a leaf to its place there.

        Args:
            number: the leaf's.
            leaf: its values, of one item; those of these rows are written, in its dtype.
            start: which rows, counted from the first that holds something of the leaf.
            rows: the tensor's.
        """
        if self.more:
            rows = rows - np.asarray(self.more, rows.dtype)
        if self.form == "woven":
            rows = rows[..., number::2]
        place: slice | np.ndarray = slice(start, start + rows.shape[0])
        heads = self.leaves[number].turning_heads
        if self.halves and heads is not None:
            place = np.argsort(apart(np.arange(_turned_shape(leaf.shape)[0]), heads))[place]
        if self.form in ("plain", "woven") or leaf.ndim == 1:
            leaf[place] = rows
        elif leaf.ndim == 2:
            leaf[:, place] = rows.T
        else:
            leaf[place] = np.swapaxes(rows, -1, -2)

    def rows(self, values: Sequence[Any], start: int, stop: int) -> Iterator[np.ndarray]:
        """Some rows of the tensor made of its leaves, each of one item; in pieces.

        Args:
            values: the leaves: arrays, or what gives arrays for slices of its axes.
        """
        if self.form == "woven":
            parts = [np.asarray(value[start:stop]) for value in values]
            yield np.stack(parts, axis=-1).reshape(stop - start, *self.shape[1:])
            return
        for numbers, first, end in self.spans():
            part = slice(max(start, first) - first, min(stop, end) - first)
            if part.start >= part.stop:
                continue
            value = values[numbers[0]]
            if self.form == "plain" or len(value.shape) == 1:
                made = np.asarray(value[part])
                yield made + np.asarray(self.more, made.dtype) if self.more else made
            elif len(value.shape) == 2:
                yield np.asarray(value[:, part]).T
            else:
                yield np.asarray(value[part]).swapaxes(-1, -2)

    def give(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """The tensor made of its leaves, each of one item."""
        if self.form == "woven":
            return np.stack(values, axis=-1).reshape(*values[0].shape[:-1], -1)
        if self.form == "plain":
            return values[0] + np.asarray(self.more, values[0].dtype) if self.more else values[0]
        turned = [np.swapaxes(part, -1, -2) if part.ndim > 1 else part for part in values]
        return np.concatenate(turned)

    def _own(self, leaf: Leaf) -> tuple[int, ...]:
        return leaf.shape if self.items is None else leaf.shape[1:]


def _turned_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if len(shape) < 2 else (*shape[:-2], shape[-1], shape[-2])


def apart(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows [out, ...] from pairs side by side to halves: (2i, 2i+1) -> (i, i+K/2)."""
    rest = rows.shape[1:]
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rest)
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def edge_tensors(config: DecoderConfig) -> list[FileTensor]:
    """A Hugging Face checkpoint's tensors outside the blocks."""
    family = FAMILIES[config.family]
    return [_alone(family, leaf, "") for leaf in edge_leaves(config)]


def block_tensors(config: DecoderConfig, kind: BlockKind) -> list[FileTensor]:
    """A Hugging Face checkpoint's tensors of one block of a kind."""
    family = FAMILIES[config.family]
    leaves = {"/".join(leaf.path): leaf for leaf in block_leaves(config, kind)}
    tensors = join(leaves, family.joined, family.woven, LAYER)
    return tensors + [_alone(family, leaf, LAYER) for leaf in leaves.values()]


def join(
    leaves: dict[str, Leaf],
    joined: Mapping[str, tuple[str, ...]],
    woven: Mapping[str, tuple[str, ...]],
    prefix: str,
) -> list[FileTensor]:
    """Tensors of several leaves; takes those leaves out of `leaves`."""
    tensors = []
    tables: tuple[tuple[Form, Mapping[str, tuple[str, ...]]], ...]
    tables = (("rows", joined), ("woven", woven))
    for form, table in tables:
        for name, parts in table.items():
            for suffix, end in (("", ".weight" if form == "rows" else ""), ("_bias", "_bias")):
                found = [leaves.get(part + suffix) for part in parts]
                if any(leaf is None for leaf in found):
                    continue
                end = ".bias" if form == "rows" and suffix else end
                held = tuple(leaf for leaf in found if leaf is not None)
                tensors.append(FileTensor(name=f"{prefix}{name}{end}", leaves=held, form=form))
                for part in parts:
                    del leaves[part + suffix]
    return tensors


def _alone(family: Family, leaf: Leaf, prefix: str) -> FileTensor:
    name = hf_name(family, leaf.path)
    # What is kept whole in one tensor for all experts is kept [in, out] there too.
    whole = leaf.path[0] == "experts" and "{item}" not in name and len(leaf.shape) == 3
    turned = leaf.is_matrix and not whole
    return FileTensor(name=prefix + name, leaves=(leaf,), form="turned" if turned else "plain")


def hf_name(family: Family, path: Path) -> str:
    """A leaf's name in the family's Hugging Face checkpoints, within its layer."""
    key = "/".join(path)
    for table in (family.whole, WHOLE):
        if key in table:
            return table[key]
    part, is_bias = key, False
    if path[-1] in ("scale", "kernel", "table"):
        part = "/".join(path[:-1])
    elif path[-1] == "bias":
        part, is_bias = "/".join(path[:-1]), True
    elif path[-1].endswith("_bias"):
        part, is_bias = key.removesuffix("_bias"), True
    module = family.modules.get(part, MODULES.get(part))
    if module is None:
        raise KeyError(f"no name is known for {key}")
    return module + (".bias" if is_bias else ".weight")
