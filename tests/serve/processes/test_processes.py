"""Instances as processes of their own: same tokens, and nothing lost when one is killed."""

import asyncio
import dataclasses
import queue
import random
import signal
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.errors import RunError, UsageError
from jaxsys.model.save import save_safetensors
from jaxsys.serve.clock import WallClock
from jaxsys.serve.deployment import DeploymentConfig, build_engine
from jaxsys.serve.energy.governors import GovernorChoice
from jaxsys.serve.engine import Engine
from jaxsys.serve.handover import Ticket
from jaxsys.serve.processes.fleet import Fleet, LocalProcesses
from jaxsys.serve.processes.page_transfer import PageServer
from jaxsys.serve.processes.worker import WorkerSpec
from jaxsys.serve.requests import SamplingParameters

SMALL = DeploymentConfig(
    max_batch=4, max_length=96, max_prefill_tokens=16, page_size=4, page_count=40, max_requests=99
)


@pytest.fixture(scope="module")
def template(model, tmp_path_factory, compiled):
    """What instances have in common: a tiny model's files, and one cache of compiled steps."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    save_safetensors(path, model.config, model.parameters, tokenizer=model.tokenizer)
    return WorkerSpec(
        name="",
        role="both",
        model=str(path),
        deployment=SMALL,
        governor=GovernorChoice(gpu="none"),
        compilation_cache=str(compiled),
        front_host="",
        front_port=0,
        token="",
    )


def prompts(count):
    generator = np.random.default_rng(7)
    common = generator.integers(0, 264, 12).tolist()
    return [
        common[: 4 * (i % 4)] + generator.integers(0, 264, 1 + 5 * (i % 7)).tolist()
        for i in range(count)
    ]


async def collect(engine, prompt, **sampling):
    settings: dict[str, Any] = {"temperature": 0} | sampling
    tokens, last = [], None
    async for event in engine.generate(prompt, SamplingParameters(**settings)):
        last = event
        if event.token is not None:
            tokens.append(event.token)
    assert last is not None
    return tokens, last.finish_reason, last.message


def load(engine):
    """Twelve requests, every third one drawn with a seed."""
    return asyncio.gather(
        *[
            collect(engine, p, max_tokens=45, temperature=float(i % 3 == 2), seed=i)
            for i, p in enumerate(prompts(12))
        ]
    )


@pytest.fixture(scope="module")
def expected(model):
    """The tokens of one engine that does everything in one process."""
    engine = build_engine(model, dataclasses.replace(SMALL, decode=0))

    async def run():
        await engine.start()
        found = await load(engine)
        await engine.drain(10)
        return found

    return asyncio.run(run())


async def settled(engine):
    """Waits until nothing is anywhere and every page is back."""
    instances = engine.instances
    for _ in range(600):
        await asyncio.sleep(0.02)
        quiet = not engine.unfinished and not len(engine.exchange)
        if quiet and all(one.in_flight == 0 and not one.requests for one in instances):
            loads = [one.load for one in instances]
            if all(load.pages_held == 0 and load.batch == load.waiting == 0 for load in loads):
                return
    held = [(one.name, one.in_flight, one.requests, one.load) for one in instances]
    raise AssertionError(f"left behind: {engine.unfinished}, {len(engine.exchange)}, {held}")


def with_fleet(template, prefill, decode, body, **engine_settings):
    """Runs `body(engine, fleet)` with instances up."""

    async def whole():
        engine = Engine(clock=WallClock(), max_requests=99, **engine_settings)
        await engine.start()
        fleet = Fleet(engine, LocalProcesses(), template, host="127.0.0.1")
        await fleet.start(prefill=prefill, decode=decode)
        try:
            return await body(engine, fleet)
        finally:
            await engine.drain(5)
            await fleet.close()

    return asyncio.run(whole())


def process(fleet, name):
    return fleet.places[name].launched.process


async def until(condition, timeout_s=120):
    """Waits for a condition."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come about"
        await asyncio.sleep(0.002)


async def killed_mid_load(engine, fleet, victim, expected):
    """Under load, a process dies; the tokens are the same and another takes its place."""
    running = asyncio.ensure_future(load(engine))
    await until(lambda: any(one.in_flight for one in engine.decoders))
    count = len(engine.instances)
    process(fleet, victim).send_signal(signal.SIGKILL)
    assert await running == expected
    await until(lambda: not engine.failed and len(engine.instances) == count)
    assert victim not in fleet.places


def test_a_killed_decode_process_loses_nothing_and_is_replaced(template, expected, caplog):
    caplog.set_level("INFO", logger="jaxsys.serve.processes.fleet")

    async def body(engine, fleet):
        assert await load(engine) == expected
        await settled(engine)
        await killed_mid_load(engine, fleet, "decode-0", expected)
        await settled(engine)

    with_fleet(template, 1, 1, body)
    log = [(one.message, getattr(one, "instance", None)) for one in caplog.records]
    assert ("up", "decode-1") in log and ("replaced a lost instance", "decode-0") in log


@pytest.mark.slow
def test_killed_and_frozen_processes_lose_nothing(template, expected):
    async def body(engine, fleet):
        for victim in ("decode-0", "prefill-0", "prefill-1"):
            await killed_mid_load(engine, fleet, victim, expected)
        running = asyncio.ensure_future(load(engine))
        await until(lambda: any(one.in_flight for one in engine.decoders))
        process(fleet, "decode-1").send_signal(signal.SIGSTOP)
        assert await running == expected
        await until(lambda: not engine.failed and len(engine.instances) == 4)
        await settled(engine)

    with_fleet(template, 2, 2, body)


@pytest.mark.slow
def test_aborts_and_few_pages_leave_nothing_behind(template, perhaps_left):
    """Requests left at random moments, decode preempting for want of pages."""
    few = dataclasses.replace(template.deployment, page_count=26)
    rng = random.Random(3)

    async def body(engine, fleet):
        ends = []

        async def one(prompt):
            await asyncio.sleep(rng.random() * 4)
            request = collect(engine, prompt, max_tokens=rng.randint(1, 40))
            ends.append(await perhaps_left(request, rng, chance=0.4, rate_per_s=20))

        engine.max_requests = 1000
        await asyncio.gather(*[one(prompt) for prompt in prompts(300)])
        await settled(engine)
        assert set(ends) == {"left", "length"}
        assert sum(one.load.preemptions for one in engine.instances) > 0

    with_fleet(dataclasses.replace(template, deployment=few), 2, 2, body)


@pytest.mark.slow
def test_instances_come_and_go_under_load(template, expected):
    async def body(engine, fleet):
        running = asyncio.ensure_future(load(engine))
        await fleet.scale(prefill=1, decode=2)
        assert await running == expected
        running = asyncio.ensure_future(load(engine))
        await until(lambda: all(one.in_flight for one in engine.decoders))
        await fleet.scale(prefill=1, decode=1)
        assert await running == expected
        assert sorted(fleet.places) == ["decode-0", "prefill-0"]
        await settled(engine)
        with pytest.raises(UsageError, match="decode=0 must be at least 1 each"):
            await fleet.scale(prefill=1, decode=0)

    with_fleet(template, 1, 1, body)


def test_an_instance_that_cannot_start_says_why(template, capfd):
    wrong = dataclasses.replace(template, model="/nowhere/model")
    with pytest.raises(RunError, match="instance instance-0 did not come up.*status 1"):
        with_fleet(wrong, 1, 0, None)
    assert "/nowhere/model does not exist" in capfd.readouterr().err


def test_pages_are_pulled_released_or_given_up():
    """Also twice released, never published, and from nobody: each answered, nothing kept."""
    device = jax.devices()[0]
    here, there = (PageServer(device, "127.0.0.1", timeout_s=0.5) for _ in range(2))
    contents = jnp.arange(48.0).reshape(2, 4, 3, 2, 1)
    like = jax.ShapeDtypeStruct(contents.shape, contents.dtype, sharding=contents.sharding)
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for number in range(5):
        there.fetch(here.publish(number // 2, contents), like, results.put)
    for number in range(5):
        found = results.get(timeout=20)
        assert np.array_equal(found, contents)
        here.release(number // 2, pulled=True)
    ticket = here.publish("b", contents)
    here.release("b", pulled=False)
    here.release("b", pulled=False)
    time.sleep(0.5)
    for lost in (ticket, Ticket("127.0.0.1:1", 5, 4)):
        there.fetch(lost, like, results.put)
        assert isinstance(results.get(timeout=20), Exception)
    assert here.published == 0


@pytest.mark.slow
def test_adapters_are_loaded_everywhere_and_by_who_comes_later(
    model, template, write_adapter, tmp_path
):
    """Mixed requests give the tokens of one process, also over a replaced instance."""
    folders = []
    for seed in range(2):
        folders.append(str(tmp_path / str(seed)))
        targets = ("query", "value", "mlp/down")
        write_adapter(
            folders[-1], model.config, model.parameters, rank=2, targets=targets, seed=seed
        )
    small = dataclasses.replace(SMALL, max_loras=2, max_lora_rank=2)

    async def mixed(engine):
        async def one(index, prompt):
            rule = SamplingParameters(temperature=0, max_tokens=45)
            name = (None, "a", "b")[index % 3]
            return [
                event.token
                async for event in engine.generate(prompt, rule, adapter=name)
                if event.token is not None
            ]

        return await asyncio.gather(*[one(*each) for each in enumerate(prompts(12))])

    async def loaded(engine):
        for name, folder in zip("ab", folders, strict=True):
            await engine.adapters.load(name, folder)

    async def together():
        engine = build_engine(model, dataclasses.replace(small, decode=0))
        await engine.start()
        await loaded(engine)
        found = await mixed(engine)
        await engine.drain(10)
        return found

    async def body(engine, fleet):
        engine.adapters.most = 2
        await loaded(engine)
        with pytest.raises(UsageError, match="has no adapter_config.json"):
            engine.adapters.unload("b")
            await engine.adapters.load("b", str(tmp_path))
        await engine.adapters.load("b", folders[1])
        running = asyncio.ensure_future(mixed(engine))
        await until(lambda: any(one.in_flight for one in engine.decoders))
        process(fleet, "decode-0").send_signal(signal.SIGKILL)
        assert await running == wanted
        await until(lambda: not engine.failed and len(engine.instances) == 2)
        assert await mixed(engine) == wanted
        await settled(engine)

    wanted = asyncio.run(together())
    assert len({tuple(tokens) for tokens in wanted}) == 12
    with_fleet(dataclasses.replace(template, deployment=small), 1, 1, body)
