"""How likely a model finds a prompt: the log-probability of each token behind those before it.

    log p(t_i+1 | t_0 .. t_i)   over the whole vocabulary, before any sampling rule

The logits of a whole piece of a prompt would not fit beside pages: they are made, looked at and let
go for a few positions at a time.

Legend: T tokens of a piece, D model, V vocabulary, C positions at a time, N alternatives.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsys.serve.sampling import TOP_LOGPROBS

AT_ONCE = 32
"""Positions whose logits lie in memory at once: some 16 MB of them at 128,000 tokens."""


class Scores(NamedTuple):
    """What is known of the token behind each position of a piece."""

    logprobs: jax.Array
    """float32 [T]; NaN where the logits are not finite."""
    ranks: jax.Array
    """int32 [T]: its place by likelihood, from 1."""
    top_tokens: jax.Array
    """int32 [T, N]."""
    top_logprobs: jax.Array
    """float32 [T, N]."""


def score(
    logits_of: Callable[[Float[Array, "1 C D"]], Float[Array, "1 C V"]],
    hidden: Float[Array, "T D"],
    following: Int[Array, " T"],
) -> Scores:
    """Scores the tokens that follow each position.

    Args:
        logits_of: the head.
        hidden: the residual behind the last block.
        following: the token behind each position.
    """
    count, width = hidden.shape
    chunks = -(-count // AT_ONCE)
    padding = chunks * AT_ONCE - count
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(chunks, AT_ONCE, width)
    following = jnp.pad(following, (0, padding)).reshape(chunks, AT_ONCE)

    def look(part: tuple[jax.Array, jax.Array]) -> Scores:
        x, tokens = part
        logits = logits_of(x[None])[0]
        finite = jnp.isfinite(logits.max(axis=1)) & jnp.isfinite(logits.min(axis=1))
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=1)
        ranks = 1 + jnp.sum(logprobs > chosen, axis=1)
        top, which = jax.lax.top_k(logprobs, min(TOP_LOGPROBS, logits.shape[1]))
        found = jnp.where(finite, chosen[:, 0], jnp.nan)
        return Scores(found, ranks.astype(jnp.int32), which, top)

    found = jax.lax.map(look, (hidden, following))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:count], found)
