#!/usr/bin/env python
"""Measures the decode server's engine on the device at hand: JSON into results/, a table on stdout.

scripts/bench_serve.py gpu  Llama-3-8B's shape, random bfloat16 weights: latency between tokens and
                            energy a token by batch, prefill rate, host overhead
scripts/bench_serve.py gpu_quantised
                            a few batches with weights and cache in small forms, and without
scripts/bench_serve.py qwen3_30b_a3b, gpt_oss_20b
                            shapes with experts, the latter's packed (MXFP4): against the bytes of
                            the experts that a batch is expected to use
scripts/bench_serve.py cpu     SmolLM2-135M: tokens a second
scripts/bench_serve.py tiny, tiny_experts
                            tiny shapes, to try the script
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from jaxsys.results import table, write_result
from studies import serving as benchmark


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench_serve.py", description=__doc__)
    parser.add_argument("study", choices=benchmark.STUDIES)
    parser.add_argument("--forms", nargs="*", help="in place of the study's; weights+cache")
    parser.add_argument("--batches", nargs="*", type=int, help="of forms, in place of the study's")
    parser.add_argument("--prompts", nargs="*", type=int, help="likewise")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the JSON")
    arguments = parser.parse_args()
    study = benchmark.STUDIES[arguments.study]
    if arguments.forms is not None:
        study = dataclasses.replace(study, forms=tuple(arguments.forms))
    if arguments.batches is not None:
        study = dataclasses.replace(study, quantised_batches=tuple(arguments.batches))
    if arguments.prompts is not None:
        study = dataclasses.replace(study, quantised_prompts=tuple(arguments.prompts))
    path = arguments.out / f"serve_{arguments.study}.json"

    def kept(rows: list, figures: dict) -> None:
        """Writes what there is so far, after each row: a run may be cut off."""
        write_result(
            path,
            benchmark=f"serve_{arguments.study}",
            kind="measured",
            config=dataclasses.asdict(study),
            rows=rows,
            figures=figures,
        )

    rows = benchmark.run(study, progress=lambda line: print(line, flush=True), kept=kept)[1]
    print(table(rows))
    print(f"written to {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
