"""Bodies of requests: bounded as they arrive, unpacked and parsed where no event loop waits.

A small body is parsed at once. A large one goes to the one thread that parses bodies; what it may
cost there is known beforehand, by the number of its commas, colons and brackets outside of strings,
since the interpreter is not let go while a body is parsed.
"""

import asyncio
import json
import zlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import fastapi
import numpy as np
import pydantic
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from jaxsys.errors import UsageError

SMALL_BYTES = 32 << 10
"""A body up to this size is parsed on the event loop; a millisecond or two."""
MARKS = 200_000
"""Commas, colons and opening brackets outside of strings that a body may hold, beside two for each
token that a request may have; parsing so many takes some 30 ms."""
MAX_FIELDS = 256
"""Fields of a body."""
PIECE_S = 30.0
"""How long a client may take for the next piece of a body."""
PART = 512 << 10
"""Bytes looked through at once."""
_MARKS = np.zeros(256, bool)
_MARKS[[*b",:[{"]] = True

Body = TypeVar("Body", bound=pydantic.BaseModel)


class Bodies:
    """Reads the bodies of one server."""

    def __init__(self, *, max_bytes: int, max_length: int):
        """
        Args:
            max_bytes: most bytes of a body, compressed or not.
            max_length: most tokens of a request.
        """
        self.max_bytes = max_bytes
        self.max_marks = MARKS + 2 * max_length
        self._thread = ThreadPoolExecutor(1, "bodies")

    async def read(self, kind: type[Body], request: fastapi.Request) -> Body:
        """A request's body.

        Raises:
            HTTPException: 400, 413 or 415 where it cannot be read.
            RequestValidationError: where it is not of its kind.
        """
        packed = request.headers.get("content-encoding", "identity").strip().lower()
        unpack = _UNPACKERS.get(packed)
        if unpack is None:
            raise HTTPException(
                415,
                f"the body's Content-Encoding {packed[:40]!r} is not understood; use gzip, deflate "
                f"or none",
                {"Accept-Encoding": "gzip, deflate"},
            )
        data = await self._collect(request.stream())
        described = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if data and not (described == "application/json" or described.endswith("+json")):
            raise HTTPException(
                400, "the body came as no JSON; send the header Content-Type: application/json"
            )
        if len(data) <= SMALL_BYTES and packed == "identity":
            return self._parse(kind, data, unpack)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._parse, kind, data, unpack)

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def size_rule(self) -> str:
        """What a body that is too large is told."""
        return f"the body exceeds {self.max_bytes} bytes; send a shorter prompt"

    async def _collect(self, pieces: AsyncIterator[bytes]) -> bytes:
        found: list[bytes] = []
        size = 0
        iterator = aiter(pieces)
        while True:
            try:
                async with asyncio.timeout(PIECE_S):
                    piece = await anext(iterator)
            except StopAsyncIteration:
                return b"".join(found)
            except ClientDisconnect:  # nobody reads it
                raise HTTPException(400, "the body was not sent to its end") from None
            except TimeoutError:
                message = f"nothing more of the body came for {PIECE_S:g} s"
                raise HTTPException(408, message, {"Connection": "close"}) from None
            size += len(piece)
            if size > self.max_bytes:
                raise HTTPException(413, self.size_rule(), {"Connection": "close"})
            found.append(piece)

    def _parse(self, kind: type[Body], data: bytes, unpack: "Unpack") -> Body:
        data = unpack(data, self.max_bytes)
        if len(data) > self.max_bytes:
            raise HTTPException(413, self.size_rule())
        marks = _marks(data, self.max_marks)
        if marks > self.max_marks:
            raise UsageError(
                f"the body holds over {self.max_marks} values; send fewer messages, prompts or "
                f"token ids at once"
            )
        try:
            value: Any = json.loads(data) if data else None
        except UnicodeDecodeError as error:
            raise UsageError(f"the body is no UTF-8: byte {error.start}") from None
        except RecursionError:
            raise UsageError("the body is nested too deep") from None
        except ValueError as error:
            raise UsageError(f"the body is no valid JSON: {error}") from None
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise UsageError(f"the body has {len(value)} fields; at most {MAX_FIELDS} are taken")
        try:
            if data:
                return kind.model_validate(value)
        except pydantic.ValidationError as error:
            found = error.errors(include_url=False)
            raise RequestValidationError(found, body=kind.__name__) from None
        except RecursionError:
            raise UsageError("the body is nested too deep") from None
        missing = {"type": "missing", "loc": ("body",), "msg": "Field required", "input": None}
        raise RequestValidationError([missing])


Unpack = Callable[[bytes, int], bytes]


def _unpack(wbits: int) -> Unpack:
    def unpack(data: bytes, most: int) -> bytes:
        stream = zlib.decompressobj(wbits)
        try:
            unpacked = stream.decompress(data, most + 1)
        except zlib.error as error:
            raise UsageError(f"the body cannot be unpacked: {error}") from None
        if len(unpacked) <= most and (not stream.eof or stream.unused_data):
            raise UsageError("the body cannot be unpacked: it is cut short, or more stands behind")
        return unpacked

    return unpack


_UNPACKERS: dict[str, Unpack] = {
    "identity": lambda data, most: data,
    "": lambda data, most: data,
    "gzip": _unpack(16 + zlib.MAX_WBITS),
    "x-gzip": _unpack(16 + zlib.MAX_WBITS),
    "deflate": _unpack(zlib.MAX_WBITS),
}


def _marks(data: bytes, enough: int) -> int:
    """Commas, colons and opening brackets outside of strings.

    Where there are no more than `enough` at all, those in strings are counted too; counting ends
    with the part that goes over it.
    """
    most = sum(data.count(mark) for mark in (b",", b":", b"[", b"{"))
    if most <= enough:
        return most
    # Pairs of backslashes first, from the left: then a backslash before a quote escapes it.
    plain = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    characters = np.frombuffer(plain, np.uint8)
    found, quoted = 0, np.False_
    for at in range(0, len(characters), PART):  # others get their turn in between
        part = characters[at : at + PART]
        inside = np.bitwise_xor.accumulate(part == ord('"')) ^ quoted
        found += int(np.count_nonzero(_MARKS[part] & ~inside))
        quoted = inside[-1]
        if found > enough:
            break
    return found
