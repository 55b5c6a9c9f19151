"""The mathematics of one decoder layer, stated once, over weights that are held in any way.

    n = norm(x);  q, k, v = project(n);  o = attend(q, k, v);  x' = finish(x, o)

`project` and `finish` leave attention in between to the caller, who may put a paged cache there.
How matrices are kept (apart, fused, quantised, split over devices) is the business of `Held`; its
plain form, `HeldTree`, reads a layer of the parameters. Norms, rotary tables and softmax are
float32 inside; the rest computes in the weights' dtype.

Legend: B batch, T tokens, D width, F feed-forward, N heads, G key/value heads, K head width.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsys.context import ContextSplit, attend_over
from jaxsys.layered import PyTree
from jaxsys.model import experts as mixture
from jaxsys.model import grouped
from jaxsys.model.attention import Implementation, attend, choose_implementation
from jaxsys.model.config import DecoderConfig
from jaxsys.model.float8_products import Float8, multiply
from jaxsys.model.kinds import Activation, BlockKind, Latent
from jaxsys.model.leaves import Path
from jaxsys.model.rope import rotary_tables, rotate

Turn = tuple[jax.Array, jax.Array] | None
"""Cosines and sines of the tokens' positions; None where a layer has no positions."""


class Held(Protocol):
    """One layer's weights and the products with them.

    Products take normalised inputs [..., D] and add biases where there are any. Heads may come out
    on one axis [N, K] or grouped [G, N / G, K].
    """

    def vector(self, *path: str) -> jax.Array | None:
        """A norm's scale or bias, sinks, a router's correction; None where there is none."""
        ...

    def query_key_value(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[B, T, D] -> q [B, T, N, K], k and v [B, T, G, K], before norms and rotary."""
        ...

    def product(self, x: jax.Array, *path: str) -> jax.Array:
        """The last axis of x times one matrix, its bias added."""
        ...

    def heads_out(self, o: jax.Array) -> jax.Array:
        """Joins the heads: [B, T, N, K] -> [B, T, D]."""
        ...

    def up(self, x: jax.Array, name: str) -> tuple[jax.Array | None, jax.Array]:
        """Gate (None where there is none) and up of a feed-forward: [..., D] -> [..., F] each."""
        ...

    def feed(self, x: jax.Array, name: str, between: "Between") -> jax.Array:
        """A whole feed-forward: up, what is `between`, and down; [..., D] -> [..., D]."""
        ...

    def latent_up(self) -> jax.Array:
        """The matrix that unfolds latent vectors, heads split off: [C, N, P + V]."""
        ...

    def mix(self, rows: jax.Array, chosen: mixture.Chosen) -> jax.Array:
        """What each token's experts make of its row, weighed and summed: [R, D] -> [R, D]."""
        ...

    # Where several devices compute a block together; see `HeldWhole` for one alone.

    def length(self, x: jax.Array) -> int:
        """T, the tokens of whole sequences, of which x may hold a part."""
        ...

    def routed(self, n: jax.Array) -> jax.Array:
        """[B, T, D]: the tokens that choose experts here."""
        ...

    def joined(self, fed: jax.Array) -> jax.Array:
        """What experts made of the tokens of `routed`, added up, of the tokens that are here."""
        ...


Between = Callable[[jax.Array | None, jax.Array], jax.Array]
"""(gate or None, up) -> what the last product of a feed-forward multiplies."""


class HeldWhole:
    """What nobody shares: every token and every expert is here."""

    def feed(self: "Held", x: jax.Array, name: str, between: Between) -> jax.Array:
        """All tokens at once."""
        return self.product(between(*self.up(x, name)), name, "down")

    def length(self, x: jax.Array) -> int:
        """All of x."""
        return x.shape[1]

    def routed(self, n: jax.Array) -> jax.Array:
        """As they are."""
        return n

    def joined(self, fed: jax.Array) -> jax.Array:
        """As it is."""
        return fed


class HeldTree(HeldWhole):
    """One layer as the parameters have it: a kernel an array, [in, out]."""

    def __init__(self, config: DecoderConfig, tree: PyTree, float8: Float8 | None = None) -> None:
        """
        Args:
            float8: the products that run in float8; none if not given.
        """
        self._config = config
        self._tree = tree
        self._float8 = float8

    def vector(self, *path: str) -> jax.Array | None:
        """The leaf at `path`, or None."""
        node: Any = self._tree
        for name in path:
            if not isinstance(node, Mapping) or name not in node:
                return None
            node = node[name]
        return node

    def query_key_value(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Three products, heads split off."""
        split = (*x.shape[:-1], -1, self._config.head_dim)
        q, k, v = (
            self.product(x, "attention", name).reshape(split) for name in ("query", "key", "value")
        )
        return q, k, v

    def product(self, x: jax.Array, *path: str) -> jax.Array:
        """x times the kernel at `path`."""
        node = self._tree
        for name in path[:-1]:
            node = node[name]
        y = self._times(x, node[path[-1]], *path)
        bias = node.get(f"{path[-1]}_bias")
        return y if bias is None else y + _last(bias, y)

    def _times(self, x: jax.Array, kernel: jax.Array, *path: str) -> jax.Array:
        """x times the kernel that lies at `path`, without its bias."""
        sides = None if self._float8 is None else self._float8.of(*path)
        return x @ kernel if sides is None else multiply(x, kernel, sides)

    def heads_out(self, o: jax.Array) -> jax.Array:
        """Heads joined, then one product."""
        return self.product(o.reshape(*o.shape[:-2], -1), "attention", "out")

    def up(self, x: jax.Array, name: str) -> tuple[jax.Array | None, jax.Array]:
        """One product each."""
        gate = self.product(x, name, "gate") if self._config.gated else None
        return gate, self.product(x, name, "up")

    def latent_up(self) -> jax.Array:
        """The kernel, its columns split by head."""
        kernel = self._tree["attention"]["latent_up"]
        return kernel.reshape(kernel.shape[0], self._config.num_heads, -1)

    def mix(self, rows: jax.Array, chosen: mixture.Chosen) -> jax.Array:
        """Rows sorted by expert, then grouped products."""
        experts = self._config.experts
        assert experts is not None
        groups, places = mixture.group(chosen.experts, experts.count)
        return mixture.gather(self._by_experts(rows[places.rows], groups), places, chosen.weights)

    def _by_experts(self, x: jax.Array, groups: mixture.Groups) -> jax.Array:
        """Sorted rows [R, D] -> what their experts make of them."""
        config, experts = self._config, self._config.experts
        assert experts is not None
        gate = self._grouped(x, "gate", groups) if config.gated else None
        up = self._grouped(x, "up", groups)
        inner = mixture.activate(experts, lambda a: activation(config.activation, a), gate, up)
        return self._grouped(inner, "down", groups)

    def _grouped(self, rows: jax.Array, name: str, groups: mixture.Groups) -> jax.Array:
        node = self._tree["experts"]
        y = grouped.product(rows, node[name], groups.sizes)
        bias = node.get(f"{name}_bias")
        return y if bias is None else y + self._expert_bias(name, bias)[groups.experts]

    def _expert_bias(self, name: str, bias: jax.Array) -> jax.Array:
        """What is added here of the biases [E, N] of `name`."""
        del name
        return bias


class BoundBlock(NamedTuple):
    """One layer bound to its weights; cheap to make while tracing."""

    config: DecoderConfig
    kind: BlockKind
    held: Held

    def project(
        self, x: Float[Array, "B T D"], turn: Turn
    ) -> tuple[Float[Array, "B T N K"], Float[Array, "B T G K"], Float[Array, "B T G K"]]:
        """The residual [B, T, D] -> q, k, v as attention takes them, norms and rotary done."""
        return project(self.config, self.held, x, turn)

    def project_kept(
        self, x: Float[Array, "B T D"], turn: Turn
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """As `project`, in the form that a cache keeps: see `jaxsys.model.contract.layer_cache`.

        Latent attention keeps one narrow head [B, T, 1, C + R], whose first C channels are its
        values too (None is returned for them), and its queries come as [B, T, 1, N, C + R]. What
        attention gives, `read_kept` turns into what `finish` takes.
        """
        if self.config.latent is None:
            return self.project(x, turn)
        n = _attention_input(self.config, self.held, x)
        q, vector, key = latent_project(self.config, self.held, n, turn)
        kept = jnp.concatenate([vector[..., None, :], key], axis=-1)
        return absorb(self.config, self.held, q)[..., None, :, :], kept, None

    @property
    def turns_last(self) -> bool:
        """Whether turning queries and keys is the last that `project` does with them."""
        return self.config.latent is None and not (
            self.config.qk_norm is not None and self.config.qk_norm_after_rope
        )

    def read_kept(self, o: jax.Array) -> jax.Array:
        """What attention over the kept form gives, as `finish` takes it."""
        if self.config.latent is None:
            return o
        return read_out(self.config, self.held, o[..., 0, :, :])

    def finish(
        self, x: Float[Array, "B T D"], o: Float[Array, "B T N K"]
    ) -> tuple[Float[Array, "B T D"], mixture.Load | None]:
        """Adds attention's output and the feed-forward; says how experts were used."""
        return finish(self.config, self.kind, self.held, x, o)

    def attend(
        self,
        q: Float[Array, "B T N K"],
        k: Float[Array, "B T G K"],
        v: Float[Array, "B T G K"],
        implementation: Implementation | None = None,
        context: ContextSplit | None = None,
    ) -> Float[Array, "B T N K"]:
        """Causal self-attention over whole sequences, as this kind of layer does it.

        With `context` T is what this device has of each sequence.
        """
        if context is not None:
            if implementation is None:
                chosen = choose_implementation(dtype=q.dtype, head_dim=q.shape[-1])
                implementation = chosen.implementation
            return attend_over(
                q,
                k,
                v,
                split=context,
                window=self.kind.window,
                scale=attention_scale(self.config),
                softcap=self.config.attention_softcap,
                sinks=self.held.vector("attention", "sinks"),
                use_fused=implementation in ("cudnn", "shapes"),
                shapes=implementation == "shapes",
            )
        return attend(
            q,
            k,
            v,
            causal=True,
            window=self.kind.window,
            scale=attention_scale(self.config),
            softcap=self.config.attention_softcap,
            sinks=self.held.vector("attention", "sinks"),
            implementation=implementation,
        )

    def run(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"] | None = None,
        *,
        implementation: Implementation | None = None,
        context: ContextSplit | None = None,
    ) -> tuple[Float[Array, "B T D"], mixture.Load | None]:
        """The whole layer; `positions` count from 0 unless given.

        With `context` x is what this device has of each sequence, and positions follow from that.
        """
        q, k, v = self.project(x, self.turn_of(x, positions, context))
        return self.finish(x, self.attend(q, k, v, implementation, context))

    def turn_of(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"] | None = None,
        context: ContextSplit | None = None,
    ) -> Turn:
        """What `project` turns queries and keys by; see `run`."""
        length = None
        if positions is None:
            length = self.held.length(x)
            if context is None:
                positions = jnp.arange(length, dtype=jnp.int32)[None, :]
            else:
                positions = context.positions(length)[None, :]
                length *= context.parts
        return turn(self.config, self.kind, positions, length)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"] | None = None,
        *,
        implementation: Implementation | None = None,
    ) -> Float[Array, "B T D"]:
        """x [B, T, D] -> [B, T, D]."""
        return self.run(x, positions, implementation=implementation)[0]


def turn(
    config: DecoderConfig,
    kind: BlockKind,
    positions: Int[Array, "B T"],
    length: int | jax.Array | None = None,
) -> Turn:
    """The rotary tables of one kind of layer; see `rotary_tables`."""
    rope = config.rope(kind)
    return None if rope is None else rotary_tables(positions, rope, length)


def attention_scale(config: DecoderConfig) -> float | None:
    """What scores are multiplied by; None: 1 / sqrt of the queries' head width."""
    return config.attention_scale


def project(
    config: DecoderConfig, held: Held, x: Float[Array, "B T D"], turn: Turn
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `BoundBlock.project`."""
    n = _attention_input(config, held, x)
    if config.latent is not None:
        query, latent, key = latent_project(config, held, n, turn)
        k, v = unfold(config, held, latent, key)
        return query, k, v
    q, k, v = held.query_key_value(n)
    after = config.qk_norm_after_rope
    if config.qk_norm is not None and not after:
        q, k = _head_norm(config, held, "query_norm", q), _head_norm(config, held, "key_norm", k)
    if turn is not None:
        q, k = (rotate(a, *turn, interleaved=config.rope_interleaved) for a in (q, k))
    if config.qk_norm is not None and after:
        q, k = _head_norm(config, held, "query_norm", q), _head_norm(config, held, "key_norm", k)
    return q, k, v


def _attention_input(config: DecoderConfig, held: Held, x: jax.Array) -> jax.Array:
    """The residual as attention reads it."""
    return x if config.norm_places == "after" else normalise(config, held, "attention_norm", x)


def latent_project(
    config: DecoderConfig, held: Held, n: Float[Array, "B T D"], turn: Turn
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What latent attention computes of its input, and what a latent cache keeps.

    Returns:
        q [B, T, N, P + R], whose last R channels are turned; the normalised latent vector
        [B, T, C]; the turned key [B, T, 1, R] that all heads share.
    """
    latent = _latent(config)
    if latent.query_rank is None:
        q = held.product(n, "attention", "query")
    else:
        squeezed = held.product(n, "attention", "query_down")
        scale = held.vector("attention", "query_down_norm")
        squeezed = _scaled(latent.epsilon, squeezed, scale)
        q = held.product(squeezed, "attention", "query_up")
    q = q.reshape(*q.shape[:-1], config.num_heads, -1)
    narrow = held.product(n, "attention", "latent_down")
    scale = held.vector("attention", "latent_norm")
    vector = _scaled(latent.epsilon, narrow[..., : latent.rank], scale)
    key = narrow[..., None, latent.rank :]
    plain, turning = q[..., : latent.plain_dim], q[..., latent.plain_dim :]
    if turn is not None:
        turning, key = (
            rotate(a, *turn, interleaved=config.rope_interleaved) for a in (turning, key)
        )
    return jnp.concatenate([plain, turning], axis=-1), vector, key


def unfold(
    config: DecoderConfig,
    held: Held,
    vector: Float[Array, "B S C"],
    key: Float[Array, "B S 1 R"],
) -> tuple[Float[Array, "B S N K"], Float[Array, "B S N V"]]:
    """Latent vectors and shared keys -> keys [B, S, N, P + R] and values [B, S, N, V] of heads."""
    latent = _latent(config)
    both = held.product(vector, "attention", "latent_up")
    both = both.reshape(*vector.shape[:-1], config.num_heads, -1)
    plain, values = both[..., : latent.plain_dim], both[..., latent.plain_dim :]
    shared = jnp.broadcast_to(key, (*plain.shape[:-1], latent.rotary_dim))
    return jnp.concatenate([plain, shared], axis=-1), values


def absorb(
    config: DecoderConfig, held: Held, q: Float[Array, "B T N K"]
) -> Float[Array, "B T N C+R"]:
    """Queries for latent vectors as they are: q . (U c) = (U^T q) . c, of each head.

    One narrow head then serves all queries, and no key is unfolded (DeepSeek-V2, 2405.04434, 2.1).
    """
    plain = _latent(config).plain_dim
    unfolding = held.latent_up()[..., :plain]
    narrow = jnp.einsum("btnp,cnp->btnc", q[..., :plain], unfolding.astype(q.dtype))
    return jnp.concatenate([narrow, q[..., plain:]], axis=-1)


def read_out(
    config: DecoderConfig, held: Held, o: Float[Array, "B T N C"]
) -> Float[Array, "B T N V"]:
    """Sums of latent vectors -> the heads' sums of values."""
    unfolding = held.latent_up()[..., _latent(config).plain_dim :]
    return jnp.einsum("btnc,cnv->btnv", o, unfolding.astype(o.dtype))


def finish(
    config: DecoderConfig,
    kind: BlockKind,
    held: Held,
    x: Float[Array, "B T D"],
    o: Float[Array, "B T N K"],
) -> tuple[Float[Array, "B T D"], mixture.Load | None]:
    """See `BoundBlock.finish`."""
    before, after = config.norm_places != "after", config.norm_places != "before"
    attended = held.heads_out(o)
    if after:
        attended = normalise(config, held, "attention_post_norm", attended)
    if config.parallel:
        n = normalise(config, held, "attention_norm", x) if before else x
        fed, load = feed_forward(config, kind, held, n)
        if after:
            fed = normalise(config, held, "mlp_post_norm", fed)
        return x + _weighed(config, attended) + _weighed(config, fed), load
    x = x + _weighed(config, attended)
    n = normalise(config, held, "mlp_norm", x) if before else x
    fed, load = feed_forward(config, kind, held, n)
    if after:
        fed = normalise(config, held, "mlp_post_norm", fed)
    return x + _weighed(config, fed), load


def feed_forward(
    config: DecoderConfig, kind: BlockKind, held: Held, n: Float[Array, "B T D"]
) -> tuple[Float[Array, "B T D"], mixture.Load | None]:
    """The dense feed-forward, or the experts and what is shared beside them."""
    if not kind.experts:
        return _dense(config, held, n, "mlp"), None
    experts = config.experts
    assert experts is not None
    tokens = held.routed(n)
    rows = tokens.reshape(-1, n.shape[-1])
    logits = held.product(rows, "experts", "router").astype(jnp.float32)
    chosen = mixture.route(experts, logits, held.vector("experts", "correction"))
    fed = held.joined(held.mix(rows, chosen).reshape(tokens.shape))
    if experts.shared_size:
        shared = _dense(config, held, n, "shared")
        if experts.shared_gate:
            shared = jax.nn.sigmoid(held.product(n, "shared", "weight")) * shared
        fed = fed + shared
    return fed, mixture.load(experts, logits, chosen.experts)


def normalise(
    config: DecoderConfig, held: Held, name: str, x: Float[Array, "B T D"]
) -> Float[Array, "B T D"]:
    """The named norm of the layer on the last axis; statistics in float32."""
    return norm(config, x, held.vector(name, "scale"), held.vector(name, "bias"))


def norm(
    config: DecoderConfig, x: jax.Array, scale: jax.Array | None, bias: jax.Array | None = None
) -> jax.Array:
    """RMS or layer normalisation of the last axis, by the configuration.

    Zhang & Sennrich, 1910.07467; Ba et al., 1607.06450.
    """
    if config.norm == "rms" and not config.norm_plus_one:
        return _scaled(config.rms_norm_eps, x, scale)
    wide = x.astype(jnp.float32)
    if config.norm == "layer":
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    normal = wide * jax.lax.rsqrt(mean_square + config.rms_norm_eps)
    # Scales near one less one, and biases, meet float32: their bits are few enough as it is.
    assert scale is not None
    factor = _last(scale, x).astype(jnp.float32)
    normal = normal * (1.0 + factor if config.norm_plus_one else factor)
    if bias is not None:
        normal = normal + _last(bias, x).astype(jnp.float32)
    return normal.astype(x.dtype)


def _scaled(epsilon: float, x: jax.Array, scale: jax.Array | None) -> jax.Array:
    """RMS normalisation whose scale meets the dtype of x, as Llama's does."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    normal = (wide * jax.lax.rsqrt(mean_square + epsilon)).astype(x.dtype)
    assert scale is not None
    return normal * _last(scale, x)


def _head_norm(config: DecoderConfig, held: Held, name: str, heads: jax.Array) -> jax.Array:
    """Norm of queries or keys [B, T, ..., K], by the configuration's `qk_norm`."""
    scale = held.vector("attention", name)
    if config.qk_norm == "all":
        joined = heads.reshape(*heads.shape[:2], -1)
        return norm(config, joined, scale).reshape(heads.shape)
    if config.qk_norm == "each":
        assert scale is not None
        scale = scale.reshape(heads.shape[2:])
    return norm(config, heads, scale)


def _dense(config: DecoderConfig, held: Held, n: jax.Array, name: str) -> jax.Array:
    """Down(act(Gate n) * Up n), or Down(act(Up n)). Shazeer, 2002.05202."""

    def between(gate: jax.Array | None, up: jax.Array) -> jax.Array:
        inner = activation(config.activation, up if gate is None else gate)
        return inner if gate is None else inner * up

    return held.feed(n, name, between)


def activation(name: Activation, x: jax.Array) -> jax.Array:
    """The named function of each number."""
    if name == "silu":
        return jax.nn.silu(x)
    if name == "relu":
        return jax.nn.relu(x)
    if name == "relu2":
        return jnp.square(jax.nn.relu(x))
    return jax.nn.gelu(x, approximate=name == "gelu_tanh")


def _weighed(config: DecoderConfig, x: jax.Array) -> jax.Array:
    return x if config.residual_scale == 1.0 else x * config.residual_scale


def _last(vector: jax.Array, like: jax.Array) -> jax.Array:
    """A vector with the leading axes of `like`, for strict rank promotion."""
    return vector[(None,) * (like.ndim - vector.ndim)]


def _latent(config: DecoderConfig) -> Latent:
    assert config.latent is not None
    return config.latent


__all__ = [
    "Between",
    "BoundBlock",
    "Held",
    "HeldTree",
    "HeldWhole",
    "Path",
    "Turn",
    "absorb",
    "activation",
    "attention_scale",
    "feed_forward",
    "finish",
    "latent_project",
    "norm",
    "normalise",
    "project",
    "read_out",
    "turn",
    "unfold",
]
