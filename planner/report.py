"""A comparison as people read it: a table, a verdict with its reason, and versioned JSON."""

import math
from typing import Any

import jaxsys
from jaxsys.hardware import GIB, gib
from jaxsys.planner.named import Comparison, Row

FORMAT = "jaxsys-comparison"
FORMAT_VERSION = 1


def table(comparison: Comparison) -> str:
    """The rows, fastest first, those that do not fit last."""
    best = comparison.best
    head = ("", "strategy", "recompute", "step", "MFU", "memory", "sent", "tokens/s", "fits")
    lines: list[tuple[str, ...]] = [head]
    for row in sorted(comparison.rows, key=lambda r: (not r.fits, r.step_s)):
        lines.append(
            (
                "*" if row is best else "",
                row.strategy,
                row.recompute,
                seconds(row.step_s),
                f"{100 * row.mfu:.1f} %",
                gib(row.memory_bytes),
                f"{row.sent_bytes / 1e9:.2f} GB",
                f"{row.tokens_per_s:,.0f}",
                "yes" if row.fits else f"no, +{gib(row.memory_bytes - comparison.memory_bytes)}",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    left = {0, 1, 2, 8}
    text = [
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    for why in dict.fromkeys(why for _, why in comparison.refused):
        names = ", ".join(name for name, reason in comparison.refused if reason == why)
        text.append(f"   {names}: not legal here: {why}")
    return "\n".join(text)


def verdict(comparison: Comparison) -> str:
    """One sentence: which to take and why, or what memory it would need."""
    best = comparison.best
    if best is None:
        lean = min(comparison.rows, key=lambda row: row.memory_bytes)
        return (
            f"Nothing fits {gib(comparison.memory_bytes)} per device: the leanest, "
            f"{lean.strategy} with recompute {lean.recompute}, needs {gib(lean.memory_bytes)}."
        )
    others = sorted(
        (
            row
            for row in comparison.rows
            # A search often finds the best strategy itself.
            if row.fits and row is not best and not (row.found and _as_good(row, best))
        ),
        key=lambda r: r.step_s,
    )
    text = (
        f"Take {best.strategy} (recompute {best.recompute}): {seconds(best.step_s)} a step, of "
        f"which transfers and waiting are {100 * best.waits_s / best.step_s:.1f} %"
    )
    if others:
        second = others[0]
        lag = second.step_s / best.step_s - 1
        text += f"; next is {second.strategy}, {100 * lag:.1f} % slower, {_reason(second, best)}"
    faster = [row for row in comparison.rows if not row.fits and row.step_s < best.step_s]
    if faster:
        row = min(faster, key=lambda r: r.step_s)
        text += (
            f"; {row.strategy} would take {seconds(row.step_s)} but needs {gib(row.memory_bytes)}"
        )
    if best.found:
        text += "; --plan FILE searches on and writes it for `jaxsys train --schedule FILE`"
    return text + "."


def as_json(comparison: Comparison, answer: str, *, request: dict[str, Any]) -> dict[str, Any]:
    """The comparison as a JSON value, with the answer that was given and the request for it."""
    best = comparison.best
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "jaxsys": jaxsys.__version__,
        "kind": "simulated",
        "request": request,
        "memory_limit_gib": limit_gib(comparison.memory_bytes),
        "best": best.strategy if best else None,
        "verdict": answer,
        "rows": [row_json(row) for row in comparison.rows],
        "refused": [{"strategy": name, "reason": why} for name, why in comparison.refused],
    }


def limit_gib(memory_bytes: float) -> float | None:
    """A limit as JSON has it: None if there is none."""
    return None if math.isinf(memory_bytes) else memory_bytes / GIB


def row_json(row: Row) -> dict[str, Any]:
    """One row, flat."""
    return {
        "strategy": row.strategy,
        "recompute": row.recompute,
        "chunks": row.chunks,
        "step_s": row.step_s,
        "compute_s": row.compute_s,
        "mfu": row.mfu,
        "memory_gib": row.memory_bytes / GIB,
        "sent_gb": row.sent_bytes / 1e9,
        "tokens_per_s": row.tokens_per_s,
        "fits": row.fits,
    }


def seconds(time_s: float) -> str:
    """A time in the unit that suits it."""
    if time_s >= 1:
        return f"{time_s:.3f} s"
    return f"{1e3 * time_s:.2f} ms" if time_s >= 1e-3 else f"{1e6 * time_s:.1f} us"


def _reason(second: Row, best: Row) -> str:
    """Where the runner-up loses its time: what it does longer, and by how much."""
    if _as_good(second, best):
        return "which is as good as equal"
    more_compute = second.compute_s - best.compute_s
    if more_compute >= 0.5 * (second.step_s - best.step_s):
        if second.recompute != best.recompute:
            return f"because fitting it costs recompute {second.recompute}"
        return f"because its busiest device computes {seconds(more_compute)} longer"
    more_waiting = seconds(second.waits_s - best.waits_s)
    text = f"because transfers and waiting take {more_waiting} more of its busiest device"
    if second.sent_bytes > 1.05 * best.sent_bytes:
        sent, against = second.sent_bytes / 1e9, best.sent_bytes / 1e9
        text += f", with {sent:.3g} GB sent against {against:.3g} GB"
    return text


def _as_good(row: Row, best: Row) -> bool:
    return row.step_s - best.step_s < 5e-4 * best.step_s
