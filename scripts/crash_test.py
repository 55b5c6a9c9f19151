#!/usr/bin/env python
"""Kills a training run at random moments, again and again, and sees that nothing is lost.

A small model trains with a checkpoint after every step. It is sent SIGKILL at a random moment after
its first new checkpoint, restarted with --resume, and so on. Now and then a file of the newest
checkpoint is cut short, a bit of its record is flipped, or a second run is started in the same
folder, where strays lie among the steps. Each restart must go on from the newest checkpoint that is
whole; the losses of all steps must be, bit for bit, those of a run that was never interrupted.
Then the trials of scripts/crash_trials.py: data that change under a run, and a disk that fills up.

Writes a JSON file (kind "measured") and exits 1 if anything was lost.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import crash_trials

from jaxsys.results import write_result

TIMEOUT_S = 300.0
STRAYS = ("notes.txt", "old/a", "broken")
"""Files among the checkpoints that are not the run's."""


def command(folder: Path, text: Path, steps: int) -> list[str]:
    """The training run."""
    return [
        *(sys.executable, "-m", "jaxsys.cli", "train", "--model", "tiny", "--data", str(text)),
        *("--devices", "1", "--microbatches", "1", "--microbatch-size", "2"),
        *("--sequence-length", "16", "--steps", str(steps), "--save-every", "1"),
        *("--out", str(folder), "--resume"),
    ]


def losses(folder: Path) -> dict[int, float]:
    """Step -> loss from the metrics log; a line cut short is left out."""
    found = {}
    path = folder / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["kind"] == "step":
            found[record["step"]] = record["loss"]
    return found


def going_on_from(said: str) -> int | None:
    """The step a life says it starts from; None while it has not said."""
    found = re.search(r"resumed from step (\d+)|starting from step (0)", said)
    return int(found[1] or found[2]) if found else None


def whole_steps(folder: Path) -> list[int]:
    """Checkpoints whose folder has its final name."""
    return sorted(int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdigit())


def unfinished(folder: Path) -> bool:
    """Whether a save was cut short."""
    return any("tmp" in p.name for p in (folder / "checkpoints").glob("*"))


def cut_short(folder: Path, rng: random.Random) -> str:
    """Halves the largest file, or another data file, of the newest checkpoint; returns its name."""
    newest = folder / "checkpoints" / str(whole_steps(folder)[-1]) / "state"
    files = sorted((p for p in newest.rglob("*") if p.is_file()), key=lambda p: -p.stat().st_size)
    file = rng.choice(files[:3])
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return str(file.relative_to(folder / "checkpoints"))


def flip_a_bit(folder: Path, rng: random.Random) -> str:
    """Flips one bit of the record of the newest checkpoint; returns where."""
    newest = folder / "checkpoints" / str(whole_steps(folder)[-1])
    (file,) = [p for p in (newest / "run").rglob("*") if b'"position"' in p.read_bytes()]
    content = bytearray(file.read_bytes())
    at = rng.randrange(len(content))
    content[at] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return f"{newest.name}/{file.relative_to(newest)} at {at} of {len(content)}"


def second_run(run: list[str], environment: dict[str, str], pid: int) -> str | None:
    """Starts another run in a folder in use; returns what is wrong with how that is refused."""
    done = subprocess.run(
        run, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    if done.returncode != 2 or f"in use by a run of pid {pid} " not in done.stderr:
        return f"a second run ended with {done.returncode}: {done.stderr[-300:]}"
    return None


def main() -> int:
    """Runs the test."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--trials", type=int, default=2, help="of each other kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("results/crash_test.json"))
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    work = Path(tempfile.mkdtemp(prefix="crash-test-"))
    text = work / "text.py"
    text.write_text("def add(a, b):\n    return a + b\n\n\n" * 400)
    # JAX's own cache: a restart need not compile again, so kills come quickly.
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(work / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    steps = 100_000  # more than the kills leave time for; cut at the end
    folder = work / "killed"
    for stray in STRAYS:
        path = folder / "checkpoints" / stray
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    begun, kills, in_save, truncated, faults = time.monotonic(), 0, 0, 0, []
    flipped = seconds = 0
    expected: int | None = None
    doubtful: int | None = None
    while kills < arguments.kills:
        log = (work / "log").open("w+")
        child = subprocess.Popen(
            command(folder, text, steps), env=environment, stderr=log, stdout=subprocess.DEVNULL
        )
        started = time.monotonic()
        while child.poll() is None and time.monotonic() - started < TIMEOUT_S:
            start = going_on_from((work / "log").read_text())
            if start is not None and max(whole_steps(folder), default=0) > start:
                break
            time.sleep(0.02)
        said = (work / "log").read_text()
        if child.poll() is not None or time.monotonic() - started >= TIMEOUT_S:
            child.kill()
            faults.append(f"life {kills}: ended by itself: {said[-500:]}")
            break
        went_on = going_on_from(said)
        # A cut-short file that Orbax does not need to read loses nothing.
        if expected is not None and went_on not in {expected, doubtful}:
            faults.append(f"life {kills}: went on from {went_on}, {expected} was whole")
        if kills % 10 == 7:
            seconds += 1
            wrong = second_run(command(folder, text, steps), environment, child.pid)
            faults += [] if wrong is None else [f"life {kills}: {wrong}"]
        time.sleep(rng.uniform(0.0, 1.0))
        child.send_signal(signal.SIGKILL)
        child.wait()
        log.close()
        kills += 1
        in_save += unfinished(folder)
        there = whole_steps(folder)
        if not there:
            expected = doubtful = 0
            print(f"kill {kills}: went on from {went_on}, nothing whole yet", flush=True)
            continue
        expected, doubtful = there[-1], None
        if kills % 10 == 0 and len(there) > 1:
            print(f"  cut short: {cut_short(folder, rng)}", flush=True)
            truncated += 1
            expected, doubtful = there[-2], there[-1]
        if kills % 10 == 5 and len(there) > 1:
            print(f"  a bit flipped: {flip_a_bit(folder, rng)}", flush=True)
            flipped += 1
            expected = there[-2]
        print(f"kill {kills}: went on from {went_on}, whole now {there}", flush=True)
    killed = losses(folder)
    last = max(killed, default=0)
    whole = work / "whole"
    reference = command(whole, text, steps) + ["--stop-at", str(last)]
    reference[reference.index("--save-every") + 1] = str(steps)
    subprocess.run(reference, env=environment, check=True, capture_output=True)
    wanted = losses(whole)
    unlike = [step for step in range(1, last + 1) if killed.get(step) != wanted.get(step)]
    if unlike:
        faults.append(f"{len(unlike)} of {last} losses differ, first at step {unlike[0]}")
    for stray in STRAYS:
        path = folder / "checkpoints" / stray
        if not path.is_file() or path.read_text() != "mine":
            faults.append(f"{stray} among the checkpoints was touched")
    ended = dict.fromkeys(
        [f"data {how}" for how in crash_trials.DATA_CHANGES]
        + [f"disk full under {what}" for what in crash_trials.FULL_DISKS],
        0,
    )
    os.environ.update(environment)
    for trial in range(arguments.trials):
        place = work / f"trial-{trial}"
        place.mkdir()
        data = crash_trials.data_changes(place)
        disks = crash_trials.full_disks(place, text, environment)
        found = {f"data {how}": wrong for how, wrong in data.items()}
        found |= {f"disk full under {what}": wrong for what, wrong in disks.items()}
        for name, wrong in found.items():
            print(f"trial {trial}: {name}: {'; '.join(wrong) or 'as it should'}", flush=True)
            faults += [f"{name}: {one}" for one in wrong]
            ended[name] = ended.get(name, 0) + 1
    row = {
        "kills": kills,
        "kills_during_a_save": in_save,
        "files_cut_short": truncated,
        "bits_of_records_flipped": flipped,
        "second_runs_refused": seconds,
        "strays_among_the_steps": len(STRAYS),
        **{name.replace(" ", "_"): count for name, count in ended.items()},
        "steps": last,
        "losses_that_differ": len(unlike),
        "faults": faults,
        "time_s": round(time.monotonic() - begun, 1),
    }
    write_result(
        arguments.json,
        benchmark="crash_test",
        kind="measured",
        config={"kills": arguments.kills, "seed": arguments.seed, "save_every": 1},
        rows=[row],
    )
    print(json.dumps(row, indent=2))
    shutil.rmtree(work, ignore_errors=True)
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
