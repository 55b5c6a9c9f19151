"""Experts: who gets which token, and the tokens in the experts' order for grouped products.

Every token goes to its `active` best experts; there are no capacities and no token is dropped. Rows
are sorted by expert, multiplied group by group (`jax.lax.ragged_dot`), and summed back, weighted.

Legend: R tokens, E experts, A experts a token uses, D width, F feed-forward.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsys.model.kinds import Experts


class Chosen(NamedTuple):
    """The experts of each token."""

    experts: Int[Array, "R A"]
    weights: Float[Array, "R A"]
    """float32."""


class Groups(NamedTuple):
    """Rows in order of their experts."""

    sizes: Int[Array, " E"]
    """Rows of each expert."""
    experts: Int[Array, " RA"]
    """The expert of each row."""


class Places(NamedTuple):
    """Where sorted rows come from."""

    rows: Int[Array, " RA"]
    """The token of each sorted row."""
    back: Int[Array, " RA"]
    """Where the row of (token, choice) lies among the sorted."""


class Load(NamedTuple):
    """How evenly experts were used by the tokens of a layer."""

    balance: Float[Array, ""]
    """E sum_e f_e p_e: f_e rows of expert e for each token, p_e its mean probability (Fedus et
    al., 2101.03961, with f summed over choices); A where all are used alike."""


def route(
    experts: Experts, logits: Float[Array, "R E"], correction: Float[Array, " E"] | None = None
) -> Chosen:
    """Chooses and weighs experts by their scores; logits and weights are float32."""
    if experts.router == "chosen_softmax":
        best, index = jax.lax.top_k(logits, experts.active)
        return Chosen(index, jax.nn.softmax(best, axis=-1) * experts.scale)
    scores = (
        jax.nn.sigmoid(logits) if experts.router == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    )
    ranked = scores
    if correction is not None:
        ranked = ranked + jax.lax.stop_gradient(correction.astype(jnp.float32))[None]
    if experts.groups > 1 and experts.group_worth:
        ranked = _best_groups(experts, ranked)
    index = jax.lax.top_k(ranked, experts.active)[1]
    weights = jnp.take_along_axis(scores, index, axis=-1)
    if experts.renormalise:
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights / (total + 1e-20 if experts.router == "sigmoid" else total)
    return Chosen(index, weights if experts.scale == 1.0 else weights * experts.scale)


def _best_groups(experts: Experts, ranked: Float[Array, "R E"]) -> Float[Array, "R E"]:
    """-inf outside the best groups; a group is as good as its one or two best experts together."""
    grouped = ranked.reshape(ranked.shape[0], experts.groups, -1)
    worth = jnp.sum(jax.lax.top_k(grouped, experts.group_worth)[0], axis=-1)
    best = jax.lax.top_k(worth, experts.active_groups)[1]
    kept = jnp.sum(jax.nn.one_hot(best, experts.groups), axis=1)[..., None] > 0
    return jnp.where(kept, grouped, -jnp.inf).reshape(ranked.shape)


def group(chosen: Int[Array, "R A"], count: int) -> tuple[Groups, Places]:
    """Sorts the rows (token, choice) by expert, tokens of an expert in their order."""
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    # The inverse of a permutation, by sorting it: a gather on the way back, not a scatter.
    back = jnp.argsort(order)
    ordered = flat[order]
    # Counted, not searched for: a search is a loop, whose every turn the host of a GPU waits for.
    every = jnp.arange(count, dtype=flat.dtype)
    sizes = jnp.sum(flat[:, None] == every[None, :], axis=0, dtype=jnp.int32)
    return Groups(sizes, ordered), Places(order // chosen.shape[1], back)


def gather(
    rows: Float[Array, "RA D"], places: Places, weights: Float[Array, "R A"]
) -> Float[Array, "R D"]:
    """Sums each token's rows, weighted, in the dtype of the rows."""
    tokens, active = weights.shape
    ordered = rows[places.back].reshape(tokens, active, -1)
    return jnp.sum(ordered * weights[..., None].astype(rows.dtype), axis=1)


def activate(
    experts: Experts,
    activation: Callable[[jax.Array], jax.Array],
    gate: jax.Array | None,
    up: jax.Array,
) -> jax.Array:
    """Between up and down: act(gate) up, act(up) without a gate, or the clamped unit."""
    if gate is None:
        return activation(up)
    if experts.clamp is None:
        return activation(gate) * up
    gate = jnp.minimum(gate, experts.clamp)
    up = jnp.clip(up, -experts.clamp, experts.clamp)
    return (up + 1) * (gate * jax.nn.sigmoid(gate * experts.slope))


def load(experts: Experts, logits: Float[Array, "R E"], chosen: Int[Array, "R A"]) -> Load:
    """How evenly the router spread its tokens."""
    tokens = logits.shape[0]
    rows = jnp.sum(jax.nn.one_hot(chosen, experts.count, dtype=jnp.float32), axis=(0, 1))
    probabilities = jnp.mean(jax.nn.softmax(logits, axis=-1), axis=0)
    shares = rows / tokens
    return Load(experts.count * jnp.sum(shares * probabilities))
