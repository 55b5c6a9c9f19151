"""Where the processes of a run meet before JAX joins them, so that one that is missing has a name.

`jax.distributed` waits for all and, when its time is up, ends the process without saying for whom.
So process 0 first listens itself on the coordinator's port; the others connect, say their number,
host and pid, and keep the connection until all have come. Then the port is JAX's. One that goes
while the rest still come is seen at once, since its connection closes.
"""

import contextlib
import os
import selectors
import socket
import time
from collections.abc import Callable

from jaxsys.errors import RunError

HELLO = "jaxsys-meeting 1"
GO = b"go\n"
LONGEST_LINE = 300
"""Bytes read of anybody who connects."""
SAY_AFTER_S = 15.0
"""Seconds after which those who are missing are named, and again after each as many."""


def meet(
    address: str,
    *,
    processes: int,
    process: int,
    timeout_s: float,
    say: Callable[[str], None],
) -> None:
    """Returns in every process when all of them are there.

    Args:
        address: host:port of process 0.
        processes: how many there are.
        process: this one's number.
        timeout_s: how long to wait.
        say: told who is missing.

    Raises:
        RunError: if somebody left or did not come; names them.
    """
    host, _, port = address.rpartition(":")
    try:
        number = int(port)
    except ValueError:
        raise RunError(f"coordinator {address!r} must be HOST:PORT") from None
    if process == 0:
        _gather(number, processes, timeout_s, say)
    else:
        _attend(host.strip("[]"), number, process, timeout_s, say)


def _who() -> str:
    return f"{socket.gethostname()} pid {os.getpid()}"


def _gather(port: int, processes: int, timeout_s: float, say: Callable[[str], None]) -> None:
    begun = time.monotonic()
    said = begun
    here: dict[int, tuple[socket.socket, str]] = {}
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        try:
            listener = stack.enter_context(
                socket.create_server(
                    ("", port), family=family, dualstack_ipv6=family is socket.AF_INET6
                )
            )
        except OSError as error:
            raise RunError(f"port {port} of the coordinator: {error.strerror or error}") from None
        listener.setblocking(False)
        selector.register(listener, selectors.EVENT_READ, None)
        while len(here) < processes - 1:
            for key, _ in selector.select(timeout=0.5):
                if key.fileobj is listener:
                    joined, _ = listener.accept()
                    stack.enter_context(joined)
                    joined.setblocking(False)
                    selector.register(joined, selectors.EVENT_READ, -1)
                    continue
                connection: socket.socket = key.fileobj  # type: ignore[assignment]
                line = _read(connection)
                number, name = _parse(line, processes) if key.data == -1 else (None, "")
                if number is not None and number not in here:
                    here[number] = (connection, name)
                    selector.modify(connection, selectors.EVENT_READ, number)
                    continue
                selector.unregister(connection)
                connection.close()
                if key.data != -1:
                    lost = here.pop(key.data)[1]
                    _end(here, f"process {key.data} of the run ({lost}) left before all had come")
            now = time.monotonic()
            missing = [str(n) for n in range(1, processes) if n not in here]
            if missing and now - said >= SAY_AFTER_S:
                said = now
                say(
                    f"waiting for process {', '.join(missing)} of {processes}, "
                    f"{now - begun:.0f} s by now"
                )
            if missing and now - begun > timeout_s:
                _end(
                    here,
                    f"process {', '.join(missing)} of the run's {processes} did not come within "
                    f"{timeout_s:.0f} s; look at its own output, or start it",
                )
        for connection, _ in here.values():
            with contextlib.suppress(OSError):
                connection.sendall(GO)


def _end(here: dict[int, tuple[socket.socket, str]], why: str) -> None:
    for connection, _ in here.values():
        with contextlib.suppress(OSError):
            connection.sendall(f"{why}\n".encode())
    raise RunError(why)


def _attend(
    host: str, port: int, process: int, timeout_s: float, say: Callable[[str], None]
) -> None:
    begun = time.monotonic()
    said = begun
    while True:
        now = time.monotonic()
        if now - begun > timeout_s:
            raise RunError(
                f"process 0 of the run did not answer at {host}:{port} within {timeout_s:.0f} s; "
                "look at its own output, or start it"
            )
        if now - said >= SAY_AFTER_S:
            said = now
            say(f"waiting for process 0 at {host}:{port}, {now - begun:.0f} s by now")
        try:
            with socket.create_connection((host, port), timeout=5) as connection:
                connection.sendall(f"{HELLO} {process} {_who()}\n".encode())
                # Until then it is process 0 that says who is missing.
                connection.settimeout(max(1.0, timeout_s + SAY_AFTER_S - (now - begun)))
                answer = connection.recv(LONGEST_LINE)
        except OSError:
            time.sleep(0.2)
            continue
        if answer.startswith(GO):
            return
        why = answer.decode(errors="replace").splitlines()
        raise RunError(
            why[0] if why else f"process 0 of the run at {host}:{port} left before all had come"
        )


def _read(connection: socket.socket) -> bytes:
    try:
        return connection.recv(LONGEST_LINE)
    except OSError:
        return b""


def _parse(line: bytes, processes: int) -> tuple[int | None, str]:
    """The number and name that a process says; None where it is no process of this run."""
    text = line.decode("ascii", errors="replace").strip()
    if not text.startswith(f"{HELLO} "):
        return None, ""
    number, _, name = text.removeprefix(f"{HELLO} ").partition(" ")
    if not number.isdecimal() or not 0 < int(number) < processes:
        return None, ""
    return int(number), name if name.isprintable() else ""
