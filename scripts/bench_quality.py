#!/usr/bin/env python
"""Perplexity of SmolLM2-135M in each form that it can be served in, against float32.

    scripts/bench_quality.py [--windows 4] [--length 512] [--forms fp8 fp8+fp8 ...]

By the served passes over pages, on the language reference that comes with Python
(`pydoc_data.topics`), in windows that begin anew. A form is weights, or weights+cache, and `both`
behind it for products whose two sides are small, as GPUs multiply them: a CPU computes the same
numbers. `calibrated` behind it is a model that `jaxsys convert --round` has rounded by the longer
docstrings of Python's standard library: prose like the text that is scored, which has none of them.
Errors are those of means over 64 tokens. JSON after each row.
"""

import argparse
import ast
import functools
import math
import pydoc_data.topics
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.model import calibration, default_model_path, load
from jaxsys.model.convert import convert
from jaxsys.model.load import open_model
from jaxsys.results import table, write_result
from jaxsys.serve import paged_model
from jaxsys.serve.matrix import Way
from jaxsys.serve.paged_attention import choose_kernels
from jaxsys.serve.weights import serving_weights

FORMS = (
    "float32", "float32+fp8", "float32+int8", "int8", "fp8", "fp8 both", "fp8+int8 both", "int4",
    "fp8 calibrated", "fp8 both calibrated", "fp8+int8 both calibrated", "int4 calibrated",
    "int4+int8 calibrated",
)  # fmt: skip
PAGE = 64


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512, help="tokens of a window, in whole 64s")
    parser.add_argument("--forms", nargs="+", default=FORMS)
    parser.add_argument(
        "--sequences",
        type=int,
        default=calibration.SEQUENCES,
        help="of 512 tokens, to calibrate by",
    )
    parser.add_argument("--out", type=Path, default=Path("results/quality_smollm2.json"))
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    exact = np.zeros(0)
    model = load(default_model_path(), jnp.float32)
    assert model.tokenizer is not None
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    tokens = np.array(
        model.tokenizer.encode(text[: 8 * options.windows * options.length]), np.int32
    )
    tokens = tokens[: options.windows * options.length + 1]
    device = jax.devices()[0]
    place = jax.sharding.SingleDeviceSharding(device)
    config = model.config
    kernels = choose_kernels(dtype=jnp.dtype("float32"), head_dim=config.head_dim, device=device)
    score = jax.jit(
        functools.partial(paged_model.score_pass, config, kernels, False), donate_argnums=1
    )
    pages = options.length // PAGE
    for form in options.forms:
        forms, *how = form.split()
        kept, _, cached = forms.partition("+")
        settings: Any = {"quantisation": None if kept == "float32" else kept}
        weights = serving_weights(
            config,
            rounded(kept, options.sequences) if "calibrated" in how else model.parameters,
            placement=place,
            how=Way(both="both" in how),
            **settings,
        )
        losses = []
        for window in range(options.windows):
            start = window * options.length
            part = tokens[start : start + options.length]
            following = tokens[start + 1 : start + options.length + 1]
            made: Any = cached or None
            cache = paged_model.empty_cache(config, pages, PAGE, jnp.dtype("float32"), place, made)
            _, _, scores = score(
                weights, cache, part, np.int32(0), np.int32(len(part)),
                np.arange(pages, dtype=np.int32), following,
            )  # fmt: skip
            losses.append(-np.asarray(scores.logprobs, np.float64))
        loss = float(np.mean(losses))
        means = np.reshape(losses, (-1, PAGE)).mean(axis=1)
        row = {
            "form": form,
            "tokens": int(np.size(losses)),
            "loss": round(loss, 5),
            "perplexity": round(math.exp(loss), 4),
            "weights_mib": round(weights.step_bytes / 2**20, 1),
        }
        if "calibrated" in how:
            row["calibration_tokens"] = options.sequences * calibration.LENGTH
        if rows:
            row["over_float32_pct"] = round(100 * (math.exp(loss - rows[0]["loss"]) - 1), 3)
            error = np.std(means - exact) / math.sqrt(len(means))
            row["error_pct"] = round(100 * float(error), 3)
        else:
            exact = means
        rows.append(row)
        print("  ".join(f"{name}={value}" for name, value in row.items()), flush=True)
        write_result(
            options.out,
            benchmark="quality_smollm2",
            kind="measured",
            config={k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
            rows=rows,
        )
    print(table(rows))
    return 0


@functools.cache
def rounded(form: Any, sequences: int) -> Any:
    """SmolLM2's parameters, rounded for a form."""
    model = open_model(default_model_path())
    assert model.tokenizer is not None
    by = calibration.sequences(docstrings(), model.tokenizer, calibration.LENGTH, sequences)
    leaves = calibration.Rounded(model.checkpoint, "float32", form, by)
    with tempfile.TemporaryDirectory() as folder:
        convert(model, Path(folder) / "model", "float32", leaves=leaves)
        return load(Path(folder) / "model", jnp.float32).parameters


def docstrings(longer_than: int = 300) -> str:
    """Those of the standard library's modules, classes and functions."""
    found: list[str] = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                found.append(ast.get_docstring(node) or "")
    return "\n\n".join(text for text in found if len(text) > longer_than)


if __name__ == "__main__":
    raise SystemExit(main())
