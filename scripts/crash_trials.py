"""What else may happen to a training run, besides being killed: trials of scripts/crash_test.py.

Its data are overwritten or cut short under it; the disk fills up under its checkpoints, its metrics
or its export. It must end by itself, with exit code 1 and one line that says what happened, and go
on from its last good step once the cause is gone. The disk is a small tmpfs in a namespace of its
own (`unshare`), so that nothing else is filled and no rights are needed.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

TIMEOUT_S = 300.0
DISK_BYTES = 48 << 20
MOST_LINES = 3
"""That a run which failed may say, all told, with --quiet."""


def command(out: Path, data: Path, *more: str, steps: int = 100_000) -> list[str]:
    """A small training run that goes on where it was."""
    return [
        *(sys.executable, "-m", "jaxsys.cli", "train", "--model", "tiny", "--data", str(data)),
        *("--devices", "1", "--microbatches", "1", "--microbatch-size", "2"),
        *("--sequence-length", "16", "--steps", str(steps), "--out", str(out), "--resume", *more),
    ]


def steps_of(out: Path) -> list[int]:
    """Checkpoints whose folder has its final name."""
    return sorted(int(p.name) for p in (out / "checkpoints").glob("*") if p.name.isdigit())


def lines_of(out: Path) -> int:
    """Lines of the metrics log."""
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def disturbed(
    run: list[str], ready: Callable[[], bool], disturb: Callable[[], None], words: str
) -> Iterator[str]:
    """Starts a run, disturbs it once it is `ready`; yields what is wrong with how it ended."""
    child = subprocess.Popen(run, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    until_s = time.monotonic() + TIMEOUT_S
    while child.poll() is None and not ready() and time.monotonic() < until_s:
        time.sleep(0.02)
    if child.poll() is None:
        disturb()
    try:
        said = child.communicate(timeout=TIMEOUT_S)[1]
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        yield f"did not end after {TIMEOUT_S:g} s"
        return
    lines = said.strip().splitlines()
    if child.returncode != 1:
        yield f"exit code {child.returncode}: {said[-300:]}"
    elif not lines or words not in lines[-1]:
        yield f"does not say {words!r}: {said[-300:]}"
    elif len(lines) > MOST_LINES:
        yield f"says {len(lines)} lines: {said[:300]}"


def goes_on(out: Path, data: Path, *more: str) -> Iterator[str]:
    """Resumes for two steps; yields what is wrong with that."""
    there = steps_of(out)
    if not there:
        yield "no step was kept"
        return
    run = command(out, data, "--stop-at", str(there[-1] + 2), *more)
    done = subprocess.run(run, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode or f"resumed from step {there[-1]}" not in done.stderr:
        yield f"does not go on from step {there[-1]}: {done.stderr[-300:]}"


def data_change(work: Path, how: str) -> Iterator[str]:
    """Token ids on disk are overwritten in place, or the file is cut short, under a run."""
    out, path = work / f"data-{how}", work / f"{how}.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, 400_000).astype(np.uint16))
    whole = path.read_bytes()

    def disturb() -> None:
        if how == "shortened":
            os.truncate(path, len(whole) // 8)
        else:  # in place, as a copy over it does
            with path.open("r+b") as file:
                file.seek(128)
                file.write(bytes(len(whole) - 128))

    run = command(out, path, "--quiet", "--save-every", "2")
    yield from disturbed(run, lambda: bool(steps_of(out)), disturb, str(path))
    path.write_bytes(whole)
    yield from goes_on(out, path)


def full_disk(disk: Path, elsewhere: Path, text: Path, what: str) -> Iterator[str]:
    """A disk of its own fills up under checkpoints, metrics or an export."""
    out = (elsewhere if what == "export" else disk) / what
    filler = disk / "filler"

    def fill() -> None:
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    if what == "checkpoint":
        run = command(out, text, "--quiet", "--save-every", "1")
        yield from disturbed(run, lambda: len(steps_of(out)) > 1, fill, "the last good one is step")
    else:
        steps = 4 if what == "export" else 100_000
        begun = command(out, text, "--stop-at", "2", steps=steps)
        subprocess.run(begun, capture_output=True, check=True, timeout=TIMEOUT_S)
        if what == "metrics":
            before = lines_of(out)
            run = command(out, text, "--quiet", "--save-every", "100000")
            yield from disturbed(
                run, lambda: lines_of(out) > before + 3, fill, "metrics could not be written"
            )
        else:
            fill()
            run = command(out, text, "--quiet", "--export", str(disk / "model"), steps=4)
            yield from disturbed(run, lambda: True, lambda: None, "could not be exported")
    filler.unlink(missing_ok=True)
    if what != "export":
        yield from goes_on(out, text)
        return
    run = command(out, text, "--export", str(disk / "model"), steps=4)
    done = subprocess.run(run, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode or not (disk / "model/model.safetensors").is_file():
        yield f"is not exported once there is room: {done.stderr[-300:]}"


DATA_CHANGES = ("overwritten", "shortened")
FULL_DISKS = ("checkpoint", "metrics", "export")


def data_changes(work: Path) -> dict[str, list[str]]:
    """What was wrong, by how the data changed."""
    return {how: list(data_change(work, how)) for how in DATA_CHANGES}


def full_disks(work: Path, text: Path, environment: Mapping[str, str]) -> dict[str, list[str]]:
    """What was wrong, by what filled the disk; runs this file in a namespace of its own."""
    inside = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, __file__]
    done = subprocess.run(
        [*inside, str(work), str(text)],
        env=dict(environment),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return {"disk": [f"no disk of its own could be made: {done.stderr[-300:]}"]}
    return json.loads(done.stdout)


def _inside(work: Path, text: Path) -> None:
    """Mounts the disk, tries, and prints what was wrong as JSON."""
    disk = work / "disk"
    disk.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)]
    subprocess.run(mount, check=True)
    found = {}
    for what in FULL_DISKS:
        elsewhere = work / "elsewhere"
        found[what] = list(full_disk(disk, elsewhere, text, what))
        shutil.rmtree(elsewhere, ignore_errors=True)
        for path in disk.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    print(json.dumps(found))


if __name__ == "__main__":
    _inside(Path(sys.argv[1]), Path(sys.argv[2]))
