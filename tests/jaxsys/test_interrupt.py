"""Signals to a command as a process: while it sets up, when they are dropped, and inside C."""

import signal
import subprocess
import sys
import time

import pytest

PREFACE = """
import ctypes, signal, sys, time, types
from jaxsys import cli

def command(argv, prog):
    print("begun", flush=True)
    {body}

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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("body", BODIES)
def test_a_command_ends_soon_whatever_it_does(body, number):
    code = PREFACE.format(body=BODIES[body])
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(number)
        assert process.wait(20) == 128 + number
        assert process.stderr.read() == ""


def test_the_second_ctrl_c_ends_what_took_over_and_is_inside_c():
    body = "signal.signal(signal.SIGINT, lambda *_: None); print('ready', flush=True)\n    "
    body += BODIES["inside C"]
    with subprocess.Popen(
        [sys.executable, "-c", PREFACE.format(body=body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "begun\n"
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert "Ctrl-C again to stop now" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130


@pytest.mark.parametrize("seconds", [1.0, 2.5])
def test_training_ends_while_it_sets_up(seconds):
    command = [sys.executable, "-m", "jaxsys", "train", "--devices", "2", "--steps", "1000000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130, said
