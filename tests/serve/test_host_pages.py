"""Pages go to the host's memory and come back the same, and every place is accounted for."""

import queue
import random
from typing import Any

import jax
import numpy as np
import pytest

from jaxsys.errors import UsageError
from jaxsys.model import initial_parameters, preset
from jaxsys.serve.clock import VirtualClock
from jaxsys.serve.deployment import DeploymentConfig
from jaxsys.serve.executor import JaxExecutor
from jaxsys.serve.hooks import NoGovernor
from jaxsys.serve.host_copies import HostCopies
from jaxsys.serve.host_pages import HostIndex
from jaxsys.serve.iterations import SchedulerConfig
from jaxsys.serve.requests import Request, RequestState, SamplingParameters
from jaxsys.serve.scheduler import Scheduler
from jaxsys.serve.steps import ExecutorConfig
from jaxsys.serve.turns import Turns
from jaxsys.serve.weights import serving_weights

CONFIG = preset("tiny")


def config_of(**changes) -> SchedulerConfig:
    values: dict[str, Any] = {
        "page_count": 16,
        "page_size": 4,
        "max_batch": 2,
        "max_prefill_tokens": 16,
        "max_length": 64,
        "decode_buckets": (2,),
        "host_pages": 40,
    }
    return SchedulerConfig(**(values | changes))


def request_of(name, prompt, max_tokens=4):
    rule = SamplingParameters(max_tokens=max_tokens, temperature=0)
    return Request(name, sampling=rule, arrival_s=0.0, prompt_tokens=prompt)


class Owner:
    """Of turns, without a thread; what is posted waits until there is nothing else to do."""

    def __init__(self, scheduler, executor, *, fails=False):
        self.scheduler, self.executor, self.fails = scheduler, executor, fails
        self.inbox: queue.SimpleQueue = queue.SimpleQueue()
        self.copies = HostCopies(executor, scheduler.config.host_pages, self.inbox.put)
        self.fetches = 0

    def dispatch(self, iteration):
        saves = iteration.saves
        if saves:
            self.copies.save(saves, lambda there: self.scheduler.saved(saves, arrived=there))
        return self.executor.dispatch(iteration)

    def fetch(self, fetch):
        self.fetches += 1
        if self.fails:
            copies: Any = self.copies
            copies._pool = None
        start = self.scheduler.start_fetched
        self.copies.fetch(fetch, lambda there: start(fetch.request, arrived=there))

    def ended(self, iteration, outcome, latency_s, now_s):
        return

    def completed(self, iteration, outcome, completion, now_s):
        return

    def read(self, *, wait):
        if wait:
            self.inbox.get(timeout=30)()
        while not self.inbox.empty():
            self.inbox.get()()


def run(turns, owner, requests):
    scheduler = turns.scheduler
    for one in requests:
        scheduler.add(one)
    while scheduler.requests or turns.in_flight:
        owner.read(wait=turns.stuck and bool(scheduler.fetching))
        flight = turns.turn()
        if flight is not None:
            turns.end(owner.executor.collect(flight.handle))
        scheduler.check()
    return [one.output_tokens for one in requests]


@pytest.fixture(scope="module")
def executor() -> Any:
    parameters = jax.tree.map(lambda leaf: leaf * 4, initial_parameters(CONFIG, seed=1))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return JaxExecutor(
        CONFIG,
        serving_weights(CONFIG, parameters, placement=place),
        config_of(),
        placement=place,
        shapes=ExecutorConfig(
            decode_buckets=(2,),
            piece_buckets=(16,),
            table_buckets=(16,),
            transfer_buckets=(16,),
            hosted=True,
        ),
    )


def sessions():
    """Turns of two sessions in turn, of which the device has room for one."""
    generator = np.random.default_rng(3)
    texts = [generator.integers(0, 264, 40).tolist() for _ in range(2)]
    prompts = []
    for turn in range(3):
        for text in texts:
            prompts.append(text[: 24 + 8 * turn])
    return prompts


@pytest.mark.parametrize("fails", [False, True])
def test_what_comes_back_is_what_was_computed(executor, fails):
    """Answers are those without; where nothing comes back, pages are computed again."""
    answers, hits = {}, {}
    for host_pages in (0, 40):
        scheduler = Scheduler(config_of(host_pages=host_pages))
        owner = Owner(scheduler, executor, fails=fails)
        turns = Turns(scheduler, NoGovernor(), VirtualClock(), owner)
        turns.start()
        found = []
        for index, prompt in enumerate(sessions()):
            one = request_of(index, prompt)
            run(turns, owner, [one])
            found.append(one)
            owner.copies._thread.submit(lambda: None).result()  # copies on their way have come
            owner.read(wait=False)
        owner.copies.close()
        answers[host_pages] = [one.output_tokens for one in found]
        hits[host_pages] = sum(one.cached_tokens for one in found)
        if host_pages and not fails:
            assert scheduler.host is not None and scheduler.host.fetched > 0
    assert answers[0] == answers[40]
    assert hits[40] > hits[0] or fails


def test_a_request_that_ends_while_its_pages_come_gives_all_back(executor):
    scheduler = Scheduler(config_of(page_count=12))  # room for one session
    owner = Owner(scheduler, executor)
    turns = Turns(scheduler, NoGovernor(), VirtualClock(), owner)
    turns.start()
    prompts = sessions()
    for index, prompt in enumerate(prompts[:2]):
        run(turns, owner, [request_of(index, prompt)])
        owner.copies._thread.submit(lambda: None).result()
        owner.read(wait=False)
    held: Any = []
    owner.fetch = held.append
    again = request_of("again", prompts[2])
    scheduler.add(again)
    turns.turn()
    assert again.state is RequestState.FETCHING and len(held) == 1
    scheduler.check()
    scheduler.abort(again, 0.0)
    scheduler.check()
    assert scheduler.allocator.held == 0 and not scheduler.requests
    inserted = []
    executor_insert, executor.insert = executor.insert, lambda *given: inserted.append(given)
    try:
        owner.copies.fetch(held[0], lambda there: None)
        owner.copies.close()
        owner.read(wait=False)
    finally:
        executor.insert = executor_insert
    assert not inserted  # its pages are others' by now
    scheduler.start_fetched(again)
    assert again.state is RequestState.FINISHED


def test_an_index_under_random_use():
    """Ends of prefixes go before their beginnings; what is being fetched stays."""
    rng = random.Random(5)
    index = HostIndex(12)
    pinned: list[list[int]] = []
    coming: list[Any] = []
    for _ in range(3000):
        session, depth = rng.randrange(5), rng.randrange(1, 7)
        keys = [(session, block) for block in range(depth)]
        action = rng.random()
        if action < 0.5:
            parent = None
            for key in keys:
                if index.begin(key, parent) is not None:
                    coming.append(key)
                parent = key
        elif action < 0.7 and coming:
            key = coming.pop(rng.randrange(len(coming)))
            (index.saved if rng.random() < 0.9 else index.drop)(key)
        elif action < 0.9:
            places = index.find(keys)
            if places:
                pinned.append(places)
        elif pinned:
            index.let_go(pinned.pop(rng.randrange(len(pinned))))
        while len(pinned) > 2:
            index.let_go(pinned.pop(0))
        index.check()
        assert index.held <= 12


def test_what_has_no_room_or_windows_is_refused():
    with pytest.raises(UsageError, match="layers with windows"):
        config_of(windows=(None, 8))
    with pytest.raises(UsageError, match="0 or more GiB"):
        DeploymentConfig(host_pages_gib=-1)
