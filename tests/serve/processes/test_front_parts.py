"""What several fronts share, a part at a time: counts, notes, turns, lines, what is told."""

import asyncio
import contextlib
import dataclasses
import os
import random
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from jaxsys.errors import RunError, UsageError
from jaxsys.serve.adapters import KnownAdapter
from jaxsys.serve.clock import WallClock
from jaxsys.serve.energy.prefix_route import PrefixIndex
from jaxsys.serve.energy.slo import SharedSlo
from jaxsys.serve.engine import Engine
from jaxsys.serve.http.dashboard import Dashboard
from jaxsys.serve.http.kept_turns import SharedTurns
from jaxsys.serve.http.metrics import Metrics
from jaxsys.serve.http.responses import NoSuchResponse, OwnTurns
from jaxsys.serve.member import InstanceLoad, TokenEvent
from jaxsys.serve.processes import lines, shared
from jaxsys.serve.processes.channel import Channel
from jaxsys.serve.processes.fronts import _Everything
from jaxsys.serve.processes.lines import Line
from jaxsys.serve.processes.notes import Notes
from jaxsys.serve.processes.secret import CHALLENGE_BYTES
from jaxsys.serve.processes.shared import Shared, SharedCrowd
from jaxsys.serve.processes.wire import Frames, Named, load_of, load_values, pack
from jaxsys.serve.requests import Request, SamplingParameters


def memory(fronts=2, instances=3, adapters=2):
    return Shared.create(fronts=fronts, instances=instances, adapters=adapters)


# --- counts -----------------------------------------------------------------------------------


def test_counts_are_sums_over_fronts_without_those_that_are_gone():
    first = memory()
    second = Shared(os.dup(first.file), fronts=2, instances=3, adapters=2)
    one, two = first.instance(1, 0), second.instance(1, 1)
    one.add(3)
    two.add(4)
    assert one.total() == two.total() == 7
    others = [first.requests(0), first.instance(0, 0), first.instance(2, 0), first.adapter(0, 0)]
    assert all(other.total() == 0 for other in others)
    crowds = SharedCrowd(first, 0), SharedCrowd(second, 1)
    for crowd in crowds:
        crowd.place({"a@1": 1})
        crowd.add(2, "a@1")
    crowds[0].add(1, None)
    assert [crowd.total() for crowd in crowds] == [5, 5]
    assert [crowd.uses("a@1") for crowd in crowds] == [4, 4]
    first.clear(1)
    assert (one.total(), crowds[0].total(), crowds[0].uses("a@1")) == (3, 3, 2)


CROWDED = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("shared", sys.argv[1])
shared = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shared)
file, number, most = map(int, sys.argv[2:])
memory = shared.Shared(file, fronts=2, instances=3, adapters=2)
crowd = shared.SharedCrowd(memory, number)
taken = 0
for _ in range(4 * most):
    with crowd.lock():
        if crowd.total() < most:
            crowd.add(1, None)
            taken += 1
print(taken)
"""
"""Takes up requests as `Engine.submit` does, without what that needs."""


def test_no_more_requests_are_taken_than_all_fronts_may_have():
    """Two processes at once, each asking for four times as many as there is room for in all."""
    memory_of_both = memory()
    command = [sys.executable, "-c", CROWDED, shared.__file__, str(memory_of_both.file)]
    both = [
        subprocess.Popen(
            [*command, str(number), "4000"],
            stdout=subprocess.PIPE,
            pass_fds=[memory_of_both.file],
            text=True,
        )
        for number in range(2)
    ]
    taken = [int(one.communicate(timeout=60)[0]) for one in both]
    assert sum(taken) == 4000 == memory_of_both.requests(0).total()


# --- notes ------------------------------------------------------------------------------------


def test_what_one_front_notes_others_know_also_one_that_comes_later():
    all_of_them = memory(fronts=3)
    rings = [all_of_them.notes(number) for number in range(3)]
    notes = [Notes(rings[n], [rings[m] for m in range(3) if m != n]) for n in range(3)]
    plain = PrefixIndex()
    rng = random.Random(1)
    keys = [rng.randbytes(16) for _ in range(40)]
    for round_ in range(200):
        name, length = f"prefill-{round_ % 4}", rng.randint(1, 40)
        author = rng.choice(notes)
        author.keep_only([f"prefill-{n}" for n in range(4)])
        author.note(name, keys[:length], most=30)
        plain.note(name, keys[:length], most=30)
    for one in notes:
        one.keep_only([f"prefill-{n}" for n in range(4)])
        for n in range(4):
            assert one.held(f"prefill-{n}", keys) == plain.held(f"prefill-{n}", keys)
    again = Notes(rings[0], rings[1:])  # in a killed one's place
    again.keep_only(["prefill-2"])
    assert again.held("prefill-2", keys) > 0 and again.held("prefill-1", keys) == 0


def test_a_ring_that_was_overrun_is_read_from_its_round():
    ring, other = memoryview(bytearray(8 + 4096)), memoryview(bytearray(8 + 4096))
    writer, reader = Notes(ring, []), Notes(other, [ring])
    rng = random.Random(2)
    for number in range(500):
        blocks = [rng.randbytes(16) for _ in range(rng.randint(1, 30))]
        writer.note("a", blocks, most=10**6)
        if number % 7 == 0:
            reader.keep_only(["a"])
            assert reader.held("a", blocks) in (0, len(blocks))  # a round's end may be missed
    known = writer._blocks["a"].keys()
    assert len(known) > len(reader._blocks["a"]) > 500
    assert reader._blocks["a"].keys() <= known  # and nothing that was never noted


# --- turns ------------------------------------------------------------------------------------


def turn(name, text, previous=None):
    """A response's body with one message."""
    item = {"id": f"msg_{name}", "type": "message", "role": "assistant", "content": text}
    return {"id": name, "previous_response_id": previous, "output": [item]}


def message(name, text):
    return {"id": name, "type": "message", "role": "user", "content": text}


@pytest.fixture(params=["one", "shared"])
def kept(request, tmp_path):
    """Makes a store, and whoever else looks at the same one."""

    def make(**limits):
        if request.param == "one":
            store = OwnTurns(**limits)
            return store, store
        path = tmp_path / "turns.sqlite"
        return SharedTurns(path, **limits), SharedTurns(path, **limits)

    return make


def test_turns_go_on_from_those_before(kept):
    store, other = kept()
    items = store.conversation(None, [message("m1", "hello")])
    store.keep(turn("r1", "good day"), items, items)
    fresh = [message("m2", "and then"), {"type": "item_reference", "id": "msg_r1"}]
    items = other.conversation("r1", fresh)
    assert [one["id"] for one in items] == ["m1", "msg_r1", "m2", "msg_r1"]
    other.keep(turn("r2", "nothing", "r1"), fresh, items)
    assert [one["id"] for one in store.inputs("r2")] == ["m1", "msg_r1", "m2", "msg_r1"]
    assert store.get("r2") == other.get("r2") == turn("r2", "nothing", "r1")
    store.forget("r1")
    with pytest.raises(NoSuchResponse):
        other.get("r1")
    with pytest.raises(UsageError, match="'m1' is not kept"):
        other.conversation(None, [{"type": "item_reference", "id": "m1"}])
    # What goes on from it is whole.
    assert [one["id"] for one in other.conversation("r2", [])][:2] == ["m1", "msg_r1"]
    with pytest.raises(NoSuchResponse) as found:
        store.conversation("r1", [])
    assert found.value.param == "previous_response_id"


def test_old_turns_make_room(kept):
    store, other = kept(most=5, most_bytes=2000)
    previous = None
    for number in range(12):
        own = [message(f"m{number}", "x" * (10 if number < 11 else 1000))]
        items = other.conversation(previous, own)
        assert len(items) == 2 * number + 1
        store.keep(turn(f"r{number}", "y", previous), own, items)
        previous = f"r{number}"
        left = [n for n in range(number + 1) if has(other, f"r{n}")]
        assert left[-1] == number and len(left) == (min(5, number + 1) if number < 11 else 4)


def has(store, name):
    with contextlib.suppress(NoSuchResponse):
        return bool(store.get(name))
    return False


def test_turns_that_nothing_goes_on_from_leave_nothing(tmp_path):
    store = SharedTurns(tmp_path / "turns.sqlite")
    for name, previous in (("a", None), ("b", "a"), ("c", "b"), ("d", "b")):
        own = [message(f"m{name}", "x")]
        store.keep(turn(name, "y", previous), own, store.conversation(previous, own))
    for name in ("a", "b", "d"):
        store.forget(name)
    assert len(store.conversation("c", [])) == 6
    store.forget("c")
    for table in ("turns", "items"):
        assert store._file.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)


# --- what is said -----------------------------------------------------------------------------


def test_a_load_travels_as_its_values():
    load = InstanceLoad(batch=3, energy_j=1.5, clock_bounds_mhz=(300, 900), accepted_at=(2, 1))
    (frame,) = Frames().feed(pack(["pulse", [], load_values(load)]))
    found = load_of(frame[2])
    assert (found.batch, found.energy_j, found.power_w) == (3, 1.5, None)
    assert tuple(found.clock_bounds_mhz or ()) == (300, 900) and tuple(found.accepted_at) == (2, 1)


def test_a_request_s_name_knows_its_line():
    line = object()
    name = Named("cmpl-1", line)
    assert name == "cmpl-1" and hash(name) == hash("cmpl-1")
    found: dict[str, int] = {name: 1}
    assert found["cmpl-1"] == 1
    assert next(iter(Frames().feed(pack(["a", name])))) == ["a", "cmpl-1"]
    assert name.line is line


async def channels(answer=None, told=None):
    """Two ends of a channel; what the second end is told goes to `told`."""
    ends = socket.socketpair()
    gone = asyncio.Event()

    async def nothing(kind, values):
        raise RunError("nobody asks this")

    first = await Channel(answer=nothing, told=lambda *_: None, ended=lambda: gone.set()).open(
        ends[0]
    )
    second = await Channel(
        answer=answer or nothing, told=told or (lambda *_: None), ended=lambda: None
    ).open(ends[1])
    return first, second, gone


def test_a_channel_answers_out_of_order_and_tells_faults():
    async def answer(kind, values):
        if kind == "slow":
            await asyncio.sleep(0.05)
        if kind == "known":
            raise KnownAdapter("there already")
        if kind == "broken":
            raise ZeroDivisionError("oh")
        return [kind, *values]

    async def run():
        heard = []
        first, second, gone = await channels(answer, lambda *said: heard.append(said))
        first.tell("hello", 1, b"x")
        slow = asyncio.ensure_future(first.ask("slow", 7))
        assert await first.ask("quick") == ["quick"] and not slow.done()
        assert await slow == ["slow", 7] and heard == [("hello", [1, b"x"])]
        with pytest.raises(KnownAdapter, match="there already"):
            await first.ask("known")
        with pytest.raises(RunError, match="ZeroDivisionError"):
            await first.ask("broken")
        with pytest.raises(RunError, match="within 0.01 s"):
            await first.ask("slow", timeout_s=0.01)
        waiting = asyncio.ensure_future(first.ask("slow"))
        await asyncio.sleep(0)
        second.close()
        with pytest.raises(RunError, match="has ended"):
            await waiting
        await asyncio.wait_for(gone.wait(), 5)
        with pytest.raises(RunError, match="has ended"):
            await first.ask("quick")

    asyncio.run(run())


# --- lines ------------------------------------------------------------------------------------


@pytest.fixture
def line():
    """A line and its other end, that has been proved to and reads nothing by itself."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = []

        def take():
            connection, _ = listener.accept()
            connection.sendall(b"c" * CHALLENGE_BYTES)
            taken.append(connection)

        thread = threading.Thread(target=take)
        thread.start()
        made = Line(listener.getsockname(), "secret")
        thread.join()
    taken[0].recv(32, socket.MSG_WAITALL)
    yield made, taken[0]
    made.close()
    taken[0].close()


def test_a_front_that_reads_nothing_holds_nobody_up(line):
    """What is sent meanwhile comes in its order, once it is read."""
    made, other = line
    began_s = time.monotonic()
    for number in range(3000):
        made.send(["events", number, "x" * 4000])
    assert time.monotonic() - began_s < 5
    frames, numbers = Frames(), []
    other.settimeout(20)
    while len(numbers) < 3000:
        numbers += [frame[1] for frame in frames.feed(other.recv(1 << 20))]
    assert numbers == list(range(3000))
    made.send(["pulse"])
    assert next(iter(frames.feed(other.recv(100)))) == ["pulse"]


@pytest.mark.parametrize("limit", ["bytes", "seconds"])
def test_a_front_that_takes_nothing_for_long_is_given_up(line, monkeypatch, limit):
    made, _ = line
    monkeypatch.setattr(lines, "MOST_UNSENT", (8 << 20) if limit == "bytes" else (64 << 20))
    monkeypatch.setattr(lines, "UNSENT_S", 60.0 if limit == "bytes" else 0.1)
    ended = threading.Event()

    def read():
        made.read(lambda _: True)
        ended.set()

    threading.Thread(target=read, daemon=True).start()
    for number in range(10_000 if limit == "bytes" else 2_000):
        made.send(["events", number, "x" * 8000])
    assert ended.wait(10) and made.closed


# --- sums -------------------------------------------------------------------------------------


def served(engine, count, *, tokens, reason="length", refuse=0):
    """A front's metrics and counts after so many requests."""
    metrics, counts = Metrics(engine), Dashboard(engine, SharedSlo())
    for number in range(count):
        request = Request(
            f"r{number}", sampling=SamplingParameters(), arrival_s=0.0, prompt_tokens=[1, 2]
        )
        for at in range(tokens):
            now_s = 0.1 * (at + 1)
            request.timing.token_times_s.append(now_s)
            last: Any = reason if at == tokens - 1 else None
            event: Any = TokenEvent(request, 7, None, last, now_s)
            metrics.on_token(request, event)
            counts.on_token(request, event, f"decode-{number % 2}")
    for _ in range(refuse):
        metrics.refused.labels("429").inc()
    return metrics, counts


def test_what_fronts_count_is_shown_as_if_it_were_one(metric_lines):
    engine = Engine(clock=WallClock(), max_requests=9)
    one, two, all_of_them = (
        served(engine, 3, tokens=4, refuse=2),
        served(engine, 5, tokens=2, reason="stop"),
        served(engine, 0, tokens=1),
    )
    alone, _ = served(engine, 3, tokens=4, refuse=2)
    totals = [one[0].totals(), two[0].totals()]
    summed = Metrics(engine, "tiny", lambda: totals)
    found = metric_lines(summed.text())
    assert found['jaxsys_requests_total{finish_reason="length"}'] == 3
    assert found['jaxsys_requests_total{finish_reason="stop"}'] == 5
    assert found["jaxsys_output_tokens_total"] == 22
    assert found["jaxsys_ttft_seconds_count"] == 8
    assert found['jaxsys_ttft_seconds_bucket{le="+Inf"}'] == 8
    assert found["jaxsys_itl_seconds_count"] == 14
    assert found['jaxsys_requests_refused_total{status="429"}'] == 2 == summed.count_refused()
    assert found['vllm:generation_tokens_total{model_name="tiny"}'] == 22
    assert found['vllm:request_success_total{finished_reason="stop",model_name="tiny"}'] == 5
    names = {name.partition("{")[0] for name in metric_lines(alone.text())}
    assert names >= {name.partition("{")[0] for name in found if name.startswith("jaxsys")}
    board = all_of_them[1]
    for _, counts in (one, two):
        data = next(iter(Frames().feed(pack(["x", counts.take()]))))[1]
        board.absorb(data)
        assert counts.take()["tokens"] == 0  # told once
    assert dataclasses.astuple(board.total) == (8, 8, 14, 0)
    assert {name: one.first_tokens for name, one in board.by_instance.items()} == {
        "decode-0": 5,
        "decode-1": 3,
    }
    assert board._span.tokens == 22 and sum(board._span.itl.counts.values()) == 14


@pytest.fixture
def metric_lines():
    """Names with labels, and values, of an exposition."""

    def read(text):
        found = {}
        for one in text.decode().splitlines():
            if not one.startswith("#"):
                name, _, value = one.rpartition(" ")
                found[name] = float(value)
        return found

    return read


def test_an_adapter_is_in_use_until_every_front_knows_that_it_is_gone():
    """Also where no front has a request with it at the moment: one may just take one."""
    crowd = SharedCrowd(memory(), 0)
    crowd.place({"a@1": 0})
    engine = _Everything(clock=WallClock(), max_requests=9)
    front = SimpleNamespace(told=[(1, frozenset({"a@1"}))])
    engine.fronts = SimpleNamespace(fronts=[front], crowd=crowd)  # type: ignore[assignment]
    assert engine.uses("a@1")
    front.told.append((2, frozenset()))
    assert engine.uses("a@1")
    front.told.pop(0)
    assert not engine.uses("a@1")
    crowd.add(1, "a@1")
    assert engine.uses("a@1")
