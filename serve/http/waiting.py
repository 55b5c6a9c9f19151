"""Waiting on a client's behalf: until it leaves, beside the loop, and for as long as it reads."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

import fastapi
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from jaxsys.serve.engine import Engine
from jaxsys.serve.generation import Generation

T = TypeVar("T")
FEW_CHARACTERS = 1024
"""Of a prompt that is tokenized at once, in some 0.2 ms."""


class EventStream(StreamingResponse):
    """Server-sent events; the requests behind them end with it, even if it never began."""

    def __init__(
        self, parts: AsyncIterator[bytes], engine: Engine, generations: Sequence[Generation]
    ):
        headers = {"Cache-Control": "no-cache"}
        super().__init__(parts, media_type="text/event-stream", headers=headers)
        self._engine = engine
        self._generations = generations

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for generation in self._generations:
                self._engine.leave(generation)


async def unless_disconnected(request: fastapi.Request, work: Awaitable[T]) -> T | None:
    """The result of `work`, or None (and `work` cancelled) once the client has gone."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def perhaps_apart(work: Callable[[], T], characters: int) -> T:
    """What tokenizing gives, on a thread where it takes longer than to begin one."""
    return work() if characters <= FEW_CHARACTERS else await asyncio.to_thread(work)
