"""How a run shows itself: a bar on a terminal, plain lines in a pipe or a log file."""

import sys
import time
from typing import TextIO

from tqdm import tqdm

LINES = 20
"""About how many plain lines a run prints."""
QUIET_S = 15.0
"""A plain line is printed at least this often."""


class Progress:
    """Prints progress of steps `start` to `steps`."""

    def __init__(
        self, *, start: int, steps: int, shown: bool = True, file: TextIO | None = None
    ) -> None:
        self._file = sys.stderr if file is None else file
        self._steps, self._shown = steps, shown
        self._every = max(1, (steps - start) // LINES)
        self._last_line = time.monotonic()
        self._start = start
        self._bar = None
        if shown and self._file.isatty():
            self._bar = tqdm(
                total=steps, initial=start, file=self._file, unit="step", dynamic_ncols=True
            )

    def step(self, step: int, text: str) -> None:
        """Step `step` is done; `text` says how it went."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        due = (step - self._start) % self._every == 0 or step in (self._start + 1, self._steps)
        if due or time.monotonic() - self._last_line > QUIET_S:
            self._last_line = time.monotonic()
            self.say(f"step {step}/{self._steps}  {text}")

    def say(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        if not self._shown:
            return
        if self._bar is not None:
            self._bar.write(text, file=self._file)
        else:
            print(text, file=self._file, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()
