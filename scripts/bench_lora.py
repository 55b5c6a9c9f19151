#!/usr/bin/env python
"""Measures what low-rank adapters cost a batch: JSON into results/, a table on stdout.

scripts/bench_lora.py gpu    Llama-3-8B's shape, random bfloat16 weights, 64 requests
scripts/bench_lora.py tiny   a tiny shape, to try the script

Cases: nobody has an adapter, all or half have one, all have one of many in turn.
"""

import argparse
import sys
from pathlib import Path

from jaxsys.results import table, write_result
from studies import lora_costs


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/bench_lora.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", choices=lora_costs.STUDIES)
    parser.add_argument("--adapters", type=int, default=16, help="loaded (default: 16)")
    parser.add_argument("--rank", type=int, default=16, help="of each (default: 16)")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the JSON")
    arguments = parser.parse_args()
    config, rows, figures = lora_costs.run(
        lora_costs.STUDIES[arguments.study],
        adapters=arguments.adapters,
        rank=arguments.rank,
        progress=lambda line: print(line, flush=True),
    )
    path = write_result(
        arguments.out / f"lora_{arguments.study}.json",
        benchmark=f"lora_{arguments.study}",
        kind="measured",
        config=config,
        rows=rows,
        figures=figures,
    )
    print(table(rows))
    print(f"written to {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
