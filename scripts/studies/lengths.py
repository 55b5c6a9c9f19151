"""Traces of published lengths that come without arrivals."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxsys.errors import UsageError
from jaxsys.files import MIB, read_lines
from jaxsys.serve.simulation.made_traces import poisson_arrivals
from jaxsys.serve.simulation.trace_files import MOST_TOKENS, parsed
from jaxsys.serve.simulation.traces import RequestTrace


def lengths_from_csv(
    path: str | Path, columns: Sequence[str] = ("num_prefill_tokens", "num_decode_tokens")
) -> tuple[np.ndarray, np.ndarray]:
    """Prompt and output lengths of a CSV without arrivals.

    Raises:
        UsageError: naming row and column where a value is malformed.
    """
    lines = (line for _, line in read_lines(path, what="lengths file", most_bytes=MIB))
    try:
        reader = csv.DictReader(lines)
        missing = set(columns) - set(reader.fieldnames or ())
        if missing:
            raise UsageError(f"{path}: columns {sorted(missing)} are missing")
        rows = [
            [parsed(int, row[column] or "", f"{path}, row {n}", column) for column in columns]
            for n, row in enumerate(reader, start=2)
        ]
    except csv.Error as error:
        raise UsageError(f"lengths file {path} is not CSV text: {error}") from None
    if not rows:
        raise UsageError(f"lengths file {path} holds no lengths")
    if any(not 0 <= count <= MOST_TOKENS for row in rows for count in row):
        raise UsageError(f"lengths file {path}: token counts must be from 0 to {MOST_TOKENS}")
    prompts, outputs = np.array(rows).T
    return prompts, outputs


def trace_of_lengths(
    prompts: np.ndarray,
    outputs: np.ndarray,
    *,
    rate_per_s: float,
    duration_s: float,
    seed: int = 0,
    name: str = "lengths",
) -> RequestTrace:
    """Poisson arrivals whose lengths are drawn, in pairs, from a given set."""
    count = max(1, int(rate_per_s * duration_s))
    picks = np.random.default_rng(seed + 1).integers(0, len(prompts), count)
    return RequestTrace(
        name=name,
        arrival_s=poisson_arrivals(count, rate_per_s, seed),
        prompt_tokens=prompts[picks],
        output_tokens=np.maximum(1, outputs[picks]),
    )
