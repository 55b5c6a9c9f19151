"""Whole engines over a tiny random model: apart equals together, and nothing is left behind."""

import asyncio
import random
import re
from typing import Any

import jax
import numpy as np
import pytest
from jax.errors import JaxRuntimeError

from jaxsys.errors import RunError, UsageError
from jaxsys.serve.deployment import DeploymentConfig, build_engine, compile_ahead
from jaxsys.serve.engine import Overloaded
from jaxsys.serve.requests import SamplingParameters

SMALL: dict[str, Any] = {
    "max_batch": 4,
    "max_length": 96,
    "max_prefill_tokens": 16,
    "page_size": 4,
    "page_count": 40,
    "max_requests": 1000,
}


async def collect(engine, prompt, **sampling):
    """All tokens of one request and why it ended."""
    settings: dict[str, Any] = {"temperature": 0} | sampling
    rule = SamplingParameters(**settings)
    tokens, reason = [], None
    async for event in engine.generate(prompt, rule):
        if event.token is not None:
            tokens.append(event.token)
        reason = event.finish_reason
    return tokens, reason


async def settled(engine):
    """Waits until every instance is empty, then checks pages, slots and counts."""
    for _ in range(1000):
        if not engine.unfinished and not any(
            one.scheduler.requests or one.requests or one.in_flight for one in engine.instances
        ):
            break
        await asyncio.sleep(0.01)
    for one in engine.instances:
        one.scheduler.check()
        assert one.scheduler.requests == 0 and not one.requests, one.name
        assert one.scheduler.allocator.available == one.scheduler.config.page_count, one.name
        assert one.in_flight == 0, one.name
        if one.transfer is not None:
            for side in ("_outgoing", "_incoming"):
                assert not getattr(one.transfer, side, {}), one.name
    assert len(engine.exchange) == 0


def run(engine, coroutine):
    async def whole():
        await engine.start()
        try:
            result = await coroutine
            await settled(engine)
            return result
        finally:
            await engine.drain(10)

    return asyncio.run(whole())


def prompts(count):
    generator = np.random.default_rng(7)
    common = generator.integers(0, 264, 12).tolist()
    return [
        common[: 4 * (i % 4)] + generator.integers(0, 264, 1 + 5 * (i % 7)).tolist()
        for i in range(count)
    ]


def test_apart_gives_the_tokens_of_together(model):
    """Greedy, token for token; pages are so few that requests wait and are preempted."""

    async def everything(engine):
        return await asyncio.gather(*[collect(engine, p, max_tokens=25) for p in prompts(10)])

    outputs = {}
    for prefill, decode in ((1, 0), (1, 1)):
        settings: dict[str, Any] = SMALL | {"page_count": 26}
        config = DeploymentConfig(prefill=prefill, decode=decode, **settings)
        engine: Any = build_engine(model, config)
        outputs[prefill, decode] = run(engine, everything(engine))
        if decode:
            assert engine.decoders[0].scheduler.iterations >= 25
        assert sum(one.scheduler.preemptions for one in engine.instances) > 0
    assert outputs[1, 0] == outputs[1, 1]


@pytest.mark.parametrize("max_batch", [1, 2])
def test_room_made_by_a_whole_batch_ending_is_given_on(model, max_batch):
    """The decode batch ends at once; what waits for it goes on, and nobody turns in circles."""
    settings: dict[str, Any] = SMALL | {"max_batch": max_batch}
    engine: Any = build_engine(model, DeploymentConfig(prefill=1, decode=1, **settings))
    scheduler = engine.entries[0].scheduler
    plan, planned = scheduler.next_iteration, []

    def counted(now_s, max_steps=1):
        planned.append(now_s)
        return plan(now_s, max_steps)

    scheduler.next_iteration = counted

    async def everything():
        requests = [collect(engine, prompt, max_tokens=20) for prompt in prompts(5)]
        return await asyncio.wait_for(asyncio.gather(*requests), 60)

    outputs = run(engine, everything())
    assert [reason for _, reason in outputs] == ["length"] * 5
    assert len(planned) < 100


def soak(model, perhaps_left, prefill, decode, count):
    """Requests of all kinds, a third of them left at a random moment, few pages."""
    rng = random.Random(prefill + decode)
    settings: dict[str, Any] = SMALL | {"page_count": 26, "max_requests": count}
    config = DeploymentConfig(
        prefill=prefill,
        decode=decode,
        **settings,
    )
    engine: Any = build_engine(model, config)
    ends = []

    async def one(prompt):
        await asyncio.sleep(rng.random() * count / 100)
        penalised = rng.random() < 0.2
        rule: dict[str, Any] = {
            "max_tokens": rng.randint(1, 40),
            "temperature": 1.0 if penalised else 0,
            "top_p": 0.9,
            "frequency_penalty": 1.0 if penalised else 0,
            "stop_token_ids": frozenset([rng.randrange(264)]),
            "seed": 1,
        }
        request = collect(engine, prompt, **rule)
        ends.append(await perhaps_left(request, rng, chance=0.35, rate_per_s=8))

    async def everything():
        await asyncio.gather(*[one(prompt) for prompt in prompts(count)])

    compile_ahead(engine.instances)
    run(engine, everything())
    assert len(ends) == count
    assert set(ends) == {"left", "stop", "length"}


@pytest.mark.parametrize(
    ("prefill", "decode"), [pytest.param(1, 0, marks=pytest.mark.slow), (1, 1)]
)
def test_a_soak_with_aborts_leaves_nothing(model, perhaps_left, prefill, decode):
    soak(model, perhaps_left, prefill, decode, 80)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_requests_leave_nothing(model, perhaps_left):
    soak(model, perhaps_left, 1, 2, 10_000)


def test_several_requests_end_with_their_first_token(model):
    engine: Any = build_engine(model, DeploymentConfig(prefill=1, decode=1, **SMALL))

    async def everything():
        return await asyncio.gather(*[collect(engine, p, max_tokens=1) for p in prompts(9)])

    for tokens, reason in run(engine, everything()):
        assert len(tokens) == 1 and reason == "length"


def test_a_failing_instance_ends_its_requests_with_an_error(model):
    engine: Any = build_engine(model, DeploymentConfig(prefill=1, decode=1, **SMALL))
    decode = engine.decoders[0]
    broken = decode.executor.dispatch
    calls = []

    def dispatch(iteration):
        calls.append(iteration)
        if len(calls) > 3:
            raise RuntimeError("the device is gone")
        return broken(iteration)

    decode.executor.dispatch = dispatch

    async def everything():
        ended = await asyncio.gather(*[collect(engine, p, max_tokens=20) for p in prompts(6)])
        assert engine.failure is not None and "the device is gone" in engine.failure
        with pytest.raises(RunError, match="the device is gone"):
            await collect(engine, [1, 2], max_tokens=2)
        return ended

    for _, reason in run(engine, everything()):
        assert reason == "error"


async def eight(engine):
    """Every second one drawn."""
    return await asyncio.gather(
        *[
            collect(engine, p, max_tokens=20, temperature=i % 2, seed=i)
            for i, p in enumerate(prompts(8))
        ]
    )


@pytest.fixture(scope="module")
def expected(model):
    """The tokens of `eight` where nothing fails."""
    engine = build_engine(model, DeploymentConfig(prefill=1, decode=0, **SMALL))
    return run(engine, eight(engine))


def poisoned(executor):
    """Real: what the next steps read comes of a step that failed, seen when they are awaited."""

    def fail(last):
        raise ValueError("injected")

    step = jax.jit(lambda last: jax.pure_callback(fail, last, last))
    executor._last = step(executor._last)


def exhausted(executor):
    raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")


@pytest.mark.parametrize(
    ("where", "method", "fault"),
    [
        ("decode-0", "dispatch", poisoned),
        ("decode-0", "dispatch", exhausted),
        ("decode-0", "insert", exhausted),
        ("prefill-0", "dispatch", poisoned),
        ("prefill-0", "extract", exhausted),
        ("instance-0", "dispatch", poisoned),
    ],
)
def test_a_fault_of_the_device_costs_nothing_but_time(model, expected, where, method, fault):
    """Same tokens, greedy and drawn; the instance goes on, its pages all there."""
    config = DeploymentConfig(prefill=1, decode=int(where != "instance-0"), **SMALL)
    engine: Any = build_engine(model, config)
    victim = next(one for one in engine.instances if one.name == where)
    whole, calls = getattr(victim.executor, method), []

    def sometimes(*arguments):
        calls.append(arguments)
        if len(calls) in (4, 6):
            fault(victim.executor)
        return whole(*arguments)

    setattr(victim.executor, method, sometimes)
    assert run(engine, eight(engine)) == expected
    assert not engine.failed and victim.load.faults >= 1


def test_a_device_that_does_not_answer_ends_its_instance(model):
    engine: Any = build_engine(model, DeploymentConfig(prefill=1, decode=0, **SMALL))
    instance = engine.instances[0]
    instance.executor.dispatch = lambda _: exhausted(None)
    instance.executor.rebuild = lambda: exhausted(None)
    assert {reason for _, reason in run(engine, eight(engine))} == {"error"}
    assert "Out of memory" in str(engine.failure)


def test_a_device_that_never_computes_ends_its_instance(model):
    """Each fault is outlived, but a request is begun three times and no more."""
    engine: Any = build_engine(model, DeploymentConfig(prefill=1, decode=0, **SMALL))
    instance = engine.instances[0]
    instance.executor.dispatch = lambda _: exhausted(None)

    async def one_by_one():
        for served in range(1, 5):
            assert await collect(engine, [1, 2], max_tokens=3) == ([], "error")
            assert (engine.failure is not None) == (served == 4)

    run(engine, one_by_one())
    assert "10 faults of the device in a row, the last: RESOURCE_EXHAUSTED" in str(engine.failure)
    assert instance.load.faults == 9


@pytest.mark.parametrize("decode", [0, 1])
def test_a_request_that_cannot_be_computed_ends_alone(model, decode):
    """More biases than the device holds, unchecked: an error for it, tokens for its neighbours."""
    engine = build_engine(model, DeploymentConfig(prefill=1, decode=decode, **SMALL))
    biases = dict.fromkeys(range(400), 1.0)

    async def everything():
        asked = [collect(engine, p, max_tokens=6) for p in prompts(4)]
        bad = [collect(engine, p, max_tokens=6, logit_bias=biases) for p in prompts(2)]
        return await asyncio.gather(asked[0], bad[0], *asked[1:], bad[1])

    found = run(engine, everything())
    assert [reason for _, reason in found] == ["length", "error", *["length"] * 3, "error"]
    assert [len(tokens) for tokens, _ in found] == [6, 0, 6, 6, 6, 0]
    assert not engine.failed


def test_a_bias_is_gone_with_its_request(model):
    """Drawn tokens are those of the request alone, beside a biased one and in its slot after it."""
    engine = build_engine(model, DeploymentConfig(prefill=1, decode=0, **SMALL))
    drawn = {"max_tokens": 8, "temperature": 0.8, "seed": 3}

    async def everything():
        alone = await collect(engine, prompts(1)[0], **drawn)
        for _ in range(2):
            biased = [collect(engine, p, max_tokens=8, logit_bias={7: 100}) for p in prompts(3)]
            found = await asyncio.gather(collect(engine, prompts(1)[0], **drawn), *biased)
            assert found[0] == alone and set(found[1][0]) == {7}
        penalised = [collect(engine, p, max_tokens=8, presence_penalty=0.5) for p in prompts(3)]
        found = await asyncio.gather(*penalised, collect(engine, prompts(1)[0], **drawn))
        assert found[-1] == alone

    run(engine, everything())


@pytest.mark.parametrize("dies", ["decode-0", pytest.param("prefill-1", marks=pytest.mark.slow)])
def test_requests_of_a_dead_instance_go_on_elsewhere(model, expected, dies):
    """Same tokens as without the failure, greedy and drawn; only the dead instance is lost."""
    config = DeploymentConfig(prefill=2, decode=2, **SMALL)
    engine: Any = build_engine(model, config)
    victim = next(one for one in engine.instances if one.name == dies)
    dispatch, calls = victim.executor.dispatch, []

    def broken(iteration):
        calls.append(iteration)
        if len(calls) > 2:
            raise RuntimeError("the device is gone")
        return dispatch(iteration)

    victim.executor.dispatch = broken

    async def whole():
        await engine.start()
        try:
            found = await eight(engine)
            assert len(engine.failed) == 1 and engine.failure is None
            again = await collect(engine, [1, 2, 3], max_tokens=3)
            assert len(again[0]) == 3
            for _ in range(200):
                await asyncio.sleep(0.01)
                if all(one.in_flight == 0 for one in engine.instances):
                    break
            for one in engine.instances:
                assert one.in_flight == 0, one.name
                if one is not victim:
                    one.scheduler.check()
                    assert one.scheduler.allocator.held == 0, one.name
            return found
        finally:
            await engine.drain(10)

    assert asyncio.run(whole()) == expected


def test_refusals(model):
    settings: dict[str, Any] = SMALL | {"max_requests": 2}
    config = DeploymentConfig(prefill=1, decode=1, **settings)
    engine: Any = build_engine(model, config)

    async def everything():
        with pytest.raises(UsageError, match="3 choices are asked for at once; at most 2"):
            engine.admit(3)
        with pytest.raises(UsageError, match="at most 96 fit"):
            await collect(engine, [1] * 90, max_tokens=7)
        tasks = [asyncio.create_task(collect(engine, [1, 2], max_tokens=30)) for _ in range(2)]
        await asyncio.sleep(0.01)
        with pytest.raises(Overloaded, match="at most 2") as caught:
            await collect(engine, [1], max_tokens=1)
        assert caught.value.retry_after_s >= 1
        await asyncio.gather(*tasks)

    run(engine, everything())
    with pytest.raises(UsageError, match="decode=-1"):
        DeploymentConfig(decode=-1)
    with pytest.raises(UsageError, match="max_length=9000 exceeds the model's 256"):
        build_engine(model, DeploymentConfig(max_length=9000))


def test_two_devices_an_instance_give_the_same_tokens(model):
    """Tensor parallel: the same greedy tokens, and two all-reduces a layer in the compiled step."""

    async def everything(engine):
        return await asyncio.gather(*[collect(engine, p, max_tokens=12) for p in prompts(4)])

    outputs = []
    for ways in (1, 2):
        config = DeploymentConfig(prefill=1, decode=1, tensor_parallel=ways, **SMALL)
        engine: Any = build_engine(model, config)
        outputs.append(run(engine, everything(engine)))
    assert outputs[0] == outputs[1]
    executor: Any = engine.decoders[0].executor
    compiled = next(step for key, step in executor.steps._compiled.items() if key[0] == "decode")
    # One after the attention's output, one after the feed-forward, in each of two layers.
    assert len(re.findall(r"all-reduce(?:-start)?\(", compiled.as_text())) == 4
    with pytest.raises(UsageError, match="tensor_parallel=3 does not divide num_kv_heads=2"):
        build_engine(model, DeploymentConfig(prefill=1, decode=0, tensor_parallel=3, **SMALL))
