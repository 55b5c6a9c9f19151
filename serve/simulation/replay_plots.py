"""Pictures of a replay, drawn from its JSON file alone."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {
    "max": "#4d4d4d",
    "sweet-spot": "#8c8c8c",
    "window": "#c49a6c",
    "ecofreq": "#1f77b4",
    "ecoroute": "#9467bd",
    "both": "#2ca02c",
    "both-energy": "#17becf",
    "eco": "#e377c2",
    "ahead": "#d62728",
}


def draw(path: str | Path) -> list[Path]:
    """Draws overview, clocks and, where it was sampled, the course over time; returns the files."""
    path = Path(path)
    record = json.loads(path.read_text())
    drawn = [_overview(record, path.parent / "replay_overview.png")]
    drawn.append(_clocks(record, path.parent / "replay_clocks.png"))
    if all("series" in row for row in record["policies"].values()):
        drawn.append(_course(record, path.parent / "replay_course.png"))
    return drawn


def _title(record: dict[str, Any]) -> str:
    config = record["config"]
    mark = " (extrapolated preset)" if config["extrapolated"] else ""
    return (
        f"{config['model']} on {config['prefill_instances']}P{config['decode_instances']}D "
        f"simulated {config['simulated_gpu']}{mark}, {config['trace']}, "
        f"{config['requests']} requests at {config['rate_per_s'] or 0:.2f}/s"
    )


def _overview(record: dict[str, Any], path: Path) -> Path:
    rows, config = record["policies"], record["config"]
    names = list(rows)
    colours = [COLOURS.get(name, "#1f77b4") for name in names]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    panels = (
        ("energy_j_per_token", "energy per output token (J), idle included"),
        ("ttft_attainment_pct", f"TTFT within {config['slo_ttft_ms']:.0f} ms (%)"),
        ("itl_attainment_pct", f"ITL within {config['slo_itl_ms']:.0f} ms (%)"),
    )
    for axis, (key, label) in zip(axes, panels, strict=True):
        values = [rows[name][key] for name in names]
        bars = axis.bar(range(len(names)), values, color=colours)
        axis.set_xticks(range(len(names)), names, rotation=35, ha="right")
        axis.set_ylabel(label)
        texts = [f"{value:.3g}" for value in values]
        if key == "energy_j_per_token":
            texts = [f"{rows[name]['energy_saving_pct']:+.1f} %" for name in names]
            axis.set_title("saving against max above each bar", fontsize=9)
        axis.bar_label(bars, texts, fontsize=8)
        axis.margins(y=0.12)
    figure.suptitle(_title(record), fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _clocks(record: dict[str, Any], path: Path) -> Path:
    rows = record["policies"]
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), sharey=True)
    clocks = sorted(
        {
            int(mhz)
            for row in rows.values()
            for role in row["clock_seconds"].values()
            for mhz in role
        }
    )
    shades = plt.get_cmap("viridis")
    for axis, role in zip(axes, ("prefill", "decode"), strict=True):
        left = [0.0] * len(rows)
        for index, mhz in enumerate(clocks):
            shares = []
            for row in rows.values():
                seconds = row["clock_seconds"][role]
                total = sum(seconds.values()) or 1.0
                shares.append(100 * seconds.get(str(mhz), 0.0) / total)
            axis.barh(
                range(len(rows)),
                shares,
                left=left,
                color=shades(index / max(1, len(clocks) - 1)),
                label=f"{mhz} MHz",
            )
            left = [a + b for a, b in zip(left, shares, strict=True)]
        axis.set_yticks(range(len(rows)), list(rows))
        axis.invert_yaxis()
        axis.set_xlabel(f"share of busy time, {role} instances (%)")
    axes[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    figure.suptitle(_title(record), fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _course(record: dict[str, Any], path: Path) -> Path:
    rows = record["policies"]
    panels = (
        ("power_w", "power of all GPUs (W)"),
        ("decode_clock_mhz", "mean decode clock (MHz)"),
        ("decode_batch", "sequences decoding"),
    )
    figure, axes = plt.subplots(len(panels), 1, figsize=(11, 7), sharex=True)
    for axis, (key, label) in zip(axes, panels, strict=True):
        for name, row in rows.items():
            series = row["series"]
            axis.plot(series["time_s"], series[key], label=name, lw=0.9, color=COLOURS.get(name))
        axis.set_ylabel(label)
    axes[0].legend(ncols=4, fontsize=8)
    axes[-1].set_xlabel("time of the trace (s)")
    figure.suptitle(_title(record), fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
