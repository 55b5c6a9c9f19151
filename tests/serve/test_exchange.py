"""Hand-over messages between recorded instances: who is told what, and what becomes of lateness."""

from typing import Any

import pytest

from jaxsys.errors import UsageError
from jaxsys.serve.clock import VirtualClock
from jaxsys.serve.exchange import Exchange, HandoverLimits
from jaxsys.serve.handover import Delivery, Grant, Offer, Receipt, Refusal, Ticket, Withdrawal
from jaxsys.serve.hooks import FewestRequestsRouter
from jaxsys.serve.member import Member
from jaxsys.serve.processes.wire import (
    Frames,
    message_frame,
    message_of,
    pack,
    request_data,
    request_of,
)
from jaxsys.serve.requests import Request, SamplingParameters


class Recorder(Member):
    """Keeps the messages it is given."""

    def __init__(self, name):
        super().__init__(name, page_count=1, energy_method="none")
        self.messages = []

    def take(self, message):
        self.messages.append(message)

    start = check_fits = submit = abort = stop = None  # type: ignore[assignment]
    load_adapter = unload_adapter = None  # type: ignore[assignment]


Recorder.__abstractmethods__ = frozenset()


@pytest.fixture
def house():
    clock = VirtualClock()
    moves = []

    def moved(name, source, target):
        moves.append((name, source.name, target.name))

    limits = HandoverLimits(offered_s=10, granted_s=5, delivered_s=2)
    exchange = Exchange(FewestRequestsRouter(), clock=clock, moved=moved, limits=limits)
    decoders = [Recorder("decode-0"), Recorder("decode-1")]
    exchange.decoders = decoders
    return exchange, clock, moves, Recorder("prefill-0"), decoders


def make_request(name="r"):
    sampling = SamplingParameters(
        max_tokens=3, stop=("x",), stop_token_ids=frozenset([5, 2]), logit_bias={7: -1.5}
    )
    return Request(name, sampling=sampling, arrival_s=0.0, prompt_tokens=[1, 2, 3])


def test_a_request_passes_over_and_its_ticket_is_answered(house):
    exchange, _, moves, prefill, (first, second) = house
    first.adjust_in_flight(1)
    offer = Offer(make_request())
    exchange.forward(prefill, offer)
    assert second.messages == [offer] and second.in_flight == 1
    exchange.forward(second, Grant("r", 0))
    part = Delivery("r", Ticket("there", 0, 2), 0, 2, None)
    exchange.forward(prefill, part)
    assert moves == [] and second.messages[-1] is part
    delivery = Delivery("r", Ticket("there", 1, 2), 2, 1, [4])
    exchange.forward(prefill, delivery)
    assert moves == [("r", "prefill-0", "decode-1")] and second.messages[-1] is delivery
    exchange.forward(second, Receipt("r", pulled=True))
    assert prefill.messages == [Grant("r", 0), Receipt("r", pulled=True)]
    assert len(exchange) == 0 and second.in_flight == 1  # it decodes there


@pytest.mark.parametrize("end", [Withdrawal("r"), Refusal("r", "too long")])
def test_what_ends_early_is_taken_off_the_count(house, end):
    exchange, _, _, prefill, (first, _) = house
    exchange.forward(prefill, Offer(make_request()))
    withdrawn = isinstance(end, Withdrawal)
    exchange.forward(prefill if withdrawn else first, end)
    assert (first if withdrawn else prefill).messages[-1] == end
    assert first.in_flight == 0 and len(exchange) == 0
    exchange.forward(first, Grant("r", 0))  # too late, and dropped
    exchange.forward(prefill, Delivery("r", Ticket("there", 1, 2), 0, 2, [4]))
    assert prefill.messages[-1] == Receipt("r", pulled=False)


def test_each_stage_has_its_limit(house):
    exchange, clock, _, prefill, (first, _) = house
    steps: list[Any] = [
        (10, "offered", prefill, Offer(make_request())),
        (5, "granted", first, Grant("r", 0)),
        (2, "delivered", prefill, Delivery("r", Ticket("there", 1, 2), 0, 2, [4])),
    ]
    for limit_s, stage, source, message in steps:
        exchange.forward(source, message)
        began_s = clock.now_s()
        clock.advance_to(began_s + limit_s)
        assert exchange.late() == []
        clock.advance_to(began_s + limit_s + 0.1)
        ((name, why),) = exchange.late()
        assert name == "r" and f"still {stage} after {limit_s} s" in why
    exchange.give_up("r")
    assert exchange.late() == [] and prefill.messages[-1] == Receipt("r", pulled=False)
    with pytest.raises(UsageError, match="granted_s=0 must be over 0"):
        HandoverLimits(granted_s=0)


def test_the_dead_are_passed_over_and_cleaned_up_behind(house):
    exchange, _, _, prefill, (first, second) = house
    exchange.forward(prefill, Offer(make_request("a")))
    exchange.forward(prefill, Offer(make_request("b")))
    first.failure = RuntimeError("gone")
    assert exchange.gone(first) == ["a"] and len(exchange) == 1
    exchange.forward(prefill, Offer(make_request("c")))
    assert [m.request_id for m in second.messages] == ["b", "c"]
    assert sorted(exchange.gone(prefill)) == ["b", "c"]
    assert second.messages[2:] == [Withdrawal("b"), Withdrawal("c")] and second.in_flight == 0
    second.retiring = True
    exchange.forward(prefill, Offer(make_request("d")))
    assert prefill.messages[-1] == Refusal("d", "no decode instance is left", lost=True)


@pytest.mark.parametrize(
    "message",
    [
        Withdrawal("r"),
        Grant("r", 3),
        Refusal("r", "no", lost=True),
        Delivery("r", None, 3, 0, [1]),
        Delivery("r", Ticket("host:1", 1 << 61, 16), 0, 9, None),
        Receipt("r", pulled=False),
    ],
)
def test_messages_survive_the_wire(message):
    data = pack(message_frame(message))
    frames = Frames()
    assert list(frames.feed(data[:2])) == []
    (frame,) = frames.feed(data[2:])
    assert message_of(frame) == message


def test_requests_survive_the_wire_by_age():
    request = make_request()
    request.output_tokens, request.generated, request.cached_tokens = [9], 1, 2
    (frame,) = Frames().feed(pack(["submit", request_data(request, now_s=5.0, seed=8)]))
    twin = request_of(frame[1], now_s=105.0)
    assert twin.known_tokens() == [1, 2, 3, 9] and twin.arrival_s == 100.0
    assert (twin.generated, twin.cached_tokens, twin.sampling.seed) == (1, 2, 8)
    assert twin.sampling.logit_bias == {7: -1.5} and twin.sampling.stop == ("x",)
    assert twin.sampling.stop_token_ids == frozenset([2, 5])
    with pytest.raises(ValueError, match="no frame"):
        list(Frames().feed(b"\x01"))
