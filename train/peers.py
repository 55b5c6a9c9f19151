"""Who is still there, in a run of many processes: each writes a heartbeat, each reads the others'.

JAX ends a run whose peer died after its own, longer time-outs, and often without saying which peer.
This names it: a process whose heartbeat in the coordination service has not changed for
`lost_after_s` is lost, and the others stop at once. Clocks are never compared across hosts: a
reader times how long a peer's beat stays the same.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax

BEAT_S = 1.0
_PREFIX = "jaxsys/heartbeat/"


class PeerMonitor:
    """Watches the other processes of this run from a thread (a context manager).

    Within another monitor's context it is that one which watches, with this one's last word.

    Args:
        lost_after_s: how long a heartbeat may stand still.
        last_word: called for what to tell the user besides, such as the last checkpoint.
        from_start: all processes start watching now, as they do once they are joined: one that is
            never heard of is lost too. Else it may still be on its way here.
    """

    _watching: ClassVar["PeerMonitor | None"] = None

    def __init__(
        self,
        *,
        lost_after_s: float = 15.0,
        last_word: Callable[[], str] = lambda: "",
        from_start: bool = False,
    ) -> None:
        self._lost_after_s = lost_after_s
        self._last_word = last_word
        self._from_start = from_start
        self._outer: PeerMonitor | None = None
        self._answered = time.monotonic()
        self._done = threading.Event()
        self._names: dict[int, str] = {}
        self._lost: str | None = None

    def __enter__(self) -> Self:
        self._outer = PeerMonitor._watching
        if self._outer is not None:
            self._outer._last_word = self._last_word
        elif jax.process_count() > 1:
            PeerMonitor._watching = self
            self._answered = time.monotonic()
            for watch in (self._watch, self._watch_service):
                threading.Thread(target=watch, name="peers", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._outer is not None:
            self._outer._last_word = lambda: ""
        elif PeerMonitor._watching is self:
            PeerMonitor._watching = None

    def explain(self, wait_s: float = 0.0) -> str:
        """Which peer is lost, waiting for up to `wait_s` to find out; "" if none is."""
        if self._outer is not None:
            return self._outer.explain(wait_s)
        until = time.monotonic() + wait_s
        while self._lost is None and time.monotonic() < until:
            time.sleep(0.1)
        return self._lost or ""

    @property
    def lost_after_s(self) -> float:
        """How long a heartbeat may stand still."""
        return self._lost_after_s

    def _watch(self) -> None:
        from jax._src import distributed

        client: Any = distributed.global_state.client
        me, count = jax.process_index(), jax.process_count()
        seen = {peer: ("", time.monotonic()) for peer in range(count) if peer != me}
        unreachable: float | None = None
        beat = 0
        while not self._done.wait(BEAT_S):
            beat += 1
            now = time.monotonic()
            try:
                client.key_value_set(
                    f"{_PREFIX}{me}",
                    f"{beat} {socket.gethostname()} pid {os.getpid()}",
                    allow_overwrite=True,
                )
                beats = dict(client.key_value_dir_get(_PREFIX))
                unreachable = None
                self._answered = time.monotonic()
            except jax.errors.JaxRuntimeError as error:
                # The service lives in process 0: when it is gone, so is that process.
                if self._done.is_set():
                    return
                unreachable = unreachable or now
                if now - unreachable > self._lost_after_s / 3:
                    self._leave(0, f"its coordination service does not answer ({_short(error)})")
                continue
            for peer in seen:
                value = beats.get(f"{_PREFIX}{peer}", "")
                if value != seen[peer][0]:
                    seen[peer] = (value, now)
                    self._names[peer] = value.partition(" ")[2]
                elif (value or self._from_start) and now - seen[peer][1] > self._lost_after_s:
                    self._leave(peer, f"not heard of for {self._lost_after_s:.0f} s")

    def _watch_service(self) -> None:
        """A frozen process 0 answers nothing, and a call to it does not come back to say so."""
        while not self._done.wait(BEAT_S):
            if time.monotonic() - self._answered > self._lost_after_s:
                self._leave(
                    0,
                    f"its coordination service has not answered for {self._lost_after_s:.0f} s",
                )
                return

    def _leave(self, peer: int, why: str) -> None:
        name = self._names.get(peer, "")
        self._lost = f"process {peer} of the run{f' ({name})' if name else ''} is lost: {why}"
        # The main thread may wait in a collective for ever; it gets a moment to speak first.
        if self._done.wait(3.0):
            return
        last = self._last_word()
        print(
            f"jaxsys: {self._lost}; process {jax.process_index()} stops"
            f"{f'; {last}' if last else ''}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


def _short(error: Exception) -> str:
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__
