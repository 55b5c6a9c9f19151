"""Guessed tokens change when an answer comes, and nothing of what it says."""

import dataclasses
import itertools
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsys.errors import UsageError
from jaxsys.model import initial_parameters, preset
from jaxsys.serve.clock import VirtualClock
from jaxsys.serve.executor import JaxExecutor
from jaxsys.serve.hooks import NoGovernor
from jaxsys.serve.iterations import SchedulerConfig
from jaxsys.serve.requests import Request, SamplingParameters
from jaxsys.serve.scheduler import Scheduler
from jaxsys.serve.speculation import (
    LONGEST_WAIT,
    Lookup,
    Prospect,
    Speculation,
    SpeculationConfig,
)
from jaxsys.serve.steps import ExecutorConfig
from jaxsys.serve.turns import Turns
from jaxsys.serve.weights import serving_weights

CONFIG = dataclasses.replace(preset("tiny"), num_layers=2)
GUESSES = SpeculationConfig(num_speculative_tokens=3, prompt_lookup_min=2)


class Eager(Speculation):
    """Guesses whenever there is something to guess."""

    def wanted(self, running, bucket):
        return bool(running)


class Oracle(Eager):
    """Guesses what is known to follow, wrong from some place on."""

    def __init__(self, texts, wrong_at=None):
        super().__init__(GUESSES)
        self.texts = texts
        self.wrong_at = wrong_at

    def draft(self, request):
        most = min(3, request.sampling.max_tokens - request.generated - 1)
        done = request.generated
        draft = list(self.texts[request.request_id][done : done + most])
        if self.wrong_at is not None and len(draft) > self.wrong_at:
            draft[self.wrong_at] = (draft[self.wrong_at] + 1) % CONFIG.vocab_size
        return draft


@pytest.fixture(scope="module")
def parameters():
    return jax.tree.map(lambda leaf: leaf * 4, initial_parameters(CONFIG, seed=1))


@pytest.fixture(scope="module")
def executor(parameters) -> Any:
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return JaxExecutor(
        CONFIG,
        serving_weights(CONFIG, parameters, placement=place),
        make().config,
        placement=place,
        shapes=ExecutorConfig(
            decode_buckets=(1, 4),
            piece_buckets=(16,),
            table_buckets=(16,),
            transfer_buckets=(16,),
            guesses=3,
        ),
    )


def make(speculation=None, **changes) -> Any:
    values: dict[str, Any] = {
        "page_count": 60,
        "page_size": 4,
        "max_batch": 4,
        "max_prefill_tokens": 16,
        "max_length": 64,
        "decode_buckets": (1, 4),
    }
    return Scheduler(SchedulerConfig(**(values | changes)), speculation)


class Owner:
    """Of turns, without a thread."""

    def __init__(self, executor):
        self.executor = executor
        self.iterations = []
        self.logprobs = {}

    def dispatch(self, iteration):
        self.iterations.append(iteration)
        return self.executor.dispatch(iteration)

    def fetch(self, fetch):
        raise AssertionError(f"no host keeps pages: {fetch}")

    def ended(self, iteration, outcome, latency_s, now_s):
        return

    def completed(self, iteration, outcome, completion, now_s):
        further = outcome.more_logprobs or [[]] * len(outcome.tokens)
        if outcome.logprobs is not None:
            for one, first, rest in zip(iteration.sampling, outcome.logprobs, further, strict=True):
                if first is not None:
                    self.logprobs.setdefault(one.request_id, []).extend([first, *rest])


def run(executor, requests, speculation=None, **changes):
    """The requests' outputs, and what ran."""
    scheduler = make(speculation, **changes)
    owner = Owner(executor)
    turns = Turns(scheduler, NoGovernor(), VirtualClock(), owner)
    turns.start()
    for one in requests:
        scheduler.add(one)
    while scheduler.requests or turns.in_flight:
        flight = turns.turn()
        if flight is not None:
            turns.end(executor.collect(flight.handle))
            assert not executor.release()
            scheduler.check()
    assert scheduler.allocator.held == 0
    return {one.request_id: one.output_tokens for one in requests}, owner, scheduler


def requests_of(prompts, max_tokens=24, **sampling):
    rule: dict[str, Any] = {"temperature": 0.0, "max_tokens": max_tokens} | sampling
    return [
        Request(f"r{i}", sampling=SamplingParameters(**rule), arrival_s=0.0, prompt_tokens=prompt)
        for i, prompt in enumerate(prompts)
    ]


def some_prompts():
    """One that repeats itself, one that does not, and one of a few tokens."""
    generator = np.random.default_rng(2)
    period = generator.integers(0, 264, 6).tolist()
    return [period * 3, generator.integers(0, 264, 21).tolist(), [5, 9, 5]]


RULES = {
    "greedy": {},
    "drawn": {"temperature": 1.0, "seed": 11},
    "cut": {"temperature": 0.9, "seed": 5, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    "penalties": {
        "temperature": 0.7,
        "seed": 3,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "logit_bias": {7: 4.0},
    },
    "at least": {"min_tokens": 12, "stop_token_ids": frozenset(range(0, 264, 5))},
    "stops": {"stop_token_ids": frozenset(range(0, 264, 29))},
}


@pytest.mark.parametrize(
    "rule",
    [pytest.param(rule, marks=[pytest.mark.slow] * (rule in ("drawn", "cut"))) for rule in RULES],
)
def test_texts_are_the_same_with_guesses_right_wrong_and_none(executor, rule):
    """Token for token, in float32, whatever the rule of choice; a seeded draw too."""
    sampling = RULES[rule]
    plain, _, _ = run(executor, requests_of(some_prompts(), **sampling))
    for speculation in (Eager(GUESSES), Oracle(plain), Oracle(plain, 0), Oracle(plain, 2)):
        found, owner, scheduler = run(
            executor, requests_of(some_prompts(), **sampling), speculation
        )
        assert found == plain
        assert any(one.drafts for one in owner.iterations) or not isinstance(speculation, Oracle)
        if isinstance(speculation, Oracle) and speculation.wrong_at is None:
            assert speculation.accepted_tokens > 0.6 * speculation.draft_tokens
            assert scheduler.iterations < 5 + max(map(len, plain.values())) / 2


def test_log_probabilities_are_those_of_single_steps(executor):
    requests = requests_of(some_prompts(), max_tokens=10, logprobs=2)
    plain, single, _ = run(executor, requests)
    found, guessed, _ = run(
        executor, requests_of(some_prompts(), max_tokens=10, logprobs=2), Oracle(plain, 2)
    )
    assert found == plain
    for name, entries in single.logprobs.items():
        assert len(guessed.logprobs[name]) == len(entries) == 10
        for one, other in zip(entries, guessed.logprobs[name], strict=True):
            assert one.top_tokens == other.top_tokens
            np.testing.assert_allclose(one.logprob, other.logprob, atol=1e-4)


def test_few_pages_preempt_and_are_all_given_back(executor):
    """Guesses take nobody's pages, and a request goes on from what is known of it."""
    plain, _, _ = run(executor, requests_of(some_prompts()))
    found, _, scheduler = run(executor, requests_of(some_prompts()), Oracle(plain), page_count=17)
    assert found == plain
    assert scheduler.preemptions > 0


def test_the_prefix_cache_holds_kept_tokens_alone(executor):
    """A second turn that begins with the first's answer finds its pages, and says the same."""
    prompts = some_prompts()[:1]
    plain, _, _ = run(executor, requests_of(prompts))
    speculation = Oracle(plain, 1)  # every guess is wrong from its second token on
    scheduler = make(speculation)
    answers = []
    for again in (prompts[0], [*prompts[0], *plain["r0"], 3, 4]):
        (request,) = requests_of([again], max_tokens=20)
        turns = Turns(scheduler, NoGovernor(), VirtualClock(), Owner(executor))
        turns.start()
        scheduler.add(request)
        while scheduler.requests or turns.in_flight:
            flight = turns.turn()
            if flight is not None:
                turns.end(executor.collect(flight.handle))
        answers.append(request)
        scheduler.speculation = Eager(GUESSES)
    assert answers[1].cached_tokens >= 32
    fresh, _, _ = run(executor, requests_of([answers[1].prompt_tokens], max_tokens=20))
    assert answers[1].output_tokens == fresh["r0"]


def test_draws_follow_the_distribution():
    """Chi-square over first and second tokens of a vocabulary of 8: with a guess and without."""
    from jaxsys.serve.sampling import SamplingNeeds, pack_rules
    from jaxsys.serve.verification import verify

    rows, vocabulary = 4096, 8
    generator = np.random.default_rng(0)
    logits = np.tile(generator.normal(0, 1.5, (1, 2, vocabulary)), (rows, 1, 1)).astype(np.float32)
    rules = [SamplingParameters(temperature=0.8, top_p=0.95, seed=row) for row in range(rows)]
    guess = int(np.argsort(logits[0, 0])[-2])
    tokens = np.tile([[0, guess]], (rows, 1)).astype(np.int32)
    verified, last, _ = verify(
        SamplingNeeds(random=True, cut=True),
        jax.numpy.asarray(logits),
        jax.numpy.asarray(tokens),
        jax.numpy.full(rows, 2),
        pack_rules(rules, list(range(rows)), rows),
        jax.numpy.full(rows, 7),
        jax.numpy.arange(rows),
        jax.numpy.zeros(rows, jax.numpy.int32),
        None,
    )
    chosen, gained = np.asarray(verified.sample.tokens), np.asarray(verified.gained)
    wanted = []
    for place in range(2):
        scaled = logits[0, place].astype(float) / 0.8
        weights = np.exp(scaled - scaled.max())
        weights /= weights.sum()
        order = np.argsort(-weights)
        kept = order[: 1 + np.searchsorted(np.cumsum(weights[order]), 0.95)]
        share = np.zeros(vocabulary)
        share[kept] = weights[kept] / weights[kept].sum()
        wanted.append(share)
    np.testing.assert_array_equal(gained == 2, chosen[0] == guess)
    both = gained == 2
    assert abs(both.mean() - wanted[0][guess]) < 0.03  # a guess is kept as often as it is likely
    np.testing.assert_array_equal(np.asarray(last), np.where(both, chosen[1], chosen[0]))
    for share, found in ((wanted[0], chosen[0]), (wanted[1], chosen[1][both])):
        counts = np.bincount(found, minlength=vocabulary)
        assert not counts[share == 0].any()
        there = share > 0
        expected = share[there] * len(found)
        statistic = ((counts[there] - expected) ** 2 / expected).sum()
        assert statistic < 24.3  # 0.1 % of draws from the right distribution, 7 degrees


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 3), st.integers(0, 4))
def test_lookups_find_the_longest_of_the_latest_places(tokens, shortest, further):
    longest = shortest + further
    lookup = Lookup(tokens[:7], shortest=shortest, longest=longest)
    for start in range(7, len(tokens), 5):
        lookup.extend(tokens[start : start + 5])
    assert lookup.tokens == tokens
    found = lookup.draft(4)

    def same(place):
        count = 0
        while count < min(longest, place) and tokens[place - 1 - count] == tokens[-1 - count]:
            count += 1
        return count

    places = [p for p in range(len(tokens) - 1, 0, -1) if same(p) >= shortest][:8]
    if not places:
        assert found == []
        return
    best = max(places, key=same)  # the first of equals is the latest
    text = list(tokens)
    for _ in range(4):
        text.append(text[best + len(text) - len(tokens)])
    assert found == text[len(tokens) :]


def speculation_of(gain, **ready):
    speculation = Speculation(GUESSES, **ready)
    (request,) = requests_of([[1, 2, 3]])
    request.prospect = Prospect(Lookup([1, 2, 3], shortest=2, longest=4))
    request.prospect.gain = gain
    return speculation, request


def iteration_of(request, *, drafted):
    from jaxsys.serve.iterations import Iteration

    drafts = ((1, 2),) if drafted else ()
    return Iteration(1, (), (request,), (), 0, 0, 4, 1, 1, drafts)


def test_it_stops_where_steps_that_guess_take_too_long_and_tries_again_ever_later():
    speculation, request = speculation_of(gain=2.0)
    trials = []
    for step in range(400):
        guesses = speculation.wanted([request], 1)
        if guesses:
            trials.append(step)
        speculation.ran(iteration_of(request, drafted=guesses), 0.030 if guesses else 0.010)
    gaps = np.diff(trials)
    assert len(trials) < 12
    assert all(later >= sooner for sooner, later in itertools.pairwise(gaps))
    assert LONGEST_WAIT > gaps[-1] >= 100
    # The device has become quicker at it.
    for _ in range(2000):
        guesses = speculation.wanted([request], 1)
        speculation.ran(iteration_of(request, drafted=guesses), 0.011 if guesses else 0.010)
    assert speculation.wanted([request], 1)


def test_it_goes_on_where_it_pays_and_never_begins_where_texts_do_not_repeat():
    speculation, request = speculation_of(gain=3.0)
    found = []
    for _ in range(20):
        found.append(speculation.wanted([request], 1))
        period_s = 0.020 if found[-1] else 0.010
        speculation.ran(iteration_of(request, drafted=found[-1]), period_s)
    assert found == [True, False, *[True] * 18]  # each kind of step is measured first
    other, request = speculation_of(gain=1.0)
    assert not other.wanted([request], 1)
    assert not speculation_of(gain=4.0, ready=lambda bucket: False)[0].wanted([request], 1)
    large, request = speculation_of(gain=4.0)
    assert not large.wanted([request], 256)  # bound by computing


def test_gains_are_known_without_guessing():
    speculation = Speculation(GUESSES)
    (request,) = requests_of([[1, 2, 3, 4, 5, 6] * 3])
    request.output_tokens = [1]
    speculation.observe(request, [1])
    for token in [2, 3, 4, 5, 6, 1] * 6:
        request.output_tokens.append(token)
        speculation.observe(request, [token])
    assert speculation.gain([request]) > 3  # of 4 at most
    for token in range(100, 130):
        speculation.observe(request, [token])
    assert speculation.gain([request]) < 1.1
    assert speculation.drafts == 0


def test_what_cannot_be_is_refused():
    for changes, text in (
        ({"num_speculative_tokens": 0}, "from 1 to 63"),
        ({"prompt_lookup_min": 0}, "at least 1"),
        ({"prompt_lookup_max": 1}, "not be below"),
    ):
        with pytest.raises(UsageError, match=text):
            SpeculationConfig(**changes)


def test_it_says_when_every_step_that_guesses_is_there():
    """Batches too large to guess are not waited for."""
    there: set[int] = set()
    speculation = Speculation(SpeculationConfig(), ready=there.__contains__)
    sizes = (1, 4, 16, 512)
    for size in (1, 16, 4):
        assert not speculation.ready_for(sizes)
        there.add(size)
    assert speculation.ready_for(sizes)
    assert Speculation(SpeculationConfig()).ready_for(sizes)
