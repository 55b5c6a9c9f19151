#!/usr/bin/env python
"""Draws results/serve_gpu.json: latency and energy a token against batch, with the floor.

scripts/plot_serve.py [--result FILE] [--out PNG]
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from jaxsys.results import read_result


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/plot_serve.py", description=__doc__)
    parser.add_argument("--result", type=Path, default=Path("results/serve_gpu.json"))
    parser.add_argument("--out", type=Path, default=Path("docs/serving_h100.png"))
    arguments = parser.parse_args()
    result = read_result(arguments.result)
    rows = [
        row for row in result["rows"] if row["study"] == "decode" and row["weights"] == "bfloat16"
    ]
    batch = [row["batch"] for row in rows]
    figure, (latency, energy) = plt.subplots(1, 2, figsize=(11, 4.2))
    for bucket in sorted({row["bucket"] for row in rows}):
        latency.axvline(bucket, color="0.88", linewidth=1, zorder=0)
    latency.plot(batch, [row["itl_ms"] for row in rows], "o-", label="measured, median")
    latency.plot(
        batch, [row["itl_floor_ms"] for row in rows], "--", color="0.4", label="floor: bytes / rate"
    )
    latency.set(xlabel="batch", ylabel="time between tokens [ms]", xscale="log", ylim=0)
    latency.legend()
    latency.set_title("steps up where a bucket (grey line) is left")
    energy.plot(batch, [row["energy_j_per_token"] for row in rows], "o-", color="tab:green")
    energy.set(xlabel="batch", ylabel="energy a token [J]", xscale="log", yscale="log")
    energy.set_title("by the GPU's energy counter, default clocks")
    for axes in (latency, energy):
        axes.set_xticks([1, 4, 16, 64, 256], ["1", "4", "16", "64", "256"])
        axes.minorticks_off()
    config = result["config"]
    gpu = result["hardware"]["gpus"][0].split(",")[0]
    figure.suptitle(
        f"{config['model']}, {config['dtype']}, contexts of {config['context']} tokens "
        f"(fewer over batch 257) on one {gpu}"
    )
    figure.tight_layout()
    figure.savefig(arguments.out, dpi=110)
    print(f"written to {arguments.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
