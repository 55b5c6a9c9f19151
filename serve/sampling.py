"""Choosing the next token on the device, each row by its own rule.

    l  = adjusted logits: repetition, presence and frequency penalties, bias
    p  = softmax(l / temperature), cut to the top k, the top p and those over min_p * max(p)
    token = argmax(l) at temperature 0, else argmax(l / temperature + g), g ~ Gumbel(0, 1)

A token survives the cuts if fewer than k tokens are likelier, the likelier ones weigh less than
top_p together, and it is at least min_p times as likely as the likeliest; all three look at the
whole distribution. No sort: the highest candidate under the noise is tried, and where it does not
survive, everything no likelier than it is put aside and the next tried. Survivors are an upper set,
so the first that survives is the argmax over all that do, after a few passes over the logits.

A row that follows a grammar chooses among the tokens whose bits are set in its mask; its
log-probabilities are then of those alone.

Randomness is a function of the row's seed, all its 64 bits, its stream and the token's position
alone, so that batch, bucket and preemption cannot change it; the choices of one request draw from a
stream each.

A row whose logits are not finite before any rule has no token: NOTHING stands for it.

Legend: B rows, V vocabulary, R slots, M biased tokens a slot, E tokens a slot that end the output.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxsys.layered import SEEDS
from jaxsys.serve.requests import SamplingParameters

NOTHING = -1
"""Stands for the token of a row whose logits hold NaN or infinity."""
MAX_STOPS = 64
"""Most tokens that end an output, where it has a least length."""
MAX_BIASED = 300
"""Most entries of a logit bias, as in the OpenAI API."""
TOP_LOGPROBS = 20
"""Alternatives computed where any row asks for them."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplingNeeds:
    """What a batch needs computed; each combination is compiled apart."""

    random: bool = False
    cut: bool = False
    adjusted: bool = False
    logprobs: bool = False
    masked: bool = False

    @classmethod
    def of(cls, parameters: SamplingParameters) -> "SamplingNeeds":
        """The needs of one request."""
        random = parameters.temperature > 0
        return cls(
            random=random,
            cut=random and bool(parameters.top_k or parameters.top_p < 1 or parameters.min_p),
            adjusted=bool(
                parameters.repetition_penalty != 1
                or parameters.presence_penalty
                or parameters.frequency_penalty
                or parameters.logit_bias
                or parameters.min_tokens
            ),
            logprobs=parameters.logprobs is not None,
            masked=parameters.grammar is not None,
        )

    def __or__(self, other: "SamplingNeeds") -> "SamplingNeeds":
        return SamplingNeeds(
            random=self.random or other.random,
            cut=self.cut or other.cut,
            adjusted=self.adjusted or other.adjusted,
            logprobs=self.logprobs or other.logprobs,
            masked=self.masked or other.masked,
        )


class Rules(NamedTuple):
    """Per-row sampling rules: arrays [B]."""

    temperature: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    top_k: jax.Array
    seed: jax.Array
    """Its lower 32 bits."""
    seed_upper: jax.Array
    """Its upper 32 bits: two's complement below 0."""
    stream: jax.Array
    ends_from: jax.Array
    """Position from which the output may end; before, tokens that would end it are not chosen."""
    biases: jax.Array
    """How many biases it has: its slot may still hold those of the request before."""
    repetition: jax.Array
    presence: jax.Array
    frequency: jax.Array


class History(NamedTuple):
    """What adjusting needs to remember, per slot."""

    prompt: jax.Array
    """bool [R, V]: tokens of the prompt."""
    counts: jax.Array
    """int32 [R, V]: how often each token was put out."""
    bias_tokens: jax.Array
    """int32 [R, M]; V where unused."""
    bias_values: jax.Array
    """float32 [R, M]."""
    stop_tokens: jax.Array
    """int32 [R, E]; V where unused."""


class Sample(NamedTuple):
    """One chosen token a row and, where asked for, log-probabilities (before any cut)."""

    tokens: jax.Array
    """int32 [B]; NOTHING where the logits are not finite."""
    logprobs: jax.Array | None
    """float32 [B]."""
    top_tokens: jax.Array | None
    """int32 [B, TOP_LOGPROBS]."""
    top_logprobs: jax.Array | None


def pack_rules(
    parameters: list[SamplingParameters],
    seeds: list[int],
    rows: int,
    prompt_lengths: Sequence[int] | None = None,
) -> Rules:
    """Host arrays of `rows` rows; those past the requests are greedy.

    Args:
        prompt_lengths: behind which outputs begin; needed where one has a least length.
    """
    floats = np.zeros((6, rows), np.float32)
    floats[1] = floats[3] = 1
    integers = np.zeros((6, rows), np.int32)
    for row, (rule, seed) in enumerate(zip(parameters, seeds, strict=True)):
        if rule.min_tokens:
            assert prompt_lengths is not None
            integers[4, row] = prompt_lengths[row] + rule.min_tokens
        integers[5, row] = len(rule.logit_bias)
        floats[:, row] = (
            rule.temperature,
            rule.top_p,
            rule.min_p,
            rule.repetition_penalty,
            rule.presence_penalty,
            rule.frequency_penalty,
        )
        integers[:4, row] = rule.top_k, _word(seed), _word(seed >> 32), _word(rule.stream)
    # Host rows, which become device arrays at the call that uses them.
    fields: Any = (*floats[:3], *integers, *floats[3:])
    return Rules(*fields)


def _word(number: int) -> np.int32:
    """The lower 32 bits."""
    return np.uint32(number & 0xFFFFFFFF).astype(np.int32)


def empty_history(slots: int, vocabulary: int) -> History:
    """No prompt, no output, no bias."""
    return History(
        jnp.zeros((slots, vocabulary), bool),
        jnp.zeros((slots, vocabulary), jnp.int32),
        jnp.full((slots, MAX_BIASED), vocabulary, jnp.int32),
        jnp.zeros((slots, MAX_BIASED), jnp.float32),
        jnp.full((slots, MAX_STOPS), vocabulary, jnp.int32),
    )


def set_history(
    history: History,
    slot: Int[Array, ""],
    prompt: Bool[Array, " V"],
    counts: Int[Array, " V"],
    bias_tokens: Int[Array, " M"],
    bias_values: Float[Array, " M"],
    stop_tokens: Int[Array, " E"] | None = None,
) -> History:
    """Starts a slot anew; without `stop_tokens` it keeps those it has."""
    return History(
        history.prompt.at[slot].set(prompt),
        history.counts.at[slot].set(counts),
        history.bias_tokens.at[slot].set(bias_tokens),
        history.bias_values.at[slot].set(bias_values),
        history.stop_tokens
        if stop_tokens is None
        else history.stop_tokens.at[slot].set(stop_tokens),
    )


def sample(
    needs: SamplingNeeds,
    logits: Float[Array, "B V"],
    rules: Rules,
    positions: Int[Array, " B"],
    slots: Int[Array, " B"],
    history: History | None,
    mask: Int[Array, "B W"] | None = None,
) -> tuple[Sample, History | None]:
    """Chooses a token for every row.

    Args:
        needs: static: what must be computed.
        positions: of the tokens to be chosen; with the seed they fix the randomness.
        slots: rows of `history`; one past the end for padding.
        mask: where it is needed, which tokens a row may choose: bit t % 32 of word t // 32.
    """
    finite = jnp.isfinite(jnp.max(logits, axis=1)) & jnp.isfinite(jnp.min(logits, axis=1))
    if needs.adjusted:
        assert history is not None
        logits = _adjust(logits, rules, positions, slots, history)
    if needs.masked:
        assert mask is not None
        logits = jnp.where(_unpacked(mask, logits.shape[1]), logits, -jnp.inf)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    tokens = greedy
    if needs.random:
        temperature = jnp.where(rules.temperature > 0, rules.temperature, 1.0)
        scaled = logits / temperature[:, None]
        noisy = scaled + _gumbel(rules, positions, logits.shape[1])
        drawn = _first_survivor(scaled, noisy, rules) if needs.cut else jnp.argmax(noisy, axis=-1)
        tokens = jnp.where(rules.temperature > 0, drawn.astype(jnp.int32), greedy)
    chosen = top_tokens = top_logprobs = None
    if needs.logprobs:
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0]
        top_logprobs, top_tokens = jax.lax.top_k(logprobs, min(TOP_LOGPROBS, logits.shape[1]))
    if needs.adjusted:
        assert history is not None
        counts = history.counts.at[slots, tokens].add(1, mode="drop")
        history = history._replace(counts=counts)
    tokens = jnp.where(finite, tokens, NOTHING)
    return Sample(tokens, chosen, top_tokens, top_logprobs), history


def _adjust(
    logits: jax.Array, rules: Rules, positions: jax.Array, slots: jax.Array, history: History
) -> jax.Array:
    counts = history.counts.at[slots].get(mode="fill", fill_value=0)
    seen = history.prompt.at[slots].get(mode="fill", fill_value=False) | (counts > 0)
    repetition = rules.repetition[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(seen, repeated, logits)
    logits = logits - rules.frequency[:, None] * counts.astype(logits.dtype)
    logits = logits - rules.presence[:, None] * (counts > 0).astype(logits.dtype)
    rows = jnp.arange(logits.shape[0])[:, None]
    tokens = history.bias_tokens.at[slots].get(mode="fill", fill_value=logits.shape[1])
    values = history.bias_values.at[slots].get(mode="fill", fill_value=0)
    own = jnp.arange(values.shape[1])[None] < rules.biases[:, None]
    values = jnp.where(own, values, 0)
    logits = logits.at[rows, tokens].add(values, mode="drop")
    ends = history.stop_tokens.at[slots].get(mode="fill", fill_value=logits.shape[1])
    early = (positions < rules.ends_from)[:, None]
    ends = jnp.where(early, ends, logits.shape[1])
    return logits.at[rows, ends].set(-jnp.inf, mode="drop")


def _unpacked(mask: jax.Array, vocabulary: int) -> jax.Array:
    """Bits [B, W] of int32 as bool [B, V]."""
    bits = (mask[:, :, None] >> jnp.arange(32, dtype=mask.dtype)[None, None, :]) & 1
    return bits.reshape(mask.shape[0], -1)[:, :vocabulary].astype(bool)


def _first_survivor(scaled: jax.Array, noisy: jax.Array, rules: Rules) -> jax.Array:
    """The survivor of the cuts that is highest in `noisy`; int32 [B]."""
    limit = jnp.where(rules.top_k > 0, rules.top_k, scaled.shape[1])
    highest = jnp.max(scaled, axis=1)
    weights = jnp.exp(scaled - highest[:, None])
    mass = rules.top_p * jnp.sum(weights, axis=1)
    # The row's likeliest token survives whatever the rules, rounding included.
    floor = jnp.minimum(highest + jnp.log(rules.min_p), highest)

    def unfinished(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return ~jnp.all(state[2])

    def attempt(state: tuple[jax.Array, jax.Array, jax.Array]):
        token, put_aside, done = state
        candidate = jnp.argmax(
            jnp.where(scaled > put_aside[:, None], noisy, -jnp.inf), axis=1
        ).astype(jnp.int32)
        level = jnp.take_along_axis(scaled, candidate[:, None], axis=1)
        likelier = scaled > level
        level = level[:, 0]
        survives = (
            (jnp.sum(likelier, axis=1) < limit)
            & (jnp.sum(jnp.where(likelier, weights, 0), axis=1) < mass)
            & (level >= floor)
        ) | (level >= highest)
        token = jnp.where(done, token, candidate)
        return token, jnp.where(survives, put_aside, level), done | survives

    rows = scaled.shape[0]
    start = (
        jnp.zeros(rows, jnp.int32),
        jnp.full(rows, -jnp.inf, scaled.dtype),
        # Greedy rows have nothing to look for; broken logits would never find anything.
        ~((rules.temperature > 0) & jnp.isfinite(highest)),
    )
    token, _, _ = jax.lax.while_loop(unfinished, attempt, start)
    return token


def _gumbel(rules: Rules, positions: jax.Array, vocabulary: int) -> jax.Array:
    def row(seed: jax.Array, upper: jax.Array, stream: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.key(seed)  # takes 32 bits; the upper ones, where there are any, follow
        wide = jax.random.fold_in(jax.random.fold_in(key, SEEDS), upper)
        key = jnp.where(upper == 0, key, wide)
        # Always two folds: a key that is folded further is never drawn from itself.
        key = jax.random.fold_in(jax.random.fold_in(key, stream), position)
        return jax.random.gumbel(key, (vocabulary,), jnp.float32)

    return jax.vmap(row)(rules.seed, rules.seed_upper, rules.stream, positions)
