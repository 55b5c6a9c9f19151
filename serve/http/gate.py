"""What every request passes first: its name, its key, its size; and HEAD as GET without body."""

import base64
import binascii
import hmac
import logging
import re
import uuid
from collections.abc import Callable, Collection

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

ALWAYS_OPEN = frozenset({"/health", "/ping"})
"""Paths that no key is asked for: whoever watches a server has none."""
PAGES = frozenset(
    {"/metrics", "/dashboard", "/dashboard/data", "/docs", "/openapi.json", "/version"}
)
"""Paths that a key is asked for only if that is wanted."""
REQUEST_ID = "x-request-id"
_NAME = re.compile(rb"[\x21-\x7e]{1,128}")


class Gate:
    """The outermost layer of the application, but for CORS."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Collection[str],
        key_for_all: bool,
        max_bytes: int,
        size_rule: Callable[[], str],
        refuse: Callable[..., JSONResponse],
    ):
        """
        Args:
            keys: that are let in; without any, everybody is.
            key_for_all: whether `PAGES` ask for a key too.
            max_bytes: most bytes of a body; one that says it has more is not read.
            size_rule: what such a one is told.
            refuse: makes the answer to whoever is not let in.
        """
        self.app = app
        self.keys = [key.encode() for key in keys]
        self.key_for_all = key_for_all
        self.max_bytes = max_bytes
        self.size_rule = size_rule
        self.refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        asked = headers.get(REQUEST_ID.encode(), b"")
        name = asked if _NAME.fullmatch(asked) else uuid.uuid4().hex.encode()
        head = scope["method"] == "HEAD"
        scope = {**scope, "state": {**scope.get("state", {}), "request_id": name.decode()}}
        if head:
            scope["method"] = "GET"
        begun = False

        async def answer(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message["headers"] = [*message.get("headers", ()), (REQUEST_ID.encode(), name)]
            elif head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        try:
            refusal = self._refusal(scope["path"], headers)
            await (refusal or self.app)(scope, receive, answer)
        except Exception as error:
            if begun:
                raise
            logger.exception("a fault of the server", extra={"request_id": name.decode()})
            message = f"the server is at fault: {type(error).__name__}"
            await self.refuse(500, message, "server_error")(scope, receive, answer)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> JSONResponse | None:
        page = path in PAGES
        asks = bool(self.keys) and path not in ALWAYS_OPEN and (self.key_for_all or not page)
        if asks and not self._known(headers.get(b"authorization", b"")):
            message = "a known key is needed; send it as `Authorization: Bearer KEY`"
            answer = self.refuse(401, message, "authentication_error", code="invalid_api_key")
            # Of a page a browser asks the key as a password, and sends it with all that follows.
            answer.headers["WWW-Authenticate"] = 'Basic realm="jaxsys"' if page else "Bearer"
            return answer
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and (len(length) > 15 or int(length) > self.max_bytes):
            answer = self.refuse(413, self.size_rule(), "invalid_request_error")
            answer.headers["Connection"] = "close"
            return answer
        return None

    def _known(self, authorization: bytes) -> bool:
        scheme, _, key = authorization.partition(b" ")
        key = key.strip()
        if scheme.lower() == b"basic":
            try:
                key = base64.b64decode(key, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        # Every key is compared, in constant time, so that timing tells nothing.
        matches = [hmac.compare_digest(key, known) for known in self.keys]
        return scheme.lower() in (b"bearer", b"basic") and any(matches)
