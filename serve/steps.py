"""The compiled steps of an executor: which there are, how each is built, which one fits.

A step's key is its kind and its shape: ("decode", batch, table), ("inputs", batch, table),
("prefill", piece, table, continued), "score" and "pool" likewise, ("sample", batch, needs),
("copy", pages), ("clear", pages), ("extract", pages), ("insert", pages), ("set_last",); where
tokens are guessed, ("several", batch, table) and ("verify", batch, needs) too. Every call of a step
has the arguments of its shape, so none is compiled again; what a step changes is donated to it and
written in place.

Where somebody of a batch has an adapter, it takes a step of its own: ("decode_adapted", batch,
table, adapters), ("prefill_adapted", ...), "score_adapted", "pool_adapted". All others run what
they would run without adapters.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxsys.model import DecoderConfig
from jaxsys.serve import paged_model
from jaxsys.serve.cache_groups import cache_groups
from jaxsys.serve.host_pages import TOGETHER
from jaxsys.serve.iterations import Role, SchedulerConfig
from jaxsys.serve.lora import Adapted, Table
from jaxsys.serve.paged_attention import AttentionKernels
from jaxsys.serve.paged_model import Cache
from jaxsys.serve.sampling import SamplingNeeds, empty_history, pack_rules, sample
from jaxsys.serve.speculation import MOST_ROWS
from jaxsys.serve.verification import verify
from jaxsys.serve.weights import ServingWeights

COPIES = 8
"""Pages copied in one call."""
USUAL = (
    SamplingNeeds(),
    SamplingNeeds(random=True, cut=True),
    SamplingNeeds(random=True),
)
"""What batches mostly need computed to choose tokens."""

ADAPTED = "_adapted"
"""How the kind of a step ends that adds adapters."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorConfig:
    """The shapes that steps are compiled for, all ascending."""

    decode_buckets: tuple[int, ...]
    piece_buckets: tuple[int, ...]
    """Tokens of a prompt piece."""
    table_buckets: tuple[int, ...]
    """Pages of a block table, of one group of layers; the last one bounds a request's length."""
    transfer_buckets: tuple[int, ...]
    """Pages that change hands at once."""
    distinguish_first: bool = False
    """Whether a prompt's first piece has a step of its own, which need not look at pages."""
    adapter_buckets: tuple[int, ...] = ()
    """Adapters that a batch has at once, the last all that there may be; () where none is taken."""
    guesses: int = 0
    """Most tokens guessed of a request in a step; 0 where none are."""
    hosted: bool = False
    """Whether pages are copied to the host's memory and back."""

    @classmethod
    def for_scheduler(
        cls,
        scheduler: SchedulerConfig,
        *,
        distinguish_first: bool = False,
        adapter_buckets: tuple[int, ...] = (),
        guesses: int = 0,
    ) -> "ExecutorConfig":
        """Pieces in steps of 4x up to the token budget, one table for every length.

        The portable attention looks only at chunks that hold tokens, so a wide table costs nothing.
        """
        longest = -(-scheduler.max_length // scheduler.page_size)
        return cls(
            decode_buckets=scheduler.decode_buckets,
            piece_buckets=_geometric(scheduler.max_prefill_tokens, 4, least=32),
            table_buckets=(longest,),
            transfer_buckets=_geometric(
                longest * len(scheduler.windows), 4, least=min(longest, 16)
            ),
            distinguish_first=distinguish_first,
            adapter_buckets=adapter_buckets,
            guesses=guesses,
            hosted=scheduler.host_pages > 0,
        )

    @property
    def host_width(self) -> int:
        """Pages that are copied to the host or back at once."""
        buckets = self.transfer_buckets
        return next((size for size in buckets if size >= TOGETHER), buckets[-1])

    @property
    def guessing_buckets(self) -> tuple[int, ...]:
        """Batches of which steps that guess are compiled."""
        if not self.guesses:
            return ()
        return tuple(b for b in self.decode_buckets if b * (1 + self.guesses) <= MOST_ROWS)


class Steps:
    """The steps of one instance; `compile` is safe to call from another thread."""

    def __init__(
        self,
        config: DecoderConfig,
        kernels: AttentionKernels,
        weights: ServingWeights,
        cache: Cache,
        *,
        shapes: ExecutorConfig,
        slots: int,
        role: Role,
        placement: Sharding,
        tables: tuple[Table, ...] | None = None,
    ):
        """
        Args:
            cache: the pools that steps take and give, of which only form and place are kept.
            tables: those of adapters, likewise.
            slots: most requests that hold pages at once.
            placement: of whatever is whole on every device.
        """
        self.config = config
        self.kernels = kernels
        self.weights = weights
        self.shapes = shapes
        self.slots = slots
        self.role = role
        self.count = 0
        """Steps compiled so far."""
        self._groups = len(cache_groups(config).windows)
        self._placement = placement
        self._cache, self._tables = jax.tree.map(
            lambda pool: jax.ShapeDtypeStruct(pool.shape, pool.dtype, sharding=pool.sharding),
            (cache, tables),
        )
        self._compiled: dict[tuple, Callable] = {}

    def contents_like(self, width: int) -> jax.ShapeDtypeStruct:
        """The form of `width` extracted pages."""
        placement = self._cache[0].keys.sharding
        if isinstance(placement, NamedSharding):
            placement = NamedSharding(placement.mesh, PartitionSpec(None, *placement.spec))
        like = paged_model.contents_shape(self._cache, width)
        return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=placement)

    def essential(self) -> list[tuple]:
        """Keys of the steps without which the role cannot serve: the largest of each kind."""
        shapes = self.shapes
        batch, table = shapes.decode_buckets[-1], shapes.table_buckets[-1]
        keys: list[tuple] = []
        kinds = (SamplingNeeds(), SamplingNeeds(random=True, cut=True))
        if self.role != "decode":
            keys.append(("prefill", shapes.piece_buckets[-1], table, False))
            if shapes.distinguish_first:
                keys.append(("prefill", shapes.piece_buckets[-1], table, True))
            keys += [("sample", 1, needs) for needs in kinds]
        if self.role != "prefill":
            keys += [("decode", batch, table), ("inputs", batch, table)]
            keys += [("sample", batch, needs) for needs in kinds]
            # A lone request is the first thing most servers see.
            keys += [(kind, shapes.decode_buckets[0], table) for kind in ("decode", "inputs")]
            keys += [("sample", shapes.decode_buckets[0], needs) for needs in kinds]
        if shapes.adapter_buckets:
            most = shapes.adapter_buckets[-1]
            keys += [_adapted(key, most) for key in keys if key[0] in ("prefill", "decode")]
        return list(dict.fromkeys(keys))

    def others(self) -> list[tuple]:
        """Keys of the steps that make serving faster, the most used first."""
        shapes = self.shapes
        kinds_of_piece = (False, True) if shapes.distinguish_first else (False,)
        pieces = [
            ("prefill", piece, table, continued)
            for table in shapes.table_buckets
            for piece in shapes.piece_buckets
            for continued in kinds_of_piece
        ]
        batches = [
            (kind, batch, table)
            for table in shapes.table_buckets
            for batch in shapes.decode_buckets
            for kind in ("decode", "inputs")
        ]
        hand_over = [("extract", count) for count in shapes.transfer_buckets]
        take_up = [("insert", count) for count in shapes.transfer_buckets]
        keys: list[tuple] = []
        if self.role == "prefill":
            keys += [*hand_over, *pieces, ("copy", COPIES)]
            rows: tuple[int, ...] = (1,)
        else:
            keys += [*batches, *(take_up if self.role == "decode" else ()), ("set_last",)]
            keys += [*pieces, ("copy", COPIES)]
            rows = shapes.decode_buckets
        keys = [*(("sample", batch, needs) for needs in USUAL for batch in rows), *keys]
        if self.role != "prefill":
            keys += [
                ("several", batch, table)
                for table in shapes.table_buckets
                for batch in shapes.guessing_buckets
            ]
            keys += [("verify", batch, one) for one in USUAL for batch in shapes.guessing_buckets]
        if shapes.hosted:
            keys += [("extract", shapes.host_width), ("insert", shapes.host_width)]
        masked = (SamplingNeeds(masked=True), SamplingNeeds(masked=True, random=True, cut=True))
        keys += [("sample", batch, needs) for needs in masked for batch in rows]
        for adapters in shapes.adapter_buckets:
            keys += [_adapted(key, adapters) for key in keys if key[0] in ("prefill", "decode")]
        keys = list(dict.fromkeys(keys))
        essential = self.essential()
        return [key for key in keys if key not in essential]

    def compile(self, key: tuple) -> None:
        """Compiles one step ahead of its use."""
        if key not in self._compiled:
            self._compiled[key] = self._build(*key)
            self.count += 1

    def has(self, kind: str, *shape: Any) -> bool:
        """Whether a step is compiled."""
        return (kind, *shape) in self._compiled

    def get(self, kind: str, *shape: Any) -> Callable:
        """The compiled step, which is compiled now if need be."""
        key = (kind, *shape)
        if key not in self._compiled:
            self.compile(key)
        return self._compiled[key]

    def fitting(
        self, kind: str, *sizes: tuple[int, tuple[int, ...]], rest: tuple = ()
    ) -> tuple[int, ...]:
        """The least compiled buckets that hold `sizes`, or the least of all if none is compiled."""
        choices = [[bucket for bucket in buckets if bucket >= size] for size, buckets in sizes]
        for shape in itertools.product(*choices):
            if (kind, *shape, *rest) in self._compiled:
                return shape
        return tuple(choice[0] for choice in choices)

    def _history_like(self, like: Callable) -> Any:
        history = jax.eval_shape(
            functools.partial(empty_history, self.slots, self.config.vocab_size)
        )
        return jax.tree.map(lambda leaf: like(leaf.shape, leaf.dtype), history)

    def _build(self, kind: str, *shape: Any) -> Callable:
        def like(size: tuple[int, ...], dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(size, dtype, sharding=self._placement)

        whole, cache = self._placement, self._cache
        split = cache[0].keys.sharding
        last = like((self.slots,))
        adapters: tuple = ()
        if kind.endswith(ADAPTED):
            kind, used, rows = kind.removesuffix(ADAPTED), 1, 1
            if kind == "decode":
                shape, used = shape[:-1], shape[-1]
                rows = shape[0]
            assert self._tables is not None
            places: Any = (like((used,)), like((rows,)))
            adapters = (Adapted(self._tables, *places),)
        if kind == "decode":
            batch, table = shape
            step = functools.partial(_decode, self.config, self.kernels)
            # Results go where the last ones were: with all addresses the same from step to step,
            # a captured CUDA graph can be launched again as it is.
            function = jax.jit(
                step, donate_argnums=(1, 4), keep_unused=True, out_shardings=(whole, split)
            )
            logits = like((batch, self.config.vocab_size), np.float32)
            packed = like((batch, 2 + table * self._groups))
            arguments = (self.weights, cache, last, packed, logits, *adapters)
        elif kind == "inputs":
            batch, table = shape
            function = jax.jit(
                _set_inputs, donate_argnums=(0, 1), keep_unused=True, out_shardings=whole
            )
            packed = like((batch, 2 + table * self._groups))
            arguments = (packed, like((batch, 2)), packed)
        elif kind == "prefill":
            piece, table, continued = shape
            step = functools.partial(_prefill, self.config, self.kernels, piece, continued)
            function = jax.jit(step, donate_argnums=1, out_shardings=(whole, split))
            packed = like((2 + piece + table * self._groups,))
            arguments = (self.weights, cache, packed, *adapters)
        elif kind == "pool":
            piece, table, continued = shape
            step = functools.partial(_pool, self.config, self.kernels, piece, continued)
            function = jax.jit(step, donate_argnums=1, out_shardings=(whole, split, whole))
            packed = like((2 + piece + table * self._groups,))
            arguments = (self.weights, cache, packed, *adapters)
        elif kind == "score":
            piece, table, continued = shape
            width = table * self._groups
            step = functools.partial(_score, self.config, self.kernels, piece, width, continued)
            function = jax.jit(step, donate_argnums=1, out_shardings=(whole, split, whole))
            arguments = (self.weights, cache, like((2 + piece + width + piece,)), *adapters)
        elif kind == "sample":
            batch, needs = shape
            function = jax.jit(
                functools.partial(_sample, needs), donate_argnums=(1, 4), out_shardings=whole
            )
            rules = jax.tree.map(
                lambda leaf: like(leaf.shape, leaf.dtype), pack_rules([], [], batch)
            )
            history = self._history_like(like) if needs.adjusted else None
            logits = like((batch, self.config.vocab_size), np.float32)
            mask = None
            if needs.masked:
                mask = like((batch, -(-self.config.vocab_size // 32)))
            arguments = (logits, last, like((batch, 2)), rules, history, mask)
        elif kind == "several":
            batch, table = shape
            tokens = 1 + self.shapes.guesses
            step = functools.partial(_several, self.config, self.kernels, tokens)
            function = jax.jit(step, donate_argnums=1, out_shardings=(whole, split))
            arguments = (self.weights, cache, like((batch, 3 + tokens + table * self._groups)))
        elif kind == "verify":
            batch, needs = shape
            tokens = 1 + self.shapes.guesses
            function = jax.jit(
                functools.partial(_verify, needs), donate_argnums=(1, 4), out_shardings=whole
            )
            rules = jax.tree.map(
                lambda leaf: like(leaf.shape, leaf.dtype), pack_rules([], [], batch)
            )
            history = self._history_like(like) if needs.adjusted else None
            logits = like((batch, tokens, self.config.vocab_size), np.float32)
            words = -(-self.config.vocab_size // 32)
            masks = like((tokens, batch, words)) if needs.masked else None
            arguments = (logits, last, like((batch, 3 + tokens)), rules, history, masks)
        elif kind == "copy":
            (count,) = shape
            function = jax.jit(paged_model.copy_pages, donate_argnums=0, out_shardings=split)
            arguments = (cache, like((count,)), like((count,)))
        elif kind == "clear":
            (count,) = shape
            function = jax.jit(paged_model.clear_pages, donate_argnums=0, out_shardings=split)
            arguments = (cache, like((count,)))
        elif kind == "extract":
            (count,) = shape
            function = jax.jit(
                paged_model.extract_pages, out_shardings=self.contents_like(count).sharding
            )
            arguments = (cache, like((count,)))
        elif kind == "insert":
            (count,) = shape
            contents = self.contents_like(count)
            function = jax.jit(paged_model.insert_pages, donate_argnums=0, out_shardings=split)
            arguments = (cache, contents, like((count,)))
        elif kind == "set_last":
            function = jax.jit(_set_last, donate_argnums=0, out_shardings=whole)
            arguments = (last, like(()), like(()))
        else:
            raise ValueError(f"no step is called {kind!r}")
        return function.lower(*arguments).compile()


def _set_inputs(old, old_where, packed):
    return packed, packed[:, :2]


def _adapted(key: tuple, adapters: int) -> tuple:
    """The key of the step that is like another and adds adapters; prompts have one at a time."""
    kind, *shape = key
    return (kind + ADAPTED, *shape, *((adapters,) if kind == "decode" else ()))


def _decode(config, kernels, weights, cache, last, packed, old_logits, adapted=None):
    slots, positions, tables = packed[:, 0], packed[:, 1], packed[:, 2:]
    tokens = last.at[slots].get(mode="fill", fill_value=0)
    places = (tokens, positions, tables)
    return paged_model.decode_pass(config, kernels, weights, cache, *places, adapted)


def _prefill(config, kernels, piece, continued, weights, cache, packed, adapted=None):
    tokens, table = packed[2 : 2 + piece], packed[2 + piece :]
    return paged_model.prefill_pass(
        config, kernels, continued, weights, cache, tokens, packed[0], packed[1], table, adapted
    )


def _pool(config, kernels, piece, continued, weights, cache, packed, adapted=None):
    tokens, table = packed[2 : 2 + piece], packed[2 + piece :]
    return paged_model.pool_pass(
        config, kernels, continued, weights, cache, tokens, packed[0], packed[1], table, adapted
    )


def _score(config, kernels, piece, width, continued, weights, cache, packed, adapted=None):
    tokens, table = packed[2 : 2 + piece], packed[2 + piece : 2 + piece + width]
    following = packed[2 + piece + width :]
    place = (packed[0], packed[1], table, following, adapted)
    return paged_model.score_pass(config, kernels, continued, weights, cache, tokens, *place)


def _sample(needs, logits, last, where, rules, history, mask):
    slots, positions = where[:, 0], where[:, 1] + 1
    sampled, history = sample(needs, logits, rules, positions, slots, history, mask)
    return sampled, last.at[slots].set(sampled.tokens, mode="drop"), history


def _several(config, kernels, width, weights, cache, packed):
    starts, counts, tokens = packed[:, 1], packed[:, 2], packed[:, 3 : 3 + width]
    return paged_model.several_pass(
        config, kernels, weights, cache, tokens, starts, counts, packed[:, 3 + width :]
    )


def _verify(needs, logits, last, packed, rules, history, masks):
    slots, positions, counts = packed[:, 0], packed[:, 1] + 1, packed[:, 2]
    tokens = packed[:, 3:]
    return verify(needs, logits, tokens, counts, rules, positions, slots, last, history, masks)


def _set_last(last, slot, token):
    return last.at[slot].set(token)


def _geometric(most: int, factor: int, *, least: int) -> tuple[int, ...]:
    sizes = [most]
    while sizes[-1] // factor >= least:
        sizes.append(-(-sizes[-1] // factor))
    return tuple(reversed(sizes))
