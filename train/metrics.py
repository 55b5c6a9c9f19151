"""What a run reports of itself: rates, MFU, memory, energy; to a JSONL file and to TensorBoard.

One line a step, and lines for the run's start, held-out losses and checkpoints. A number that
cannot be measured is null, with the reason in the run's first line.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxsys.errors import RunError, UsageError
from jaxsys.fields import Fields
from jaxsys.files import parse_json, read_lines, write_whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Throughput since the last report, pauses for checkpoints and evaluation left out."""

    step_time_s: float
    tokens_per_s: float
    tokens_per_s_per_device: float
    mfu: float | None


class Meter:
    """Times steps. The first interval after a start holds compilation and is not counted."""

    def __init__(
        self,
        *,
        tokens_per_step: int,
        devices: int,
        flops_per_token: float | None,
        peak_flops_per_s: float | None,
    ) -> None:
        self._tokens, self._devices = tokens_per_step, devices
        self._flops, self._peak = flops_per_token, peak_flops_per_s
        self._last: float | None = None
        self.total_time_s = 0.0
        self.total_steps = 0

    def restart(self) -> None:
        """Forgets the time since the last step: something else took it."""
        self._last = time.monotonic()

    def step(self) -> Rates | None:
        """A step has ended; its rates, or None for the first."""
        now = time.monotonic()
        before, self._last = self._last, now
        if before is None:
            return None
        self.total_time_s += now - before
        self.total_steps += 1
        return self._rates(max(now - before, 1e-9))

    def overall(self) -> Rates | None:
        """Rates over all counted steps."""
        if not self.total_steps:
            return None
        return self._rates(max(self.total_time_s, 1e-9) / self.total_steps)

    def _rates(self, step_time_s: float) -> Rates:
        tokens_per_s = self._tokens / step_time_s
        per_device = tokens_per_s / self._devices
        known = self._flops is not None and self._peak is not None
        return Rates(
            step_time_s=step_time_s,
            tokens_per_s=tokens_per_s,
            tokens_per_s_per_device=per_device,
            mfu=per_device * self._flops / self._peak if known else None,  # type: ignore[operator]
        )


def peak_memory_bytes() -> int | None:
    """The most that any of this process's devices has allocated; None where JAX does not say."""
    peaks = [
        (device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()
    ]
    known = [peak for peak in peaks if peak is not None]
    return max(known) if known else None


class MetricsLog:
    """A JSONL file that is the same whether or not the run was interrupted.

    Args:
        path: the file; its folder is made.
        resume_step: lines of later steps are dropped; None starts the file anew.
        tensorboard: a folder for event files, or None.

    Raises:
        UsageError: if TensorBoard files are wanted and `tensorboardX` is not installed.
    """

    def __init__(
        self, path: Path, *, resume_step: int | None = None, tensorboard: Path | None = None
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [] if resume_step is None else _lines_until(path, resume_step)
        write_whole(path, "".join(f"{line}\n" for line in kept))
        # Nothing is kept back: a disk that fills up is known at the write, and not when all ends.
        self._file = path.open("ab", buffering=0)
        self._board = None
        if tensorboard is not None:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise UsageError(
                    "TensorBoard files need tensorboardX: pip install tensorboardX"
                ) from None
            self._board = SummaryWriter(str(tensorboard))

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Appends one line; numbers go to TensorBoard too.

        Raises:
            OSError: if the line, or a part of it, cannot be written.
        """
        line = {"kind": kind, "step": step, **values}
        left = memoryview((json.dumps(line, allow_nan=True) + "\n").encode())
        while left:
            left = left[self._file.write(left) :]
        if self._board is not None and kind != "run":
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Closes the files.

        Raises:
            RunError: if what TensorBoard's writer has kept cannot be written.
        """
        self._file.close()
        if self._board is not None:
            try:
                self._board.close()
            except OSError as error:
                raise RunError(
                    f"the event files could not be written: {error.strerror or error}"
                ) from None


def _lines_until(path: Path, step: int) -> list[str]:
    if not path.is_file():
        return []
    kept = []
    for number, line in read_lines(path, what="metrics file", errors="replace"):
        try:
            row = Fields(parse_json(line, name=f"line {number}"), name=f"line {number}")
            if row.integer("step") <= step:
                kept.append(line)
        except UsageError:
            continue  # the line a kill cut short
    return kept
