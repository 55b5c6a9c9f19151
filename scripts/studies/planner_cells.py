"""Predicted against measured: whole training steps of many plans on this machine's devices.

A cell is a plan at a sequence length: its step is predicted from a profile of the same devices and
link, then compiled and run with Adam. Cells measured before are kept, so that a long measurement
may be taken in several calls.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxsys.axes import RING
from jaxsys.hardware import GIB
from jaxsys.lowering import lower_sharded
from jaxsys.model import abstract_parameters, initial_parameters, layered
from jaxsys.model.config import DecoderConfig
from jaxsys.planner.cluster import Cluster
from jaxsys.planner.costs import Precision
from jaxsys.planner.estimates import POLICY
from jaxsys.planner.evaluate import Evaluator
from jaxsys.planner.lower import to_schedule
from jaxsys.planner.plans import Gradient, LayerPath, Plan, Residual, State, Weights
from jaxsys.planner.problem import Problem
from jaxsys.planner.recognise import recognise
from jaxsys.planner.workload import decoder_workload
from studies.compiled import program_bytes
from studies.timing import compiled_together

LINKS: dict[str, dict[str, str]] = {
    "direct": {},
    "host": {"NCCL_P2P_DISABLE": "1"},
    "sockets": {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_IB_DISABLE": "1"},
}
"""What joins GPUs -> NCCL's settings for it, to be set before JAX starts."""
KINDS: tuple[tuple[Weights, Gradient], ...] = (
    (Weights.STAY, Gradient.ONCE),
    (Weights.STAY, Gradient.EACH),
    (Weights.REFETCH, Gradient.EACH),
    (Weights.BETWEEN, Gradient.EACH),
    (Weights.BETWEEN, Gradient.DEFERRED),
)
FLOAT32 = "float32"
SHORT, LONG = 4, 16
"""Microbatches a device: for predictions, and for the gain of ZeRO-3.5 and ZeRO-4."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One plan at one length."""

    tokens: int
    turns: int
    """Microbatches a device."""
    plan: Plan
    gradients: str = FLOAT32
    """In what they are summed and sent."""

    @property
    def name(self) -> str:
        """Its key among results."""
        path = self.plan.layers[0]
        name = f"{self.tokens} tokens, {self.turns} turns, {path}, ahead {self.plan.lookahead}"
        return name if self.gradients == FLOAT32 else f"{name}, {self.gradients} gradients"


def cells(
    devices: int, layers: int, lengths: tuple[int, ...], gradients: str = FLOAT32
) -> Iterator[Cell]:
    """Five strategies by recompute and length, then four of them with many microbatches.

    The latter gather one tick ahead and two: ZeRO-3 must be a prefetching one. On one device
    nothing is split: recompute, length and the number of microbatches are all there is.
    """

    def cell(tokens: int, turns: int, path: LayerPath, ahead: int) -> Cell:
        plan = Plan(shard=devices, state=State.SPLIT, lookahead=ahead, layers=(path,) * layers)
        return Cell(tokens=tokens, turns=turns, plan=plan, gradients=gradients)

    if devices == 1:
        for turns, tokens, residual in itertools.product((SHORT, LONG), lengths, Residual):
            path = LayerPath(weights=Weights.STAY, gradient=Gradient.ONCE, residual=residual)
            yield cell(tokens, turns, path, 1)
        return
    for tokens in lengths:
        for weights, gradient in KINDS[1:]:
            path = LayerPath(weights=weights, gradient=gradient, residual=Residual.KEEP)
            for ahead in (1, 2):
                yield cell(tokens, LONG, path, ahead)
        for residual in Residual:
            for weights, gradient in KINDS:
                path = LayerPath(weights=weights, gradient=gradient, residual=residual)
                yield cell(tokens, SHORT, path, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """A cell's step, ready to run."""

    row: dict[str, Any]
    """What is known before it runs."""
    program: Any
    start: Callable[[], tuple[Any, Any, Any]]
    """Makes parameters, the optimizer's state, and the batch."""


def cell_problem(cell: Cell, config: DecoderConfig, cluster: Cluster) -> Problem:
    """What a cell's plan is a plan for."""
    return Problem(
        workload_of=lambda size: decoder_workload(
            "bench", config, sequence_length=cell.tokens, microbatch_size=size
        ),
        cluster=cluster,
        batch=cell.turns * cluster.devices,
        memory_bytes=cluster.device.memory_bytes,
        precision=Precision(gradient_bytes=jnp.dtype(cell.gradients).itemsize),
    )


def predicted_again(
    rows: list[dict[str, Any]], config: DecoderConfig, cluster: Cluster
) -> list[dict[str, Any]]:
    """Measured rows with what is predicted of this cluster, the first step time beside it."""
    lengths = tuple({row["tokens"] for row in rows})
    known = {
        cell.name: cell
        for gradients in {row.get("gradients", FLOAT32) for row in rows}
        for cell in cells(cluster.devices, config.num_layers, lengths, gradients)
    }
    found = []
    for row in rows:
        cell = known[row["cell"]]
        estimates = Evaluator(cell_problem(cell, config, cluster)).plan(cell.plan)
        predicted, peak_gib = float(estimates.step_s[0]), float(estimates.peak_bytes[0]) / GIB
        found.append(
            row
            | {
                "first_predicted_s": row.get("first_predicted_s", row["predicted_s"]),
                "predicted_s": predicted,
                "error_pct": 100 * (predicted / row["measured_s"] - 1),
                "predicted_gib": peak_gib,
                "memory_error_pct": 100 * (peak_gib / row["measured_gib"] - 1),
            }
        )
    return found


def compile_cell(cell: Cell, config: DecoderConfig, cluster: Cluster, mesh: Mesh) -> Compiled:
    """Predicts a step and compiles it, from shapes alone.

    Args:
        cell: plan and length.
        config: the model.
        cluster: of predictions.
        mesh: devices; for memory alone they need not be here (`jaxsys.mesh.devices_ahead`).
    """
    devices = mesh.shape[RING]
    problem = cell_problem(cell, config, cluster)
    predicted = Evaluator(problem).plan(cell.plan)
    step = lower_sharded(
        to_schedule(problem, cell.plan),
        layered(config),
        mesh,
        compute_dtype=jnp.bfloat16,
        gradient_dtype=jnp.dtype(cell.gradients),
        recompute=POLICY[cell.plan.layers[0].residual],
    )
    optimizer = optax.adam(1e-4)

    def train(parameters: Any, state: Any, batch: Any) -> Any:
        found = step.loss_and_gradients(parameters, batch)
        gradients: Any = found.gradients
        updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, found.loss

    shape = (cell.turns * devices, 1, cell.tokens)
    names = ("inputs", "targets")

    def begin() -> tuple[Any, Any, Any]:
        parameters: Any = step.to_rest(initial_parameters(config))
        state = optimizer.init(parameters)  # in a jit it would not be sharded
        # Not one token over and over: its row's gradient would be a queue.
        tokens = jax.random.randint(jax.random.key(0), shape, 0, config.vocab_size)
        return parameters, state, dict.fromkeys(names, tokens)

    rest = jax.eval_shape(step.to_rest, abstract_parameters(config))
    parameters = jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place),
        rest,
        step.rest_shardings(rest),
    )
    state = optax.tree_utils.tree_map_params(
        optimizer, lambda _, p: p, jax.eval_shape(optimizer.init, parameters), parameters
    )
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in names}
    start = time.perf_counter()
    program = (
        jax.jit(train, donate_argnums=(0, 1))
        .lower(parameters, state, batch)
        .compile(compiler_options=step.compiler_options)
    )
    taken = program_bytes(program)
    peak = float(predicted.peak_bytes[0])
    row = {
        "cell": cell.name,
        "strategy": recognise(cell.plan),
        "recompute": POLICY[cell.plan.layers[0].residual],
        "tokens": cell.tokens,
        "turns": cell.turns,
        "lookahead": cell.plan.lookahead,
        "gradients": cell.gradients,
        "measured_gib": taken / GIB,
        "predicted_gib": peak / GIB,
        "memory_error_pct": 100 * (peak / taken - 1),
        "compile_s": time.perf_counter() - start,
        "predicted_s": float(predicted.step_s[0]),
    }
    return Compiled(row=row, program=program, start=begin)


def compile_cells(
    wanted: list[Cell], compile_one: Callable[[Cell], Compiled], jobs: int
) -> dict[str, Compiled]:
    """Cells by name, compiled several at a time."""
    return {one.row["cell"]: one for one in compiled_together(compile_one, wanted, jobs)}


def run_cell(compiled: Compiled, *, repeats: int) -> dict[str, Any]:
    """Runs a compiled step and returns the result's row."""
    parameters, state, batch = compiled.start()
    samples = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        parameters, state, loss = compiled.program(parameters, state, batch)
        jax.block_until_ready(loss)
        samples.append(time.perf_counter() - start)
    seconds = statistics.median(samples[1:])
    return compiled.row | {
        "measured_s": seconds,
        "fastest_s": min(samples[1:]),
        "error_pct": 100 * (compiled.row["predicted_s"] / seconds - 1),
    }


def unmeasured(wanted: list[Cell], rows: list[dict[str, Any]]) -> list[Cell]:
    """The cells that no row is there for."""
    done = {row["cell"] for row in rows}
    return [cell for cell in wanted if cell.name not in done]


def measure(
    wanted: list[Cell],
    rows: list[dict[str, Any]],
    run: Callable[[Cell], dict[str, Any]],
    *,
    seconds: float,
    save: Callable[[list[dict[str, Any]]], None],
) -> int:
    """Runs the cells that no row is there for, and saves after each.

    Args:
        wanted: all cells.
        rows: what has been measured; added to.
        run: measures one cell.
        seconds: start no further cell after this long.
        save: called with all rows.

    Returns:
        How many cells are left.
    """
    start = time.monotonic()
    left = unmeasured(wanted, rows)
    while left and time.monotonic() - start < seconds:
        rows.append(run(left.pop(0)))
        save(rows)
    return len(left)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Errors over all cells, whether the best predicted is the best, and the gains measured."""
    found: dict[str, Any] = {
        "cells": len(rows),
        "median_memory_error_pct": statistics.median(abs(row["memory_error_pct"]) for row in rows),
    }
    if "error_pct" not in rows[0]:  # compiled alone
        return found
    found["median_error_pct"] = statistics.median(abs(row["error_pct"]) for row in rows)
    first = [row for row in rows if "first_predicted_s" in row]
    if first:
        found["median_first_error_pct"] = statistics.median(
            100 * abs(row["first_predicted_s"] / row["measured_s"] - 1) for row in first
        )
    groups: dict[tuple[int, int, str], list[dict[str, Any]]] = {}
    for row in rows:
        key = row["tokens"], row["turns"], row.get("gradients", FLOAT32)
        groups.setdefault(key, []).append(row)
    behind, gains = [], []
    for (tokens, turns, gradients), group in sorted(groups.items()):
        chosen = min(group, key=lambda row: row["predicted_s"])
        best = min(row["measured_s"] for row in group)
        behind.append(100 * (chosen["measured_s"] / best - 1))
        if turns == LONG:
            gains.append({"tokens": tokens, "gradients": gradients, **_gains(group)})
    found["chosen_behind_best_pct"] = max(behind)
    return {**found, "gains": gains}


def _gains(group: list[dict[str, Any]]) -> dict[str, float]:
    """Speed over ZeRO-3 and memory under ZeRO-2, each at its better lookahead."""

    def best(name: str, what: str) -> float | None:
        return min((row[what] for row in group if row["strategy"] == name), default=None)

    found = {}
    for name in ("zero-3.5", "zero-4"):
        for kind in ("measured", "predicted"):
            base, mine = best("zero-3", f"{kind}_s"), best(name, f"{kind}_s")
            if base and mine:
                found[f"{name}_{kind}_speedup_over_zero_3"] = base / mine
            held, less = best("zero-2", f"{kind}_gib"), best(name, f"{kind}_gib")
            if held and less:
                found[f"{name}_{kind}_memory_below_zero_2_pct"] = 100 * (1 - less / held)
    return found
