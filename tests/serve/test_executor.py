"""The paged passes give the same logits and tokens as the whole model computed at once."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.model import forward, initial_parameters, preset
from jaxsys.serve import paged_model
from jaxsys.serve.executor import JaxExecutor
from jaxsys.serve.iterations import SchedulerConfig
from jaxsys.serve.paged_attention import choose_kernels
from jaxsys.serve.requests import Request, SamplingParameters
from jaxsys.serve.scheduler import Scheduler
from jaxsys.serve.steps import ExecutorConfig
from jaxsys.serve.weights import serving_weights

CONFIG = dataclasses.replace(preset("tiny"), num_layers=2)
whole_model = jax.jit(functools.partial(forward, CONFIG))
KERNELS = choose_kernels(dtype=jnp.dtype("float32"), head_dim=8, device=jax.devices()[0])
prefill = jax.jit(functools.partial(paged_model.prefill_pass, CONFIG, KERNELS, True))
decode = jax.jit(functools.partial(paged_model.decode_pass, CONFIG, KERNELS))


@pytest.fixture(scope="module")
def parameters():
    # Wider kernels than the initial ones, so that logits differ by more than rounding.
    return jax.tree.map(lambda leaf: leaf * 4, initial_parameters(CONFIG, seed=1))


def reference(parameters, prompt, count):
    """Greedy continuation by computing the whole sequence again for each token."""
    tokens = list(prompt)
    padded = np.zeros((1, 128), np.int32)
    for _ in range(count):
        padded[0, : len(tokens)] = tokens
        logits = np.asarray(whole_model(parameters, padded))
        tokens.append(int(logits[0, len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def executor(parameters):
    """One set of compiled steps; each test brings a scheduler over some of its pages."""
    return make_executor(parameters, jax.devices()[0])


def make_executor(parameters, device, role="both") -> Any:
    place = jax.sharding.SingleDeviceSharding(device)
    return JaxExecutor(
        CONFIG,
        serving_weights(CONFIG, parameters, placement=place),
        make(role=role).config,
        placement=place,
        shapes=ExecutorConfig(
            decode_buckets=(1, 2, 4),
            piece_buckets=(8, 16),
            table_buckets=(4, 16),
            transfer_buckets=(4, 16),
        ),
    )


def make(**changes) -> Any:
    values: dict[str, Any] = {
        "page_count": 40,
        "page_size": 4,
        "max_batch": 4,
        "max_prefill_tokens": 16,
        "max_length": 64,
        "decode_buckets": (1, 2, 4),
    }
    return Scheduler(SchedulerConfig(**(values | changes)))


def run(scheduler, executor, depth=2):
    in_flight, now_s = [], 0.0
    while True:
        iteration = scheduler.next_iteration(now_s)
        if iteration is not None:
            in_flight.append((iteration, executor.dispatch(iteration)))
        if not in_flight:
            return
        if iteration is None or len(in_flight) >= depth:
            oldest, handle = in_flight.pop(0)
            now_s += 1
            scheduler.complete(oldest, now_s, executor.collect(handle).tokens)


def request(name, prompt, max_tokens=10, **sampling):
    settings: dict[str, Any] = {"temperature": 0} | sampling
    rule = SamplingParameters(max_tokens=max_tokens, **settings)
    return Request(name, sampling=rule, arrival_s=0.0, prompt_tokens=prompt)


def test_passes_match_the_whole_model(parameters):
    """Logits of a prompt in pieces and of single steps equal the forward pass's to 1e-4."""
    tokens = np.random.default_rng(0).integers(0, 264, 30)
    whole = np.asarray(whole_model(parameters, tokens[None]))[0]
    weights = serving_weights(CONFIG, parameters)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    cache = paged_model.empty_cache(CONFIG, 12, 4, jnp.float32, place)
    table = np.array([5, 2, 9, 0, 7, 3, 11, 8], np.int32)
    for start, length in ((0, 10), (10, 13), (23, 3)):
        piece = np.zeros(16, np.int32)
        piece[:length] = tokens[start : start + length]
        logits, cache = prefill(
            weights,
            cache,
            jnp.asarray(piece),
            jnp.int32(start),
            jnp.int32(length),
            jnp.asarray(table),
        )
        np.testing.assert_allclose(logits[0], whole[start + length - 1], atol=1e-4)
    for position in range(26, 30):
        logits, cache = decode(
            weights,
            cache,
            jnp.asarray([0, tokens[position]], jnp.int32),
            jnp.asarray([0, position], jnp.int32),
            jnp.asarray(np.stack([np.full(8, 12), table]), jnp.int32),
        )
        np.testing.assert_allclose(logits[1], whole[position], atol=1e-4)


@pytest.mark.parametrize("page_count", [40, 14])
def test_batched_requests_match_the_reference(parameters, executor, page_count):
    scheduler = make(page_count=page_count)
    generator = np.random.default_rng(4)
    common = generator.integers(0, 264, 8).tolist()
    requests = [
        request(i, common[: 4 * (i % 3)] + generator.integers(0, 264, 5 + 4 * i).tolist(), 12)
        for i in range(6)
    ]
    for one in requests:
        scheduler.add(one)
    run(scheduler, executor)
    if page_count == 14:
        assert scheduler.preemptions > 0
    for one in requests:
        assert one.output_tokens == reference(parameters, one.prompt_tokens, 12), one
    assert scheduler.allocator.held == 0


def test_a_shared_page_is_copied_before_it_is_written(parameters, executor):
    scheduler = make()
    prompt = list(range(8))
    expected = reference(parameters, prompt, 10)
    first, second = request("a", prompt), request("b", prompt)
    scheduler.add(first)
    run(scheduler, executor)
    scheduler.add(second)
    run(scheduler, executor)
    assert first.output_tokens == second.output_tokens == expected
    assert second.cached_tokens == 7


def test_what_is_copied_may_be_computed_in_the_same_iteration(parameters, executor):
    """Two that ask the same at once, of whole pages: the second copies what the first computes."""
    scheduler = make()
    prompt = np.random.default_rng(8).integers(0, 264, 8).tolist()
    expected = reference(parameters, prompt, 10)
    first, second = request("a", prompt), request("b", prompt)
    scheduler.add(first)
    scheduler.add(second)
    run(scheduler, executor)
    assert second.cached_tokens == 7
    assert first.output_tokens == second.output_tokens == expected


def test_seeded_sampling_survives_batching_and_preemption(executor):
    prompts = [[7 * i + 1, 5, 3 * i] for i in range(4)]
    outputs = []
    for page_count, together in ((40, True), (10, True), (40, False)):
        scheduler = make(page_count=page_count, max_length=40)
        requests = [
            request(i, prompt, 20, temperature=1.2, top_p=0.9, seed=i)
            for i, prompt in enumerate(prompts)
        ]
        for one in requests:
            scheduler.add(one)
            if not together:
                run(scheduler, executor)
        run(scheduler, executor)
        if page_count == 10:
            assert scheduler.preemptions > 0
        outputs.append([one.output_tokens for one in requests])
    assert outputs[0] == outputs[1] == outputs[2]


def test_penalised_output_matches_after_preemption(parameters, executor):
    outputs = []
    for page_count in (40, 12):
        scheduler = make(page_count=page_count, max_length=40)
        requests = [
            request(i, [i, 9, 4, 4], 24, frequency_penalty=1.5, repetition_penalty=1.3)
            for i in range(3)
        ]
        for one in requests:
            scheduler.add(one)
        run(scheduler, executor)
        outputs.append([one.output_tokens for one in requests])
        plain = reference(parameters, [0, 9, 4, 4], 24)
        assert requests[0].output_tokens != plain
    assert scheduler.preemptions > 0 and outputs[0] == outputs[1]


def test_pages_travel_between_devices(parameters, executor):
    scheduler, other_scheduler = make(role="prefill"), make(role="decode")
    device = jax.devices()[1]
    other = make_executor(parameters, device, role="decode")
    prompt = list(range(40, 61))
    one = request("a", prompt)
    scheduler.add(one)
    while True:
        iteration = scheduler.next_iteration(0.0)
        handle = executor.dispatch(iteration)
        completion = scheduler.complete(iteration, 1.0, executor.collect(handle).tokens)
        if completion.handed_over:
            break
    twin = one.handed_over()
    other_scheduler.add_incoming(twin)
    other_scheduler.reserve_incoming()
    contents = executor.extract(one.pages)
    scheduler.release_handed_over(one)
    other.insert(jax.device_put(contents, device), twin.pages)
    other_scheduler.start_received(twin)
    other.resume(twin)
    run(other_scheduler, other)
    assert twin.output_tokens == reference(parameters, prompt, 10)
    assert other._last.devices() == {device}


def test_steps_compiled_ahead_are_not_compiled_again(executor):
    scheduler = make()
    run_once = [("copy", 8), ("extract", 4), ("insert", 4), ("set_last",)]
    for key in (*executor.steps.essential(), *executor.steps.others(), *run_once):
        executor.steps.compile(key)
    compiled = executor.steps.count
    for i in range(6):
        scheduler.add(request(i, list(range(i + 1)), 12, temperature=i % 2, top_p=0.9))
    run(scheduler, executor)
    before = jax.tree.map(np.array, (executor._cache, executor._last))
    for key in executor.steps._compiled:
        executor.run_once(key)
    jax.tree.map(np.testing.assert_array_equal, before, (executor._cache, executor._last))
    assert executor.steps.count == compiled


def test_collect_waits_for_pieces_that_sample_nothing(executor):
    scheduler = make()
    one = request("a", list(range(30)))
    scheduler.add(one)
    iteration = scheduler.next_iteration(0.0)
    handle = executor.dispatch(iteration)
    assert executor.collect(handle).tokens == []
    assert [sampled.tokens.is_ready() for sampled, *_ in handle] == [True]
    scheduler.complete(iteration, 0.0, [])
    # Of a request that has ended since, such a piece has no token either.
    rest = scheduler.next_iteration(0.0)
    other = request("b", list(range(100, 140)))
    scheduler.add(other)
    unfinished = scheduler.next_iteration(0.0)
    assert not unfinished.prefills[0].last
    scheduler.abort(other, 0.0)
    scheduler.complete(rest, 0.0, executor.collect(executor.dispatch(rest)).tokens)
    tokens = executor.collect(executor.dispatch(unfinished)).tokens
    assert len(tokens) == len(unfinished.sampling) == 1


def test_logprobs_of_the_chosen_and_the_best(parameters, executor):
    scheduler = make()
    one, other = request("a", [1, 2, 3], 2, logprobs=3), request("b", [4, 5], 2)
    for item in (one, other):
        scheduler.add(item)
    iteration = scheduler.next_iteration(0.0)
    outcome = executor.collect(executor.dispatch(iteration))
    chosen, nothing = outcome.logprobs
    whole = forward(CONFIG, parameters, jnp.asarray([[1, 2, 3]]))[0, -1]
    logprobs = jax.nn.log_softmax(whole)
    assert nothing is None
    assert chosen.top_tokens[0] == outcome.tokens[0] == int(whole.argmax())
    assert chosen.logprob == pytest.approx(float(logprobs.max()), abs=1e-4)
    assert len(chosen.top_logprobs) == 3
