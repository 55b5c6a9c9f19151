#!/usr/bin/env python
"""Measures what structured output costs a batch: JSON into results/, a table on stdout.

scripts/bench_structured.py gpu   Llama-3-8B's shape, random bfloat16 weights, 128,256 logits
scripts/bench_structured.py cpu   SmolLM2-135M
scripts/bench_structured.py tiny  a tiny shape, to try the script

Rounds with and without grammars alternate, so that both see the same clocks and neighbours;
requests follow JSON schemas whose arrays are longer than the run, so that none ends.

Exits with 1 if a mixed batch takes over `--most` percent longer between tokens than a free one.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsys.model import default_model_path, load
from jaxsys.results import table, write_result
from jaxsys.serve.grammars import Grammars, of_json_schema
from jaxsys.serve.sampling import SamplingNeeds
from studies import serving as benchmark
from studies.random_weights import random_parameters
from studies.serving import Row, Study

SHARES = (0.25, 1.0)
"""Of the batch, following grammars."""
ROUNDS = 5

STUDIES = {
    "gpu": dataclasses.replace(
        benchmark.STUDIES["gpu"],
        pool_tokens=150_016,
        buckets=(8, 32, 64, 128),
        batches=(8, 32, 64, 128),
        seconds=0.7,
    ),
    "cpu": dataclasses.replace(benchmark.STUDIES["cpu"], batches=(4, 16), seconds=2.0),
    "tiny": dataclasses.replace(benchmark.STUDIES["tiny"], batches=(4,)),
}


def schemas() -> list[dict[str, Any]]:
    """Arrays of objects as tools and extractions have them, of no end."""
    string: dict[str, Any] = {"type": "string", "maxLength": 30}
    records: list[dict[str, Any]] = [
        {"name": string, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
        {"city": string, "units": {"enum": ["metric", "imperial"]}, "days": {"type": "integer"}},
        {"id": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"}, "paid": {"type": "boolean"}},
        {"title": string, "tags": {"type": "array", "items": string, "maxItems": 5}},
    ]
    return [
        {
            "type": "array",
            "minItems": 1000,
            "items": {
                "type": "object",
                "properties": record,
                "required": list(record),
                "additionalProperties": False,
            },
        }
        for record in records
    ]


def run(study: Study) -> tuple[dict[str, Any], list[Row], dict[str, Any]]:
    """Measures a study; returns as `benchmark.run` does."""
    config, parameters = benchmark.model_of(study.model, study.dtype)
    tokenizer = load(default_model_path()).tokenizer
    assert tokenizer is not None
    if config.vocab_size < tokenizer.vocab_size:  # logits for every token there is
        config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
        parameters = random_parameters(config, parameters_dtype(parameters))
    grammars = Grammars(tokenizer, config.vocab_size)
    made = [of_json_schema(schema, compact=True) for schema in schemas()]
    for grammar in made:
        grammars.prepare(grammar)
    executor = benchmark.build_executor(study, config, parameters, None, grammars)
    del parameters
    benchmark.compile_steps(study, executor, study.batches, ())
    for batch in study.batches:
        bucket = next(size for size in study.buckets if size >= batch)
        executor.steps.compile(("sample", bucket, SamplingNeeds(masked=True)))
    (first,) = tokenizer.encode("[", add_special=False)
    rows: list[Row] = []
    for batch in study.batches:
        for share in SHARES:
            count = max(1, round(share * batch))
            following = [made[index % len(made)] for index in range(count)]
            rows.append(_compare(study, executor, batch, following, first))
            print("  ".join(f"{name}={value}" for name, value in rows[-1].items()), flush=True)
    figures = {
        "device": jax.devices()[0].device_kind,
        "vocabulary": config.vocab_size,
        "mask_ms_median": _mask_ms(grammars, made, first),
        "worst_cost_pct": max(row["cost_pct"] for row in rows),
    }
    return dataclasses.asdict(study), rows, figures


def parameters_dtype(parameters: Any) -> Any:
    """The dtype that weights have."""
    return jax.tree.leaves(parameters)[0].dtype


def _compare(study: Study, executor: Any, batch: int, following: Sequence[str], first: int) -> Row:
    free: list[Row] = []
    mixed: list[Row] = []
    for _ in range(ROUNDS):
        free.append(benchmark.measure_decode(study, executor, batch, None, (), first))
        mixed.append(benchmark.measure_decode(study, executor, batch, None, following, first))

    def middle(rows: list[Row], name: str) -> float:
        return statistics.median(row[name] for row in rows)

    base, cost = middle(free, "itl_ms"), middle(mixed, "itl_ms")
    return {
        "batch": batch,
        "following": len(following),
        "itl_free_ms": base,
        "itl_mixed_ms": cost,
        "cost_pct": round(100 * (cost / base - 1), 2),
        "itl_p99_free_ms": middle(free, "itl_p99_ms"),
        "itl_p99_mixed_ms": middle(mixed, "itl_p99_ms"),
        "dispatch_free_ms": middle(free, "dispatch_ms"),
        "dispatch_mixed_ms": middle(mixed, "dispatch_ms"),
        "complete_mixed_ms": middle(mixed, "complete_ms"),
    }


def _mask_ms(grammars: Grammars, made: Sequence[str], first: int) -> float:
    """Median time of one row's mask behind the first token."""
    row = np.full((1, grammars.words), -1, np.int32)
    samples = []
    for grammar in made:
        for _ in range(5):
            follower = grammars.begin(grammar)
            follower.follow([first])
            start_s = time.perf_counter()
            follower.fill(row)
            samples.append(1e3 * (time.perf_counter() - start_s))
    return round(statistics.median(samples), 4)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/bench_structured.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--most", type=float, default=5.0, help="percent (default: 5)")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the JSON")
    arguments = parser.parse_args()
    config, rows, figures = run(STUDIES[arguments.study])
    path = write_result(
        arguments.out / f"structured_{arguments.study}.json",
        benchmark=f"structured_{arguments.study}",
        kind="measured",
        config=config,
        rows=rows,
        figures=figures,
    )
    print(table(rows))
    print(f"written to {path}", file=sys.stderr)
    worst = figures["worst_cost_pct"]
    if worst > arguments.most:
        print(f"a mixed batch costs {worst} %, over {arguments.most} %", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
