"""Signals to a command as a process: while it sets up, when they are dropped, and inside C."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

NOT_IGNORED = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs behind & ignores it
"""
PREFACE = f"""{NOT_IGNORED}
import ctypes, sys, time, types
from jaxsys import cli

def command(argv, prog):
    print("begun", flush=True)
    {{body}}

sys.modules["made_up"] = types.ModuleType("made_up")
sys.modules["made_up"].main = command
cli.SUBCOMMANDS["made"] = ("made_up", "")
sys.argv = ["jaxsys", "made"]
sys.exit(cli.main())
"""
BODIES = {
    "python": "time.sleep(60)",
    "dropped": "\n    while True:\n        try: time.sleep(60)\n        except BaseException: pass",
    "inside C": "m = ctypes.create_string_buffer(64)\n"
    "    for _ in range(2): ctypes.CDLL(None).pthread_mutex_lock(m)",
    "threads at the end": "import jax; jax.numpy.ones(3).block_until_ready(); time.sleep(60)",
}


@contextlib.contextmanager
def running(code: str, *arguments: str) -> Iterator[subprocess.Popen]:
    """A Python that does not outlive a test that failed."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("body", BODIES)
def test_a_command_ends_soon_whatever_it_does(body, number):
    with running(PREFACE.format(body=BODIES[body])) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(number)
        assert process.wait(20) == 128 + number
        assert process.stderr.read() == ""


def test_the_second_ctrl_c_ends_what_took_over_and_is_inside_c():
    body = "signal.signal(signal.SIGINT, lambda *_: None); print('ready', flush=True)\n    "
    body += BODIES["inside C"]
    with running(PREFACE.format(body=body)) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "begun\n"
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert "Ctrl-C again to stop now" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130


@pytest.mark.parametrize("seconds", [1.0, 2.5])
def test_training_ends_while_it_sets_up(seconds):
    code = NOT_IGNORED + "import sys; from jaxsys import cli; sys.exit(cli.main())"
    with running(code, "train", "--devices", "2", "--steps", "1000000") as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130, said
