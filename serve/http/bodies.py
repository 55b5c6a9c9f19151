"""Bodies of requests: bounded as they arrive, unpacked and parsed where no event loop waits.

A small body is parsed at once. A large one is parsed by a process of its own (`body_process`),
since the interpreter is not let go while a body is parsed; what it may cost there is known
beforehand, by the number of its commas, colons and brackets outside of strings.
"""

import asyncio
import marshal
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import fastapi
import pydantic
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from jaxsys.errors import RunError, UsageError
from jaxsys.serve.http import body_process
from jaxsys.serve.http.apart import Apart

SMALL_BYTES = 32 << 10
"""A body up to this size is parsed on the event loop; a millisecond or two."""
MARKS = 200_000
"""Commas, colons and opening brackets outside of strings that a body may hold, beside two for each
token that a request may have; parsing so many takes some 30 ms."""
MAX_FIELDS = 256
"""Fields of a body."""
PIECE_S = 30.0
"""How long a client may take for the next piece of a body."""
PARSE_S = 30.0
"""How long a body may take to be parsed, once one is."""

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
        self._apart = Apart(Path(body_process.__file__), what="parses large bodies")

    async def read(self, kind: type[Body], request: fastapi.Request) -> Body:
        """A request's body.

        Raises:
            HTTPException: 400, 413 or 415 where it cannot be read.
            RequestValidationError: where it is not of its kind.
        """
        packed = request.headers.get("content-encoding", "identity").strip().lower()
        if packed not in body_process.PACKED:
            raise HTTPException(
                415,
                f"the body's Content-Encoding {packed[:40]!r} is not understood; use gzip, deflate "
                f"or none",
                {"Accept-Encoding": "gzip, deflate"},
            )
        pieces = await self._collect(request.stream())
        size = sum(map(len, pieces))
        described = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if size and not (described == "application/json" or described.endswith("+json")):
            raise HTTPException(
                400, "the body came as no JSON; send the header Content-Type: application/json"
            )
        if size <= SMALL_BYTES and packed in ("identity", ""):
            return _checked(kind, self._parse(b"".join(pieces), packed))
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._read_large, kind, pieces, packed)

    def close(self) -> None:
        """Ends the thread, and its process."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._apart.close()

    def size_rule(self) -> str:
        """What a body that is too large is told."""
        return f"the body exceeds {self.max_bytes} bytes; send a shorter prompt"

    async def _collect(self, stream: AsyncIterator[bytes]) -> list[bytes]:
        found: list[bytes] = []
        size = 0
        iterator = aiter(stream)
        while True:
            try:
                async with asyncio.timeout(PIECE_S):
                    piece = await anext(iterator)
            except StopAsyncIteration:
                return found
            except ClientDisconnect:  # nobody reads it
                raise HTTPException(400, "the body was not sent to its end") from None
            except TimeoutError:
                message = f"nothing more of the body came for {PIECE_S:g} s"
                raise HTTPException(408, message, {"Connection": "close"}) from None
            size += len(piece)
            if size > self.max_bytes:
                raise HTTPException(413, self.size_rule(), {"Connection": "close"})
            found.append(piece)

    def _parse(self, data: bytes, packed: str) -> Any:
        try:
            return body_process.parse(data, packed, self.max_bytes, self.max_marks, MAX_FIELDS)
        except body_process.Refused as refused:
            raise _refusal(*refused.args) from None

    def _read_large(self, kind: type[Body], pieces: list[bytes], packed: str) -> Body:
        rules = body_process.RULES.pack(self.max_bytes, self.max_marks, MAX_FIELDS, packed.encode())
        answer = self._apart.ask([rules, *pieces], PARSE_S)
        if answer is None:
            raise RunError("the process that parses large bodies has ended; try again")
        status, found = marshal.loads(answer)
        if status != 200:
            raise _refusal(status, found)
        return _checked(kind, found)


def _refusal(status: int, message: str) -> Exception:
    return UsageError(message) if status == 400 else HTTPException(status, message)


def _checked(kind: type[Body], value: Any) -> Body:
    """A body of its kind."""
    if value == body_process.EMPTY:
        missing = {"type": "missing", "loc": ("body",), "msg": "Field required", "input": None}
        raise RequestValidationError([missing])
    try:
        return kind.model_validate(value)
    except pydantic.ValidationError as error:
        found = error.errors(include_url=False)
        raise RequestValidationError(found, body=kind.__name__) from None
    except RecursionError:
        raise UsageError("the body is nested too deep") from None
