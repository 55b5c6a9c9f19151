"""Processes meet before JAX joins them; who is missing or leaves is named."""

import os
import socket
import threading
import time

from jaxsys.errors import RunError
from jaxsys.train import meeting
from jaxsys.train.meeting import meet


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def attend(port: int, numbers, processes: int, timeout_s: float):
    """Threads that stand for processes; number -> how it ended, and what was said."""
    ended: dict[int, str] = {}
    said: list[str] = []

    def run(number: int) -> None:
        try:
            meet(
                f"127.0.0.1:{port}",
                processes=processes,
                process=number,
                timeout_s=timeout_s,
                say=said.append,
            )
            ended[number] = "met"
        except RunError as error:
            ended[number] = str(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in numbers]
    for thread in threads:
        thread.start()
    return threads, ended, said


def test_all_meet_and_strangers_are_turned_away():
    port = free_port()
    first, ended, _ = attend(port, [0, 1], 3, timeout_s=20)
    while True:
        try:
            stranger = socket.create_connection(("127.0.0.1", port), timeout=5)
            break
        except OSError:
            time.sleep(0.05)
    with stranger:
        stranger.sendall(b"hello\n")
        assert stranger.recv(10) == b""  # closed
    last, more, _ = attend(port, [2], 3, timeout_s=20)
    for thread in first + last:
        thread.join(20)
    assert {**ended, **more} == {0: "met", 1: "met", 2: "met"}


def test_those_who_do_not_come_are_named(monkeypatch):
    monkeypatch.setattr(meeting, "SAY_AFTER_S", 0.6)
    threads, ended, said = attend(free_port(), [0, 2], 4, timeout_s=2)
    for thread in threads:
        thread.join(20)
    assert "process 1, 3 of the run's 4 did not come within 2 s" in ended[0]
    assert ended[2] == ended[0]
    assert said and "waiting for process 1, 3 of 4" in said[-1]


def test_process_0_that_does_not_come_is_named():
    threads, ended, _ = attend(free_port(), [1], 2, timeout_s=1)
    threads[0].join(20)
    assert "process 0 of the run did not answer at 127.0.0.1:" in ended[1]


def test_one_that_leaves_while_others_come_is_named():
    port = free_port()
    threads, ended, _ = attend(port, [0], 3, timeout_s=20)
    while True:
        try:
            gone = socket.create_connection(("127.0.0.1", port), timeout=5)
            break
        except OSError:
            time.sleep(0.05)
    gone.sendall(f"{meeting.HELLO} 2 elsewhere pid {os.getpid()}\n".encode())
    time.sleep(0.3)
    gone.close()
    threads[0].join(20)
    assert ended[0] == (
        f"process 2 of the run (elsewhere pid {os.getpid()}) left before all had come"
    )
