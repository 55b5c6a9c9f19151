"""Pictures of the energy studies, each drawn from its JSON file alone and saved beside it."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from jaxsys.serve.simulation.replay_plots import COLOURS


def _load(path: Path) -> dict[str, Any]:
    return json.loads(Path(path).read_text())


def _save(figure: Any, path: Path) -> Path:
    target = Path(path).with_suffix(".png")
    if figure.get_layout_engine() is None:
        figure.tight_layout()
    figure.savefig(target, dpi=120)
    plt.close(figure)
    return target


def draw_calibration(path: Path) -> Path:
    """Published and simulated static runs of each line: energy, and both attainments."""
    record = _load(path)
    datasets = list(dict.fromkeys(row["dataset"] for row in record["rows"]))
    figure, axes = plt.subplots(len(datasets), 2, figsize=(11, 3.6 * len(datasets)), squeeze=False)
    for line, dataset in zip(axes, datasets, strict=True):
        for axis, key, label, scale in (
            (line[0], "energy_j", "energy of the run (1e5 J)", 1e-5),
            (line[1], "ttft_attainment_pct", "TTFT within 600 ms (%)", 1.0),
        ):
            for clock, colour in ((1410, "#d62728"), (1005, "#1f77b4")):
                for fit, style in (("both lines", "-"), ("the other line", ":")):
                    rows = [
                        row
                        for row in record["rows"]
                        if (row["dataset"], row["fitted_to"], row["clock_mhz"])
                        == (dataset, fit, clock)
                    ]
                    axis.plot(
                        [row["rate_per_s"] for row in rows],
                        [row[key] * scale for row in rows],
                        style,
                        color=colour,
                        label=f"{clock} MHz, fitted to {fit}",
                    )
                known = [row for row in rows if row[f"published_{key}"] is not None]
                axis.plot(
                    [row["rate_per_s"] for row in known],
                    [row[f"published_{key}"] * scale for row in known],
                    "o",
                    color=colour,
                    label=f"{clock} MHz, published",
                )
            axis.set_title(dataset, fontsize=9)
            axis.set_xlabel("requests a second")
            axis.set_ylabel(label)
            axis.set_ylim(bottom=0)
    axes[0][0].legend(fontsize=7)
    figure.suptitle(record["config"]["scenario"], fontsize=10)
    return _save(figure, path)


def draw_published(path: Path) -> Path:
    """What of the headroom is saved at the published rates, and the attainment lost for it."""
    record = _load(path)
    datasets = list(dict.fromkeys(row["dataset"] for row in record["rows"]))
    figure, axes = plt.subplots(
        2, len(datasets), figsize=(5.5 * len(datasets), 7), squeeze=False, layout="constrained"
    )
    for column, dataset in enumerate(datasets):
        rows = [row for row in record["rows"] if row["dataset"] == dataset]
        for arrivals, style in (
            ("Poisson", "o-"), ("bursty", "^--"), ("held out", "s:"), ("held out, bursty", "v:"),
        ):  # fmt: skip
            some = [row for row in rows if row["arrivals"] == arrivals]
            rates = [row["rate_per_s"] for row in some]
            for name in ("both", "cap-250", "ahead", "eco"):
                drawn = [(x, row["policies"].get(name)) for x, row in zip(rates, some, strict=True)]
                drawn = [(x, policy) for x, policy in drawn if policy is not None]
                if not drawn or (name not in ("ahead", "eco") and arrivals != "Poisson"):
                    continue
                for place, key in ((0, "headroom_pct"), (1, "lost_points")):
                    axes[place][column].plot(
                        [x for x, _ in drawn],
                        [policy[key] for _, policy in drawn],
                        style,
                        color=COLOURS.get(name, "#c49a6c"),
                        label=f"{name}, {arrivals}",
                    )
        known = [row for row in rows if row["arrivals"] == "Poisson"]
        axes[0][column].plot(
            [row["rate_per_s"] for row in known],
            [row["published_headroom_pct"] for row in known],
            "kx--",
            label="published controller",
        )
        axes[0][column].set_title(dataset, fontsize=9)
        axes[0][column].set_ylabel("saved, % of the headroom")
        axes[1][column].set_ylabel("attainment lost (points)")
        axes[1][column].axhline(0.5, color="k", lw=0.8, ls=":")
        axes[1][column].set_xlabel("requests a second")
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7
    )
    figure.suptitle("Llama-3-8B on 2P2D simulated A100", fontsize=10)
    return _save(figure, path)


def draw_matrix(path: Path) -> Path:
    """Saving of the full policy and of the static sweet spot, case by case, attainment beside."""
    record = _load(path)
    rows = record["rows"]
    labels = [
        f"{row['gpu'].split('-')[0]} {row['model'].removeprefix('llama-3-')} {row['trace']} "
        f"{row['load']:g} {row['instances']}"
        for row in rows
    ]
    figure, axes = plt.subplots(1, 2, figsize=(13, 1.5 + 0.24 * len(rows)), sharey=True)
    places = range(len(rows))
    for name, marker in (("sweet-spot", "s"), ("both", "o"), ("eco", "^"), ("ahead", "D")):
        axes[0].plot(
            [row["policies"][name]["energy_saving_pct"] for row in rows],
            places,
            marker,
            ms=4,
            color=COLOURS[name],
            label=name,
        )
    for name, marker in (("max", "|"), ("sweet-spot", "s"), ("ahead", "D")):
        axes[1].plot(
            [
                min(
                    row["policies"][name]["ttft_attainment_pct"],
                    row["policies"][name]["itl_attainment_pct"],
                )
                for row in rows
            ],
            places,
            marker,
            ms=8 if marker == "|" else 4,
            color=COLOURS[name],
            label=name,
        )
    axes[0].set_yticks(places, labels, fontsize=7)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("energy saved against maximum clock (%)")
    axes[1].set_xlabel("lesser of TTFT and ITL attainment (%)")
    for axis in axes:
        axis.grid(axis="x", alpha=0.3)
        axis.legend(fontsize=7)
    figure.suptitle(
        "GPU, model, trace, load (share of capacity), instances; simulated", fontsize=10
    )
    return _save(figure, path)


def draw_ablation(path: Path) -> Path:
    """Saving and attainment of each variation."""
    record = _load(path)
    rows = record["rows"]
    labels = [f"{row['study']}: {row['value']}" for row in rows]
    figure, axes = plt.subplots(1, 2, figsize=(12, 1.5 + 0.27 * len(rows)), sharey=True)
    places = range(len(rows))
    axes[0].barh(places, [row["energy_saving_pct"] for row in rows], color="#2ca02c")
    axes[0].axvline(rows[0]["energy_saving_pct"], color="k", lw=0.8, ls=":")
    for key, marker, label in (
        ("ttft_attainment_pct", "o", "TTFT"),
        ("itl_attainment_pct", "D", "ITL"),
    ):
        axes[1].plot([row[key] for row in rows], places, marker, ms=5, label=label)
    axes[1].axvline(
        rows[0]["max_ttft_attainment_pct"], color="k", lw=0.8, ls=":", label="TTFT, max"
    )
    axes[0].set_yticks(places, labels, fontsize=8)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("energy saved against maximum clock (%)")
    axes[1].set_xlabel("attainment (%)")
    axes[1].legend(fontsize=8)
    figure.suptitle(record["config"]["scenario"], fontsize=10)
    return _save(figure, path)
