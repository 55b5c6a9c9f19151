"""Arrays on their way to a device: who waits for them is told when they are there, or why not.

A copy between devices and a pull from another process both return at once, with arrays that become
ready later. A step that used them before would stop its device until they are.
"""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

import jax

from jaxsys.errors import RunError

logger = logging.getLogger(__name__)

LOOK_S = 0.001
"""How often arrays on their way are looked at."""

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Expected(Generic[T]):
    arrays: T
    deadline_s: float
    then: Callable[[T | Exception], None]

    def outcome(self, now_s: float) -> T | Exception | None:
        """What has come of it; None while it is under way."""
        if all(leaf.is_ready() for leaf in jax.tree.leaves(self.arrays)):
            try:
                return jax.block_until_ready(self.arrays)
            except RuntimeError as error:  # where they come from has failed
                return error
        if now_s > self.deadline_s:
            return RunError("pages took too long to arrive")
        return None


class Arrivals:
    """Safe to use from any thread; has one of its own while anything is under way."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._expected: list[_Expected] = []
        self._looking = False

    def expect(self, arrays: T, limit_s: float, then: Callable[[T | Exception], None]) -> None:
        """Has `then` called once, on this object's thread, with `arrays` or what went wrong."""
        with self._lock:
            self._expected.append(_Expected(arrays, time.monotonic() + limit_s, then))
            if not self._looking:
                self._looking = True
                threading.Thread(target=self._look, name="arrivals", daemon=True).start()

    def _look(self) -> None:
        while True:
            with self._lock:
                expected = list(self._expected)
                if not expected:
                    self._looking = False
                    return
            now_s = time.monotonic()
            for one in expected:
                outcome = one.outcome(now_s)
                if outcome is None:
                    continue
                with self._lock:
                    self._expected.remove(one)
                try:
                    one.then(outcome)
                except Exception:
                    logger.exception("after an arrival")
            time.sleep(LOOK_S)
