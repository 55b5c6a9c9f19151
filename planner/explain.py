"""Why a found plan wins, and what would change it, from predictions of its rivals."""

import dataclasses
from dataclasses import replace

from jaxsys.hardware import gib
from jaxsys.planner.evaluate import Evaluator
from jaxsys.planner.problem import Problem
from jaxsys.planner.recognise import describe, recognise
from jaxsys.planner.report import seconds
from jaxsys.planner.search import Found, Result

FACTORS = (0.8, 1.25, 0.5, 2.0, 0.25, 4.0, 0.1, 10.0)
RIVALS = 6


def rivals(result: Result) -> list[Found]:
    """The best plan of each name, best first."""
    best: dict[str, Found] = {}
    for found in result.by_base:
        best.setdefault(recognise(found.plan), found)
    return sorted(best.values(), key=lambda found: found.rank)


def table(result: Result, memory_bytes: float) -> str:
    """The best plan of each name."""
    lines = []
    for found in rivals(result):
        over = found.peak_bytes - memory_bytes
        fits = "fits" if over <= 1e-9 * memory_bytes else f"needs {gib(over)} more"
        lines.append(
            f"  {seconds(found.step_s):>10}  {gib(found.peak_bytes):>11}  "
            f"{found.sent_bytes / 1e9:8.2f} GB sent  {describe(found.plan)} ({fits})"
        )
    return "\n".join(lines)


def reasons(problem: Problem, result: Result) -> str:
    """One sentence why the best plan wins, and one what would change that."""
    best, name = result.best, recognise(result.best.plan)
    # A plan of another name may be as good, and stand before it.
    others = [f for f in rivals(result) if f.potential > 0 and recognise(f.plan) != name]
    waits = max(0.0, best.step_s - best.compute_s)
    text = (
        f"{describe(best.plan)}: {seconds(best.step_s)} a step, of which transfers and waiting "
        f"are {100 * waits / best.step_s:.1f} %"
    )
    fitting = [f for f in others if f.potential <= f.step_s * (1 + 1e-9)]
    if fitting:
        lag = fitting[0].step_s / best.step_s - 1
        text += (
            f"; the next that fits, {recognise(fitting[0].plan)}, takes {100 * lag:.1f} % longer"
        )
    quicker = [f for f in others if f.step_s < best.step_s]
    if quicker:
        text += f"; {recognise(quicker[0].plan)} would be faster with {gib(quicker[0].peak_bytes)}"
    return f"{text}. {_change(problem, best, others[:RIVALS])}"


def _change(problem: Problem, best: Found, others: list[Found]) -> str:
    for factor in FACTORS:
        scaled = replace(problem, cluster=_faster(problem, factor))
        evaluator = Evaluator(scaled)
        mine = evaluator.plan(best.plan).potential(problem.memory_bytes)[0]
        for other in others:
            value = evaluator.plan(other.plan).potential(problem.memory_bytes)[0]
            if value < mine * (1 - 1e-3):
                return (
                    f"With links {factor:g} times as fast {recognise(other.plan)} would take its "
                    "place."
                )
    return "Links from a tenth to ten times the speed would not change that."


def _faster(problem: Problem, factor: float):
    cluster = problem.cluster

    links = {name: getattr(cluster, name) for name in ("link", "node_link", "pod_link")}
    return dataclasses.replace(
        cluster, **{name: link and link.faster(factor) for name, link in links.items()}
    )
