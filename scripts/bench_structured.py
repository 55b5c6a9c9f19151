#!/usr/bin/env python
"""Measures what structured output costs a batch: JSON into results/, a table on stdout.

scripts/bench_structured.py gpu   Llama-3-8B's shape, random bfloat16 weights, 128,256 logits
scripts/bench_structured.py cpu   SmolLM2-135M
scripts/bench_structured.py tiny  a tiny shape, to try the script

Exits with 1 if a mixed batch takes over `--most` percent longer between tokens than a free one.
"""

import argparse
import sys
from pathlib import Path

from jaxsys.results import table, write_result
from jaxsys.serve import grammar_benchmark


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/bench_structured.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", choices=grammar_benchmark.STUDIES)
    parser.add_argument("--most", type=float, default=5.0, help="percent (default: 5)")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the JSON")
    arguments = parser.parse_args()
    study = grammar_benchmark.STUDIES[arguments.study]
    config, rows, figures = grammar_benchmark.run(
        study, progress=lambda line: print(line, flush=True)
    )
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
