"""What the processes of a server say to each other, as plain data.

Behind the proof that the caller knows the deployment's secret (`secret`), a connection carries
msgpack values back to back; each is a list whose first entry is its kind. An instance's process and
a front speak these kinds:

    front -> instance  submit, abort, offer, withdrawal, grant, refusal, delivery, receipt
    instance -> front  hello, events, pulse, offer, withdrawal, grant, refusal, delivery, receipt,
                       failed, stopped

An offer that goes to the front names the request only, since the front has it. Whoever launched the
instance, the front itself or what looks after several, also says and hears:

    -> instance        load_adapter, unload_adapter, fronts, stop
    instance ->        adapter; latencies of iterations with events and pulse

A load travels as the values of `InstanceLoad`, in its order.
"""

import dataclasses
import operator
from array import array
from collections.abc import Iterator
from typing import Any, Self

import msgpack

from jaxsys.serve.handover import (
    Delivery,
    Grant,
    Message,
    Offer,
    Receipt,
    Refusal,
    Ticket,
    Withdrawal,
)
from jaxsys.serve.member import InstanceLoad
from jaxsys.serve.requests import Request, SamplingParameters

Frame = list[Any]

MAX_BYTES = 64 << 20
"""Most bytes a connection may hold unread; a request's prompt is a few hundred thousand."""

_USUAL = tuple(
    (field.name, getattr(SamplingParameters(), field.name))
    for field in dataclasses.fields(SamplingParameters)
)


def pack(frame: Frame) -> bytes:
    """One frame's bytes."""
    packed = msgpack.packb(frame)
    assert packed is not None
    return packed


class Frames:
    """Cuts what arrives into frames."""

    def __init__(self) -> None:
        self._unpacker = msgpack.Unpacker(max_buffer_size=MAX_BYTES, strict_map_key=False)

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that `data` completes.

        Raises:
            ValueError: if it is none of ours.
        """
        self._unpacker.feed(data)
        for frame in self._unpacker:
            if not (isinstance(frame, list) and frame and isinstance(frame[0], str)):
                raise ValueError("what arrived is no frame")
            yield frame


def request_data(request: Request, now_s: float, seed: int) -> dict[str, Any]:
    """A request without its pages.

    Args:
        now_s: this side's time, by which its age is given: clocks differ between machines.
        seed: replaces an absent one, so that every instance draws alike.
    """
    asked = request.sampling
    sampling = {name: value for name, usual in _USUAL if (value := getattr(asked, name)) != usual}
    if "stop_token_ids" in sampling:
        sampling["stop_token_ids"] = sorted(sampling["stop_token_ids"])
    return {
        "id": request.request_id,
        "prompt": array("i", request.prompt_tokens).tobytes(),
        "output": list(request.output_tokens),
        "sampling": sampling | {"seed": seed},
        "cached": request.cached_tokens,
        "age_s": now_s - request.arrival_s,
        "adapter": request.adapter,
        "session": request.session,
    }


def request_of(data: dict[str, Any], now_s: float) -> Request:
    """The inverse of `request_data`."""
    sampling = dict(data["sampling"])
    if "stop_token_ids" in sampling:
        sampling["stop_token_ids"] = frozenset(sampling["stop_token_ids"])
    if "stop" in sampling:
        sampling["stop"] = tuple(sampling["stop"])
    request = Request(
        data["id"],
        sampling=SamplingParameters(**sampling),
        arrival_s=now_s - data["age_s"],
        prompt_tokens=array("i", data["prompt"]).tolist(),
        adapter=data["adapter"],
        session=data["session"],
    )
    request.output_tokens = list(data["output"])
    request.generated = len(request.output_tokens)
    request.cached_tokens = data["cached"]
    return request


class Named(str):
    """A request's name where requests of several fronts meet, with the line that it came by."""

    line: Any

    def __new__(cls, name: str, line: Any) -> Self:
        made = super().__new__(cls, name)
        made.line = line
        return made


LOAD_FIELDS = tuple(field.name for field in dataclasses.fields(InstanceLoad))
load_values = operator.attrgetter(*LOAD_FIELDS)
"""A load as it travels."""


def load_of(values: list[Any]) -> InstanceLoad:
    """The inverse of `load_values`."""
    return InstanceLoad(**dict(zip(LOAD_FIELDS, values, strict=True)))


def message_frame(message: Message) -> Frame:
    """A hand-over message; an offer only names the request and says what was cached of it."""
    if isinstance(message, Delivery):
        pages = message.pages
        if pages is not None and not isinstance(pages, Ticket):
            raise TypeError("arrays do not travel in messages; publish them and send the ticket")
        ticket = None if pages is None else [pages.address, pages.number, pages.width]
        place = [message.first, message.count]
        return ["delivery", message.request_id, ticket, *place, message.outputs]
    kind = type(message).__name__.lower()
    if isinstance(message, Offer):
        return [kind, message.request_id, message.request.cached_tokens]
    return [kind, *(getattr(message, field.name) for field in dataclasses.fields(message))]


def message_of(frame: Frame) -> Message | None:
    """The message in a frame; None where it is something else, or an offer."""
    kind, *fields = frame
    if kind == "delivery":
        name, ticket, *rest = fields
        return Delivery(name, None if ticket is None else Ticket(*ticket), *rest)
    made = {"withdrawal": Withdrawal, "grant": Grant, "refusal": Refusal, "receipt": Receipt}
    return made[kind](*fields) if kind in made else None
