"""Runs of several real processes on this machine, joined over TCP with gloo collectives."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxsys.errors import UsageError
from jaxsys.train.hosts import Hosts

TEXT = "def add(a, b):\n    return a + b\n\n\n" * 120


def test_what_must_be_given_together():
    with pytest.raises(UsageError, match="go together"):
        Hosts(coordinator="a:1", processes=2)
    with pytest.raises(UsageError, match="leave out --coordinator"):
        Hosts(automatic=True, coordinator="a:1", processes=2, process=0)
    with pytest.raises(UsageError, match="from 0 to 1"):
        Hosts(coordinator="a:1", processes=2, process=2)
    assert not Hosts().many and Hosts(automatic=True).many


class Run:
    """One process of a run and what it says."""

    def __init__(self, folder: Path, name: str, options: list[str], wrap: list[str]) -> None:
        self.path = folder / f"{name}.log"
        self.log = self.path.open("w")
        command = [*wrap, sys.executable, "-m", "jaxsys.cli", "train", *options]
        self.process = subprocess.Popen(
            command, stdout=self.log, stderr=self.log, env={**os.environ, "JAX_PLATFORMS": "cpu"}
        )

    def said(self) -> str:
        return self.path.read_text()

    def wait(self, timeout_s: float) -> int:
        return self.process.wait(timeout_s)


@pytest.fixture
def start(tmp_path):
    """Starts all processes of a run; ends them after the test."""
    (tmp_path / "text.py").write_text(TEXT)
    started: list[Run] = []

    def begin(count: int, folder: Path, *more: str, wraps=None, address="127.0.0.1") -> list[Run]:
        port = free_port()
        options = [
            *("--model", "tiny", "--data", str(tmp_path / "text.py"), "--sequence-length", "16"),
            *("--devices", "4", "--microbatches", "4", "--microbatch-size", "2"),
            *("--schedule", "dp", "--out", str(folder), *more),
        ]
        runs = []
        for process in range(count):
            joined = [
                *("--coordinator", f"{address}:{port}", "--processes", str(count)),
                *("--process", str(process)),
            ]
            runs.append(
                Run(
                    tmp_path,
                    f"{folder.name}-{count}-{process}-{len(started)}",
                    options + (joined if count > 1 else []),
                    wraps[process] if wraps else [],
                )
            )
            started.append(runs[-1])
        return runs

    yield begin
    for run in started:
        if run.process.poll() is None:
            run.process.kill()
        run.process.wait()
        run.log.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [r["loss"] for r in map(json.loads, lines) if r["kind"] == "step"]


def wait_for(run: Run, pattern: str, timeout_s: float = 200.0) -> None:
    until = time.monotonic() + timeout_s
    while not re.search(pattern, run.said()):
        assert run.process.poll() is None, run.said()
        assert time.monotonic() < until, run.said()
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_together_do_what_one_does_and_resume_alone(start, tmp_path, count):
    many, one = tmp_path / "many", tmp_path / "one"
    for run in start(count, many, "--steps", "6", "--stop-at", "3"):
        assert run.wait(250) == 0, run.said()
    # The rest by one process: the checkpoint knows nothing of how many wrote it.
    for run in start(1, many, "--steps", "6", "--resume"):
        assert run.wait(250) == 0, run.said()
    for run in start(1, one, "--steps", "6"):
        assert run.wait(250) == 0, run.said()
    assert losses(many) == pytest.approx(losses(one), rel=1e-5)
    assert len(losses(many)) == 6


@pytest.mark.slow
def test_a_killed_process_is_named_and_the_rest_stop_and_resume(start, tmp_path):
    folder = tmp_path / "run"
    more = ("--steps", "100000", "--save-every", "2", "--lost-after", "5")
    runs = start(2, folder, *more)
    wait_for(runs[0], "step 1/")
    until = time.monotonic() + 200
    while not any(p.name.isdigit() for p in (folder / "checkpoints").glob("*")):
        assert time.monotonic() < until, runs[0].said()
        time.sleep(0.2)
    runs[1].process.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    assert runs[0].wait(60) == 1
    assert time.monotonic() - killed < 30
    last = runs[0].said().strip().splitlines()[-1]
    assert (
        f"process 1 of the run ({socket.gethostname()} pid {runs[1].process.pid}) is lost" in last
    )
    assert "the last checkpoint is step" in last
    again = start(2, folder, *more, "--resume")
    wait_for(again[0], r"resumed from step \d+")
    wait_for(again[0], r"step \d+/100000  loss")
    # Told to one of them, a stop reaches both, after the same step.
    again[1].process.send_signal(signal.SIGTERM)
    assert [run.wait(60) for run in again] == [143, 143], again[1].said()
    assert re.search(r"stopped by signal 15 at step (\d+); the last checkpoint is step \1 ",
                     again[0].said())  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("moment", ["compiling", "running"])
def test_a_frozen_process_is_named_in_time(start, tmp_path, lost, moment):
    runs = start(2, tmp_path / "run", "--steps", "100000", "--lost-after", "8")
    wait_for(runs[0], "compiling" if moment == "compiling" else "step 1/")
    runs[lost].process.send_signal(signal.SIGSTOP)
    frozen = time.monotonic()
    other = runs[1 - lost]
    assert other.wait(60) == 1
    assert time.monotonic() - frozen < 20
    last = other.said().strip().splitlines()[-1]
    assert (
        f"process {lost} of the run ({socket.gethostname()} pid {runs[lost].process.pid})" in last
    )
    runs[lost].process.kill()


def can_make_namespaces() -> bool:
    made = subprocess.run(
        ["ip", "netns", "add", "jaxsys-probe"], capture_output=True, check=False
    ).returncode == 0  # fmt: skip
    if made:
        subprocess.run(["ip", "netns", "delete", "jaxsys-probe"], check=False)
    return made


@pytest.mark.slow
def test_across_network_namespaces(start, tmp_path):
    try:
        able = can_make_namespaces()
    except OSError:
        able = False
    if not able:
        pytest.skip("making network namespaces needs `ip` and root")
    names = ["jaxsys-a", "jaxsys-b"]

    def ip(*words: str, check: bool = True) -> None:
        subprocess.run(["ip", *words], check=check, capture_output=True)

    # Gloo listens where the host's name points, which must be the address the others can reach.
    tables = [Path("/etc/netns") / name for name in names]
    try:
        for index, (name, table) in enumerate(zip(names, tables, strict=True)):
            table.mkdir(parents=True)
            (table / "hosts").write_text(f"10.77.0.{index + 1} {socket.gethostname()}\n")
            ip("netns", "add", name)
        ip("link", "add", "jx0", "netns", names[0], "type", "veth",
           "peer", "name", "jx1", "netns", names[1])  # fmt: skip
        for index, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{index + 1}/24", "dev", f"jx{index}")
            ip("-n", name, "link", "set", f"jx{index}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        wraps = [["ip", "netns", "exec", name] for name in names]
        folder = tmp_path / "run"
        runs = start(2, folder, "--steps", "3", wraps=wraps, address="10.77.0.1")
        for run in runs:
            assert run.wait(250) == 0, run.said()
        assert len(losses(folder)) == 3
    finally:
        for name, table in zip(names, tables, strict=True):
            ip("netns", "delete", name, check=False)
            shutil.rmtree(table, ignore_errors=True)
