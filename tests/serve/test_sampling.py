"""Device sampling against a plain NumPy statement of the same rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsys.layered import seed_key
from jaxsys.serve.requests import FieldRefused, SamplingParameters
from jaxsys.serve.sampling import (
    MAX_BIASED,
    MAX_STOPS,
    SamplingNeeds,
    empty_history,
    pack_rules,
    sample,
    set_history,
)

VOCABULARY = 61
jitted_sample = jax.jit(sample, static_argnums=0)


def draw(logits, rules, *, positions=None, seeds=None, history=None, slots=None, needs=None):
    logits = jnp.asarray(logits, jnp.float32)
    rows = logits.shape[0]
    if needs is None:
        needs = SamplingNeeds()
        for rule in rules:
            needs |= SamplingNeeds.of(rule)
    return jitted_sample(
        needs,
        logits,
        jax.tree.map(jnp.asarray, pack_rules(rules, seeds or list(range(rows)), rows)),
        jnp.asarray(np.arange(rows) if positions is None else positions, jnp.int32),
        jnp.asarray(np.arange(rows) if slots is None else slots, jnp.int32),
        history,
    )


def allowed(logits, rule):
    """Tokens that may be drawn, by sorting."""
    scaled = np.asarray(logits, np.float64) / rule.temperature
    order = np.argsort(-scaled, kind="stable")
    weights = np.exp(scaled[order] - scaled[order[0]])
    probabilities = weights / weights.sum()
    before = np.cumsum(probabilities) - probabilities
    keep = (before < rule.top_p) & (probabilities >= rule.min_p * probabilities[0])
    if rule.top_k:
        keep[rule.top_k :] = False
    return set(order[keep].tolist())


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.3, 1.0, 1.9]),
    top_k=st.sampled_from([0, 1, 5, 40, 1000]),
    top_p=st.sampled_from([0.15, 0.55, 0.93, 1.0]),
    min_p=st.sampled_from([0.0, 0.03, 0.3]),
)
def test_only_tokens_that_survive_the_cuts_are_drawn(seed, temperature, top_k, top_p, min_p):
    rule = SamplingParameters(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = np.random.default_rng(seed).normal(size=VOCABULARY) * 3
    rows = 64
    sampled, _ = draw(np.tile(logits, (rows, 1)), [rule] * rows)
    assert set(sampled.tokens.tolist()) <= allowed(logits, rule)


def test_draws_among_survivors_follow_their_distribution():
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    rule = SamplingParameters(top_p=0.75)  # the first three: 0.4 + 0.3 alone is less
    sampled, _ = draw(np.tile(logits, (4000, 1)), [rule] * 4000, seeds=[5] * 4000)
    found = np.bincount(sampled.tokens, minlength=4) / 4000
    # Standard error of a share is at most 0.008.
    np.testing.assert_allclose(found, [4 / 9, 3 / 9, 2 / 9, 0], atol=0.032)


def test_draws_follow_the_distribution():
    logits = np.array([0.0, 1.0, 2.0, -1.0, 3.0])
    rows = 4000
    sampled, _ = draw(
        np.tile(logits, (rows, 1)),
        [SamplingParameters(temperature=1.0)] * rows,
        seeds=[7] * rows,
    )
    expected = np.exp(logits) / np.exp(logits).sum()
    found = np.bincount(sampled.tokens, minlength=5) / rows
    # Standard error of a share is at most 0.5 / sqrt(4000) = 0.008.
    np.testing.assert_allclose(found, expected, atol=0.032)


def test_every_surviving_token_can_be_drawn():
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    rule = SamplingParameters(top_p=0.65)
    sampled, _ = draw(np.tile(logits, (200, 1)), [rule] * 200)
    assert set(sampled.tokens.tolist()) == {0, 1}


SEEDS = (7, 2**32 - 1, 2**32 + 7, 2**33 + 7, 2**63 - 1, -1, 7 - 2**32, -(2**63))


def test_every_bit_of_a_seed_counts():
    """Draws are by the key that training makes of a seed: `jax.random.key`'s below 2**32."""
    rules, rows = [SamplingParameters(temperature=1.0, stream=3)], 24
    logits, found = np.zeros((rows, VOCABULARY)), set()
    for seed in SEEDS:
        drawn, _ = draw(logits, rules * rows, seeds=[seed] * rows)
        key = jax.random.fold_in(seed_key(seed), 3)
        wanted = [
            jnp.argmax(jax.random.gumbel(jax.random.fold_in(key, position), (VOCABULARY,)))
            for position in range(rows)
        ]
        np.testing.assert_array_equal(drawn.tokens, jnp.stack(wanted))
        found.add(tuple(drawn.tokens.tolist()))
    assert len(found) == len(SEEDS)
    low = jax.random.key_data(jax.random.key(2**32 - 1))
    np.testing.assert_array_equal(low, jax.random.key_data(seed_key(2**32 - 1)))


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 10**300])
def test_seeds_of_more_bits_are_refused(seed):
    with pytest.raises(FieldRefused, match=r"seed=.* must be of 64 bits: from -2\*\*63") as error:
        SamplingParameters(seed=seed)
    assert len(str(error.value)) < 120


def test_a_draw_depends_on_seed_and_position_alone():
    logits = np.random.default_rng(0).normal(size=(8, VOCABULARY))
    rules = [SamplingParameters(temperature=1.3)] * 8
    seeds, positions = list(range(8)), np.arange(8) * 3
    together, _ = draw(logits, rules, seeds=seeds, positions=positions)
    for row in range(8):
        alone, _ = draw(logits[row : row + 1], rules[:1], seeds=[row], positions=[row * 3])
        assert alone.tokens[0] == together.tokens[row]
    moved, _ = draw(logits, rules, seeds=seeds, positions=positions + 1)
    assert (moved.tokens != together.tokens).any()


def test_greedy_rows_stay_greedy_beside_random_ones():
    logits = np.random.default_rng(0).normal(size=(2, VOCABULARY))
    rules = [SamplingParameters(temperature=0), SamplingParameters(temperature=1.5, top_k=3)]
    for seed in range(20):
        sampled, _ = draw(logits, rules, seeds=[seed, seed])
        assert sampled.tokens[0] == logits[0].argmax()


def test_penalties_and_bias_against_a_plain_statement():
    generator = np.random.default_rng(3)
    rule = SamplingParameters(
        temperature=0,
        repetition_penalty=1.7,
        presence_penalty=0.6,
        frequency_penalty=0.4,
        logit_bias={5: 2.5, 9: -4.0},
    )
    prompt, output = [3, 4, 4], [5, 5, 6]
    history = empty_history(3, VOCABULARY)
    bias_tokens = np.full(MAX_BIASED, VOCABULARY, np.int32)
    bias_values = np.zeros(MAX_BIASED, np.float32)
    bias_tokens[:2], bias_values[:2] = [5, 9], [2.5, -4.0]
    prompt_mask = np.zeros(VOCABULARY, bool)
    prompt_mask[prompt] = True
    counts = np.bincount(output, minlength=VOCABULARY).astype(np.int32)
    history = set_history(
        history,
        jnp.int32(2),
        *(jnp.asarray(value) for value in (prompt_mask, counts, bias_tokens, bias_values)),
    )
    for _ in range(10):
        logits = generator.normal(size=(1, VOCABULARY)) * 2
        expected = logits[0].copy()
        for token in set(prompt) | set(output):
            expected[token] *= 1 / 1.7 if expected[token] > 0 else 1.7
        for token in set(output):
            expected[token] -= 0.6 + 0.4 * output.count(token)
        expected[5] += 2.5
        expected[9] -= 4.0
        sampled, history = draw(
            logits, [rule], history=history, slots=[2], needs=SamplingNeeds(adjusted=True)
        )
        assert sampled.tokens[0] == expected.argmax()
        output.append(int(sampled.tokens[0]))  # the device counts it too


def test_what_a_slot_held_before_does_not_touch_a_request_without_it():
    """A neighbour's bias has all rows adjusted, also one in a slot that a biased request had."""
    history = set_history(
        empty_history(2, VOCABULARY),
        jnp.int32(1),
        jnp.ones(VOCABULARY, bool),
        jnp.full(VOCABULARY, 3, jnp.int32),
        jnp.arange(MAX_BIASED, dtype=jnp.int32) % VOCABULARY,
        jnp.full(MAX_BIASED, 50.0),
        jnp.arange(MAX_STOPS, dtype=jnp.int32),
    )
    logits = np.random.default_rng(4).normal(size=(1, VOCABULARY))
    rule = SamplingParameters(temperature=0.7, logprobs=3)
    for seed in range(5):
        alone, _ = draw(logits, [rule], seeds=[seed])
        needs = SamplingNeeds(random=True, adjusted=True, logprobs=True)
        beside, _ = draw(logits, [rule], seeds=[seed], history=history, slots=[1], needs=needs)
        np.testing.assert_array_equal(beside.tokens, alone.tokens)
        np.testing.assert_allclose(beside.top_logprobs, alone.top_logprobs, rtol=1e-6)


def test_logprobs_are_those_of_the_whole_distribution():
    logits = np.random.default_rng(1).normal(size=(2, VOCABULARY))
    rule = SamplingParameters(temperature=1, top_k=1, logprobs=4)
    sampled, _ = draw(logits, [rule, rule])
    wanted = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    for row in range(2):
        token = int(sampled.tokens[row])
        assert token == logits[row].argmax()
        assert float(sampled.logprobs[row]) == pytest.approx(wanted[row, token], abs=1e-4)
        best = np.argsort(-wanted[row])[:4]
        assert sampled.top_tokens[row, :4].tolist() == best.tolist()
