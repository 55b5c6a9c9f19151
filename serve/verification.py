"""Which guessed tokens are kept: the tokens that would have been chosen anyway.

Position by position each row's token is chosen from its logits as ever (`sampling`); as long as it
is the one that was guessed, the logits behind it hold, and the next is chosen from them. A draw
depends on seed, stream and position alone, so a request has the same tokens with guesses as
without, as far as logits of a wider step are the same numbers.

That is rejection sampling with a draft that is certain of itself (Leviathan et al. 2023, arXiv
2211.17192): a guess x is kept with probability p(x), as a draw from p hits it so often, and a draw
that misses it follows p with x taken out.

Legend: B rows, M tokens a row (the last known one and the guesses), V vocabulary, R slots.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsys.serve.sampling import History, Rules, Sample, SamplingNeeds, sample


class Verified(NamedTuple):
    """What each row gained."""

    sample: Sample
    """Of each position in turn, [M, B, ...]; what stands behind the tokens gained is nothing."""
    gained: jax.Array
    """int32 [B]: tokens that count, 1 at least."""


def verify(
    needs: SamplingNeeds,
    logits: Float[Array, "B M V"],
    tokens: Int[Array, "B M"],
    counts: Int[Array, " B"],
    rules: Rules,
    positions: Int[Array, " B"],
    slots: Int[Array, " B"],
    last: Int[Array, " R"],
    history: History | None,
    masks: Int[Array, "M B W"] | None = None,
) -> tuple[Verified, jax.Array, History | None]:
    """Chooses tokens for every row as long as its guesses are right.

    Args:
        needs: static: what must be computed.
        tokens: each row's last known token, and its guesses.
        counts: how many of them count, 1 at least.
        positions: of the first token to be chosen.
        slots: rows of `history` and `last`; one past the end for padding.
        last: the last token of each slot.
        masks: for each position, as `sample`'s.

    Returns:
        What was gained, the last tokens and the history.
    """
    width = logits.shape[1]
    nobody = last.shape[0]

    def choose(state, given):
        alive, gained, newest, history = state
        step, of_step, guessed, mask = given
        own = jnp.where(alive, slots, nobody)
        # Rows past their first wrong guess choose on; nothing is written of it.
        chosen, history = sample(needs, of_step, rules, positions + step, own, history, mask)
        newest = jnp.where(alive, chosen.tokens, newest)
        gained = gained + alive
        alive = alive & (step + 1 < counts) & (chosen.tokens == guessed)
        return (alive, gained, newest, history), chosen

    rows = logits.shape[0]
    start = (jnp.ones(rows, bool), jnp.zeros(rows, jnp.int32), tokens[:, 0], history)
    guessed = jnp.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)
    given = (jnp.arange(width, dtype=jnp.int32), logits.swapaxes(0, 1), guessed.T, masks)
    (_, gained, newest, history), chosen = jax.lax.scan(choose, start, given)
    return Verified(chosen, gained), last.at[slots].set(newest, mode="drop"), history
