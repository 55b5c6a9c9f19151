"""What the examples of all clients share: each is a function, run in turn, and says how it went."""

import asyncio
import inspect
import json
import os
import time
from collections.abc import Callable
from typing import Any

URL = os.environ["JAXSYS_URL"]
BASE = f"{URL}/v1"
MODEL = "served"
_EXAMPLES: list[Callable[[], Any]] = []

CITY_SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Rome", "Oslo"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
QUESTION = "Which is the capital of France?"


def example(function: Callable[[], Any]) -> Callable[[], Any]:
    """Registers an example."""
    _EXAMPLES.append(function)
    return function


def run() -> None:
    """Runs all examples; a line of JSON each."""
    loop = asyncio.new_event_loop()  # one: clients keep connections
    asyncio.set_event_loop(loop)
    for function in _EXAMPLES:
        start_s = time.monotonic()
        why = ""
        try:
            result = function()
            if inspect.isawaitable(result):
                loop.run_until_complete(result)
        except Exception as error:  # noqa: BLE001 - whatever a client may raise
            why = f"{type(error).__name__}: {error}".replace("\n", " ") or "failed"
        seconds = round(time.monotonic() - start_s, 2)
        said = {"example": function.__name__, "ok": not why, "seconds": seconds, "why": why}
        print(json.dumps(said), flush=True)
