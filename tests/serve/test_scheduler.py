"""The scheduler serves every request, loses no page, and keeps results apart from late ones."""

import random
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsys.errors import UsageError
from jaxsys.serve.iterations import SchedulerConfig
from jaxsys.serve.requests import Request, RequestState, SamplingParameters
from jaxsys.serve.scheduler import Scheduler


def make_scheduler(**changes) -> Any:
    values: dict[str, Any] = {
        "page_count": 32,
        "page_size": 4,
        "max_batch": 4,
        "max_prefill_tokens": 8,
        "max_length": 64,
        "decode_buckets": (1, 2, 4),
    }
    return Scheduler(SchedulerConfig(**(values | changes)))


def make_request(name, prompt, max_tokens=4, **sampling):
    if isinstance(prompt, int):
        prompt = [1000 * (zlib.crc32(str(name).encode()) % 9973) + i for i in range(prompt)]
    return Request(
        name,
        sampling=SamplingParameters(max_tokens=max_tokens, **sampling),
        arrival_s=0.0,
        prompt_tokens=prompt,
    )


def test_an_embedding_needs_no_place_for_an_answer():
    scheduler = make_scheduler()
    scheduler.add(make_request("full", 64, max_tokens=1, pooling="mean"))
    run(scheduler)
    few = make_scheduler(page_count=8)
    few.add(make_request("all pages", 31, max_tokens=1, pooling="last"))
    run(few)
    with pytest.raises(UsageError, match="32 tokens; at most 31 fit"):
        few.add(make_request("longer", 32, max_tokens=1, pooling="last"))
    with pytest.raises(UsageError, match="65 tokens; at most 64 fit"):
        scheduler.add(make_request("longer", 65, max_tokens=1, pooling="mean"))
    with pytest.raises(UsageError, match="max_tokens=1 need 65"):
        scheduler.add(make_request("answered", 64, max_tokens=1))


def next_token(request):
    """A 'model' whose next token is a function of all tokens before it."""
    return hash(tuple(request.known_tokens())) % 50000


def run(scheduler, *, depth=1, limit=10_000, on_step=None):
    """Runs to idleness with `depth` iterations in flight; tokens come from `next_token`."""
    in_flight = []
    now_s = 0.0
    for _ in range(limit):
        iteration = scheduler.next_iteration(now_s)
        scheduler.check()
        if iteration is not None:
            in_flight.append(iteration)
        if not in_flight:
            return
        if iteration is None or len(in_flight) >= depth:
            oldest = in_flight.pop(0)
            now_s += 1.0
            scheduler.complete(oldest, now_s, [next_token(r) for r in oldest.sampling])
            scheduler.check()
        if on_step is not None:
            on_step(now_s)
    raise AssertionError("the scheduler never became idle")


def expected_output(request):
    tokens = list(request.prompt_tokens)
    for _ in range(request.sampling.max_tokens):
        tokens.append(hash(tuple(tokens)) % 50000)
        if tokens[-1] in request.sampling.stop_token_ids:
            break
    return tokens[request.prompt_length :]


def test_long_prompts_are_computed_in_pieces_beside_decodes():
    scheduler = make_scheduler()
    first, second = make_request("a", 3, max_tokens=8), make_request("b", 20)
    scheduler.add(first)
    iteration = scheduler.next_iteration(0.0)
    assert [(p.start, p.length, p.last) for p in iteration.prefills] == [(0, 3, True)]
    scheduler.complete(iteration, 1.0, [7])
    scheduler.add(second)
    pieces = []
    for step in range(3):
        iteration = scheduler.next_iteration(float(step))
        assert iteration.decodes == (first,)
        assert iteration.kv_tokens == 4 + step
        pieces += [(p.start, p.length, p.last) for p in iteration.prefills]
        scheduler.complete(iteration, 2.0 + step, [8] * len(iteration.sampling))
    assert pieces == [(0, 8, False), (8, 8, False), (16, 4, True)]
    iteration = scheduler.next_iteration(5.0)
    assert iteration.batch == 2 and iteration.bucket == 2


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("prefix_caching", [False, True])
def test_preempted_requests_end_with_the_same_tokens(depth, prefix_caching):
    scheduler = make_scheduler(page_count=10, max_length=40, prefix_caching=prefix_caching)
    requests = [make_request(f"r{i}", 6 + i, max_tokens=16) for i in range(4)]
    for request in requests:
        scheduler.add(request)
    run(scheduler, depth=depth)
    assert scheduler.preemptions > 0
    for request in requests:
        # `next_token` reads what the host knows, which lags at depth 2; the count must hold anyway.
        assert request.generated == 16 and request.finish_reason == "length"
        if depth == 1:
            assert request.output_tokens == expected_output(request)
    assert scheduler.allocator.held == 0


def test_a_known_prefix_is_not_computed_again():
    scheduler = make_scheduler()
    prompt = list(range(10))
    scheduler.add(make_request("a", prompt))
    run(scheduler)
    later = make_request("b", [*prompt, 50, 51])
    scheduler.add(later)
    iteration = scheduler.next_iteration(0.0)
    assert iteration.cached_tokens == 8 and iteration.prefill_tokens == 4
    assert iteration.copies == ()


def test_a_fully_known_prompt_copies_its_last_page_and_computes_one_token():
    scheduler = make_scheduler()
    prompt = list(range(8))
    original = make_request("a", prompt, max_tokens=20)
    scheduler.add(original)
    scheduler.complete(scheduler.next_iteration(0.0), 0.0, [5])
    scheduler.add(make_request("b", prompt))
    iteration = scheduler.next_iteration(1.0)
    (piece,) = iteration.prefills
    assert (piece.start, piece.length, piece.cached_tokens) == (7, 1, 7)
    assert iteration.copies == ((original.pages[1], piece.request.pages[1]),)
    assert piece.request.pages[0] == original.pages[0]
    scheduler.check()


def test_output_becomes_part_of_the_known_prefix():
    scheduler = make_scheduler(max_prefill_tokens=64)
    first = make_request("a", 6, max_tokens=7)
    scheduler.add(first)
    run(scheduler)
    follow_up = make_request("b", [*first.known_tokens(), 3, 4])
    scheduler.add(follow_up)
    # 13 tokens are known, the last one's keys were never computed: 12 = 3 pages.
    assert scheduler.next_iteration(0.0).cached_tokens == 12


def test_a_result_for_an_ended_request_is_dropped():
    scheduler = make_scheduler()
    request = make_request("a", 3, max_tokens=10, stop_token_ids=frozenset([9]))
    scheduler.add(request)
    first = scheduler.next_iteration(0.0)
    second = scheduler.next_iteration(0.0)
    assert second.decodes == (request,)
    assert scheduler.complete(first, 1.0, [9]).finished == [request]
    completion = scheduler.complete(second, 2.0, [1])
    assert completion.emitted == [] and request.output_tokens == [9]
    assert request.finish_reason == "stop" and scheduler.requests == 0
    assert scheduler.next_iteration(9.0) is None


def test_no_token_beyond_the_last_is_dispatched():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 3, max_tokens=2))
    scheduler.next_iteration(0.0)
    assert scheduler.next_iteration(0.0).batch == 1
    with pytest.raises(ValueError, match="two iterations are in flight"):
        scheduler.next_iteration(0.0)


def test_prefill_hands_over_and_decode_takes_up():
    prefill = make_scheduler(role="prefill")
    decode = make_scheduler(role="decode", page_count=6, max_length=24)
    request = make_request("a", 5, max_tokens=6)
    prefill.add(request)
    iteration = prefill.next_iteration(0.0)
    (done,) = prefill.complete(iteration, 1.0, [next_token(request)]).handed_over
    assert done is request and prefill.allocator.held == 2
    twin = request.handed_over()
    decode.add_incoming(twin)
    assert decode.reserve_incoming() == [twin] and twin.state is RequestState.RECEIVING
    prefill.release_handed_over(request)
    assert prefill.allocator.held == 0
    decode.start_received(twin)
    decode.check()
    run(decode)
    assert twin.output_tokens == expected_output(request) and twin.timing is request.timing
    assert decode.allocator.held == 0


def test_incoming_requests_wait_for_pages():
    decode = make_scheduler(role="decode", page_count=4, max_length=16)
    twins = [make_request(f"t{i}", 7, max_tokens=4) for i in range(3)]
    for twin in twins:
        twin.generated, twin.output_tokens = 1, [next_token(twin)]
        decode.add_incoming(twin)
    (first,) = decode.reserve_incoming()
    decode.start_received(first)
    assert decode.reserve_incoming() == []  # a page stays in reserve for the running one
    run(decode)
    assert decode.reserve_incoming() == [twins[1]]


def test_incoming_requests_share_a_known_prefix():
    decode = make_scheduler(role="decode")
    prompt = list(range(11))
    twins = [make_request(name, prompt, max_tokens=4) for name in "ab"]
    for twin in twins:
        twin.generated, twin.output_tokens = 1, [next_token(twin)]
        decode.add_incoming(twin)
        assert decode.reserve_incoming() == [twin]
        decode.start_received(twin)
        decode.check()
    first, second = twins
    assert (first.shared_pages, second.shared_pages) == (0, 2)
    assert second.pages[:2] == first.pages[:2] and second.pages[2] != first.pages[2]
    run(decode)
    assert first.output_tokens == second.output_tokens == expected_output(first)
    assert decode.allocator.held == 0


@pytest.mark.parametrize("role", ["both", "prefill", "decode"])
def test_abort_in_every_state_frees_everything(role):
    def fresh():
        scheduler = make_scheduler(role=role)
        request = make_request("a", 12, max_tokens=8)
        return scheduler, request

    states = set()
    for steps in range(6):
        scheduler, request = fresh()
        if role == "decode":
            request.generated, request.output_tokens = 1, [3]
            scheduler.add_incoming(request)
            if steps > 0:
                scheduler.reserve_incoming()
            if steps > 1:
                scheduler.start_received(request)
        else:
            scheduler.add(request)
        flight = None
        for _ in range(steps):
            flight = scheduler.next_iteration(0.0)
            if flight is None:
                break
            if _ < steps - 1:
                scheduler.complete(flight, 1.0, [4] * len(flight.sampling))
                flight = None
        states.add(request.state)
        scheduler.abort(request, 5.0)
        scheduler.check()
        if flight is not None:
            scheduler.complete(flight, 6.0, [4] * len(flight.sampling))
        scheduler.check()
        assert scheduler.allocator.held == 0 and scheduler.requests == 0
        assert request.finish_reason == "abort"
    wanted = {
        "both": {RequestState.WAITING, RequestState.PREFILLING, RequestState.RUNNING},
        "prefill": {RequestState.WAITING, RequestState.PREFILLING, RequestState.HANDING_OVER},
        "decode": {RequestState.WAITING, RequestState.RECEIVING, RequestState.RUNNING},
    }
    assert states == wanted[role]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), depth=st.integers(1, 2), caching=st.booleans())
def test_random_load_with_aborts_leaves_nothing_behind(seed, depth, caching):
    rng = random.Random(seed)
    scheduler = make_scheduler(
        page_count=rng.randint(10, 24), max_length=40, prefix_caching=caching
    )
    common = [rng.randrange(99) for _ in range(16)]
    requests = []
    for i in range(20):
        prompt = common[: rng.randint(0, 16)] + [
            rng.randrange(99) for _ in range(rng.randint(1, 9))
        ]
        request = make_request(f"r{i}", prompt, max_tokens=rng.randint(1, 15))
        requests.append(request)
        scheduler.add(request)

    def sometimes_abort(now_s):
        if rng.random() < 0.1:
            scheduler.abort(rng.choice(requests), now_s)

    run(scheduler, depth=depth, on_step=sometimes_abort)
    assert all(r.state is RequestState.FINISHED for r in requests)
    assert (
        scheduler.allocator.held == 0
        and scheduler.allocator.available == scheduler.config.page_count
    )
    for request in requests:
        if depth == 1:
            assert request.output_tokens == expected_output(request)[: request.generated]
        if request.finish_reason == "length":
            assert request.generated == request.sampling.max_tokens


def test_several_steps_in_one_iteration_match_single_ones():
    single, many = (make_scheduler(max_prefill_tokens=16) for _ in range(2))
    for scheduler in (single, many):
        for i in range(3):
            scheduler.add(
                Request(
                    i,
                    sampling=SamplingParameters(max_tokens=9),
                    arrival_s=0.0,
                    prompt_length=2 + i,
                )
            )
    kv = {}
    for scheduler, steps in ((single, 1), (many, 16)):
        total, rounds = 0, 0
        while (iteration := scheduler.next_iteration(0.0, steps)) is not None:
            total += iteration.kv_tokens * iteration.steps
            total += iteration.batch * iteration.steps * (iteration.steps - 1) // 2
            scheduler.complete(iteration, 0.0)
            scheduler.check()
            rounds += 1
        kv[steps] = total
    assert kv[1] == kv[16] and rounds == 2


def test_what_can_never_fit_is_refused_with_the_way_out():
    scheduler = make_scheduler(max_length=30)
    with pytest.raises(UsageError, match=r"prompt of 20 tokens.*at most 30 fit.*max_tokens to 10"):
        scheduler.add(make_request("a", 20, max_tokens=11))
    with pytest.raises(UsageError, match="decode_buckets"):
        make_scheduler(max_batch=9)
    with pytest.raises(UsageError, match="temperature=3 must be from 0 to 2"):
        SamplingParameters(temperature=3)
    with pytest.raises(UsageError, match="top_p=nan"):
        SamplingParameters(top_p=float("nan"))
