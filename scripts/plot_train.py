#!/usr/bin/env python
"""Draws training on one GPU: steps by kind, of results/train_step_*.json, and the curves of runs.

scripts/plot_train.py [--results FOLDER] [--out PNG] [--curves PNG]
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from jaxsys.results import read_result


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/plot_train.py", description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--out", type=Path, default=Path("docs/train_gpu.png"))
    parser.add_argument("--curves", type=Path, default=Path("docs/train_python.png"))
    arguments = parser.parse_args()
    bars: dict[str, list[tuple[float, str, str]]] = {}
    for path in sorted(arguments.results.glob("train_step_*.json")):
        result = read_result(path)
        layers = "written out" if result["config"]["unroll"] else "looped"
        for row in result["rows"]:
            if row["devices"] == 1 and "failed" not in row:
                what = f"{row['schedule']}, {layers}, {row['recompute']}, "
                what += f"{row['sequence_length'] // 1024}K"
                gpu = result["hardware"]["gpus"][0].split(",")[0]
                bars.setdefault(gpu, []).append(
                    (row["model_tflops_per_gpu"], what, row["schedule"])
                )
    most = max(map(len, bars.values()))
    figure, axes = plt.subplots(
        1, len(bars), figsize=(7 * len(bars), 0.8 + 0.32 * most), sharex=True, squeeze=False
    )
    for axis, (gpu, found) in zip(axes[0], sorted(bars.items()), strict=True):
        found.sort()
        colours = ["tab:blue" if name != "gspmd-fsdp" else "0.6" for _, _, name in found]
        drawn = axis.barh(range(len(found)), [value for value, _, _ in found], color=colours)
        axis.bar_label(drawn, fmt="%.0f", padding=3)
        axis.margins(x=0.1)
        axis.set_yticks(range(len(found)), [what for _, what, _ in found])
        axis.set_xlabel("model TFLOP/s; recomputation not counted; grey: plain jax.jit")
        axis.set_title(f"one {gpu}: schedule, layers, recompute, tokens", size=10)
    figure.tight_layout()
    figure.savefig(arguments.out, dpi=110, bbox_inches="tight")
    print(f"written to {arguments.out}")
    draw_curves(arguments.results, arguments.curves)
    print(f"written to {arguments.curves}")
    return 0


def draw_curves(results: Path, out: Path) -> None:
    """Losses of the runs that are kept, each point a mean over some steps."""
    runs = [
        read_result(results / name) for name in ("train_python.json", "train_smollm2_lora.json")
    ]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    for axis, run, what in zip(
        axes, runs, ("bytes, 75 M parameters from scratch", "SmolLM2-135M, adapters"), strict=True
    ):
        axis.plot(
            [r["step"] for r in run["rows"]], [r["loss"] for r in run["rows"]], label="training"
        )
        held = [v for v in (run.get("held_out_loss_before"), run["held_out_loss"]) if v]
        at = [0, run["rows"][-1]["step"]][-len(held) :]
        axis.plot(at, held, "o", color="tab:red", label="held out")
        axis.set_title(f"Python's standard library: {what}", size=9)
        axis.set_xlabel("step")
        axis.set_ylabel("nats a token")
        axis.set_ylim(bottom=0)
        axis.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    raise SystemExit(main())
