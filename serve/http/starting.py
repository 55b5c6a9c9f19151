"""What is answered before a server can serve: how far its start has come.

A cold start takes minutes: weights are read, steps compiled, processes started. The address is
listened on from the first second; `/health` says what is done meanwhile, and everything else that
it is too early, with a time after which trying again makes sense.
"""

import json
import threading
import time
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

RETRY_AFTER_S = 5


class StartProgress:
    """How far a start has come; told from any thread."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()
        self._lock = threading.Lock()
        self._stage = "starting"
        self._done = self._total = 0

    def enter(self, stage: str, total: int = 0) -> None:
        """A new stage begins, of so many parts."""
        with self._lock:
            self._stage, self._done, self._total = stage, 0, total

    def advance(self) -> None:
        """One more part is done."""
        with self._lock:
            self._done += 1

    def repeat(self, said: dict[str, Any]) -> None:
        """Says what another process's `body` has said."""
        with self._lock:
            self._stage, self._done, self._total = said["stage"], said["done"], said["total"]

    def body(self) -> dict[str, Any]:
        """As `/health` says it."""
        with self._lock:
            return {
                "status": "starting",
                "stage": self._stage,
                "done": self._done,
                "total": self._total,
                "elapsed_s": round(time.monotonic() - self._began_s, 1),
            }

    def sentence(self) -> str:
        """In words."""
        body = self.body()
        parts = f", {body['done']} of {body['total']}" if body["total"] else ""
        return f"the server is starting: {body['stage']}{parts}; try again later"


class Gateway:
    """An application that answers for another one until that is there."""

    def __init__(self, progress: StartProgress, root_path: str = ""):
        """
        Args:
            root_path: that paths may begin with: proxies take it off, or leave it.
        """
        self.progress = progress
        self.root_path = root_path
        self.app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        root = self.root_path
        if root and scope["type"] == "http" and f"{scope['path']}/".startswith(f"{root}/"):
            scope = {**scope, "path": scope["path"][len(root) :] or "/"}
            scope["raw_path"] = scope["path"].encode()
        if self.app is not None:
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        if scope["path"] in ("/health", "/ping"):
            body = self.progress.body()
        else:
            message = self.progress.sentence()
            kind = {"type": "server_error", "param": None, "code": "starting"}
            body = {"error": {"message": message} | kind}
        content = json.dumps(body).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
            (b"retry-after", str(RETRY_AFTER_S).encode()),
        ]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        shown = b"" if scope["method"] == "HEAD" else content
        await send({"type": "http.response.body", "body": shown})
