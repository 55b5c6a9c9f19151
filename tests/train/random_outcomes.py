"""How models drawn at random fare: equal to their authors' loops, or refused and why.

`python tests/train/random_outcomes.py 0 200` runs these seeds and merges what becomes of them into
results/random_models.json; 200 seeds take some 35 minutes of one core.
"""

import argparse
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import jax

from jaxsys.results import write_result

HERE = Path(__file__).parent
PATH = HERE.parents[1] / "results" / "random_models.json"
REASONS = {
    "is not linear in the gradient": "a custom_vjp that clips more than a sample",
    "means over different numbers": "means over numbers that are drawn or made of parameters",
    "not seen to be a mean": "a mean that is none of samples",
    "used whole by": "a stack used whole",
    "do not run in its order": "a stack in another order",
}


def reason(line: str) -> str:
    """A refusal's kind."""
    return next((kind for says, kind in REASONS.items() if says in line), line)


def main() -> None:
    """Runs seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int, help="not included")
    given = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    spec = importlib.util.spec_from_file_location("tested", HERE / "test_random_models.py")
    assert spec is not None and spec.loader is not None
    tested: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tested)
    rows = json.loads(PATH.read_text())["rows"] if PATH.exists() else []
    known = {row["seed"]: row for row in rows}
    for seed in range(given.first, given.last):
        try:
            line = tested.outcome(seed, tested.trained)
        except AssertionError as error:
            found = ("different", str(error))
        else:
            found = ("equal", "") if line is None else ("refused", reason(line))
        known[seed] = {"seed": seed, "outcome": found[0], "reason": found[1]}
        print(*known[seed].values(), flush=True)
        jax.clear_caches()
    record(known)


def record(known: dict[int, dict[str, Any]]) -> None:
    """Writes what is known of each seed."""
    config = {
        "steps": 3,
        "devices": 4,
        "dtype": "float32",
        "relative_tolerance": 2e-5,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
    rows = [known[seed] for seed in sorted(known)]
    write_result(PATH, benchmark="random_models", kind="measured", config=config, rows=rows)


if __name__ == "__main__":
    main()
