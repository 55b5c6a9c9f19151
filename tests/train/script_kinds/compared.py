"""Public scripts' kinds: each as its author has it and as jaxsys runs it, compared.

`python tests/train/script_kinds/compared.py` runs all of them under all schedules, writes
results/script_kinds.json and prints its table; with names of scripts it makes their rows anew.
"""

import difflib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

from jaxsys.results import write_result

HERE = Path(__file__).parent
RESULT = HERE.parents[2] / "results" / "script_kinds.json"
KINDS = {
    "nanodo": "nanodo (Linen, remat, tied head, mean)",
    "lm1b": "Flax lm1b (Linen, nested blocks, padding, TrainState)",
    "gemma": "Flax gemma (NNX, local and global layers, soft caps)",
    "mingpt": "minGPT in plain JAX (scan over stacked dicts, decay mask)",
    "haiku_lm": "Haiku's transformer (scopes, masked mean)",
    "equinox_lm": "Equinox (vmap over samples, partition)",
    "vit": "ViT (Linen, class token, accuracy beside the loss)",
}
NEEDS = {"haiku_lm": "haiku", "equinox_lm": "equinox"}
SCHEDULES = ("weipipe-interleave", "1f1b", "zero-3", "auto")


def script(name: str) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def changed_lines(name: str) -> int:
    """Lines of a script that are others, new or gone in its version for jaxsys; not empty ones."""
    before, after = (
        [line for line in (HERE / f"{file}.py").read_text().splitlines() if line.strip()]
        for file in (name, f"{name}_jaxsys")
    )
    matcher = difflib.SequenceMatcher(a=before, b=after, autojunk=False)
    return sum(
        max(end - start, other_end - other_start)
        for tag, start, end, other_start, other_end in matcher.get_opcodes()
        if tag != "equal"
    )


def differences(found: Any, wanted: Any) -> tuple[float, float]:
    """The largest of any loss, and of any parameter against its leaf's largest value or 1.

    Parameters that no loss depends on (the bias of keys under a softmax) have gradients that are
    rounding alone, which Adam scales up: only losses tell whether the same is computed.
    """
    losses, parameters = found
    # Leaf by leaf: classes of the two scripts are two, though they be alike.
    worst = 0.0
    for a, b in zip(jax.tree.leaves(parameters), jax.tree.leaves(wanted[1]), strict=True):
        largest = max(float(np.max(np.abs(b))), 1.0)
        worst = max(worst, float(np.max(np.abs(np.asarray(a) - np.asarray(b)))) / largest)
    return float(np.max(np.abs(np.subtract(losses, wanted[0])))), worst


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    head = ["kind of script", "changed lines", *(f"`{name}`" for name in SCHEDULES)]
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    for row in rows:
        found = (f"{row[f'{name}_loss']:.1e}" for name in SCHEDULES)
        lines.append(" | ".join([KINDS[row["script"]], str(row["changed_lines"]), *found]))
    return "\n".join(f"| {line} |" for line in lines)


def main(names: list[str]) -> None:
    """Runs these, or all."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    found_rows = {}
    for name in names or KINDS:
        if importlib.util.find_spec(NEEDS.get(name, "jax")) is None:
            sys.exit(f"{NEEDS[name]} is not installed")
        wanted = script(name).train()
        row: dict[str, Any] = {"script": name, "changed_lines": changed_lines(name)}
        for schedule in SCHEDULES:
            found = script(f"{name}_jaxsys").train(schedule=schedule)
            loss, parameter = differences(found, wanted)
            row |= {f"{schedule}_loss": loss, f"{schedule}_parameter": parameter}
            print(f"{name} {schedule} {loss:.1e} {parameter:.1e}", flush=True)
            jax.clear_caches()
        found_rows[name] = row
    known = json.loads(RESULT.read_text())["rows"] if RESULT.exists() and names else []
    found_rows = {row["script"]: row for row in known} | found_rows
    rows = [found_rows[name] for name in KINDS if name in found_rows]
    write_result(
        RESULT,
        benchmark="script_kinds",
        kind="measured",
        config={"steps": 20, "devices": 4, "dtype": "float32", "rows": 16},
        rows=rows,
    )
    print(table(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
