"""A step that cannot fit is refused before it is compiled, and told what would fit."""

import math
import os
import runpy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import pallas as pl

from jaxsys.context import ContextSplit
from jaxsys.errors import UsageError
from jaxsys.hardware import free_host_bytes
from jaxsys.lowering import Recompute
from jaxsys.lowering.liveness import peak_bytes
from jaxsys.lowering.programs import MADE_AGAIN
from jaxsys.model import abstract_parameters, initial_parameters, layered, preset
from jaxsys.model.pieces import PIECE_TOKENS, pieces_of
from jaxsys.results import read_result
from jaxsys.schedule import TaskKind
from jaxsys.train import Trainer, memory
from jaxsys.train.at_rest import StateAtRest
from jaxsys.train.memory import StepShape, step_bytes
from jaxsys.train.schedules import resolve

TOKENS = 64
ROOT = Path(__file__).parents[2]
SHAPES = runpy.run_path(str(ROOT / "scripts/shapes.py"))["SHAPES"]


def trainer_of(
    schedule: str,
    memory_gib: float | None = None,
    recompute: Recompute = "none",
    members: int = 1,
):
    config = preset("byte-llama")
    return Trainer(
        layered(config),
        initial_parameters(config),
        optax.adam(1e-3),
        schedule=schedule,
        devices=2,
        members=members,
        microbatches=4,
        recompute=recompute,
        memory_gib=memory_gib,
    )


def microbatch(size: int = 8):
    ids = jax.ShapeDtypeStruct((size, TOKENS), jnp.int32)
    return {"inputs": ids, "targets": ids}


def batch(rows: int = 4, size: int = 8):
    return {name: np.zeros((rows, size, TOKENS), np.int32) for name in ("inputs", "targets")}


def test_refused_before_compiling_with_what_would_fit():
    trainer = trainer_of("dp", memory_gib=0.07)
    start = time.monotonic()
    with pytest.raises(UsageError, match="predicted to need 0.* of 0.07 GiB") as caught:
        trainer.step(batch())
    assert time.monotonic() - start < 20
    text = str(caught.value)
    assert "what would fit: recompute" in text
    assert "go on anyway with memory_gib=inf" in text
    # And what is named is let through to the compiler.
    name = text.split("what would fit: recompute ")[1].split()[0]
    lean = trainer_of("dp", memory_gib=0.07, recompute="block" if name == "block" else "selective")
    lean._check_memory(microbatch())


def test_nothing_would_fit_and_going_on_anyway():
    with pytest.raises(UsageError, match="nothing tried would fit, the least"):
        trainer_of("zero-3", memory_gib=0.012).step(batch())
    with pytest.raises(UsageError, match="memory_gib=nan must be above 0"):
        trainer_of("dp", memory_gib=math.nan)
    trainer_of("dp", memory_gib=math.inf)._check_memory(microbatch())


class Making(Exception):
    """Parameters would be made now."""


def large(microbatch=None, memory_gib: float | None = None):
    config = preset("llama-3-8b")
    return Trainer(
        layered(config),
        lambda: initial_parameters(config),
        optax.adam(1e-3),
        schedule="zero-3",
        devices=2,
        microbatch=microbatch,
        memory_gib=memory_gib,
    )


def test_what_the_host_cannot_hold_is_refused_before_anything_is_made(monkeypatch):
    def making(*_):
        raise Making

    monkeypatch.setattr(StateAtRest, "initial", making)
    devices = jax.local_device_count()
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 20.0 * 2**30)
    text = rf"GiB a device, of {20 / devices:.3g} GiB \(20 GiB free on this host, for {devices} dev"
    with pytest.raises(
        UsageError, match=f"parameters and optimizer state of zero-3 take 44.9 {text}"
    ):
        large()
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 45.0 * 2**30 * devices)
    with pytest.raises(UsageError, match="a step of zero-3 is predicted to need .* use a smaller"):
        large(microbatch())
    with pytest.raises(Making):
        large()  # the state fits; what the step takes is not known yet
    with pytest.raises(Making):
        large(microbatch(), memory_gib=math.inf)
    monkeypatch.setattr(memory, "free_host_bytes", lambda: None)
    with pytest.raises(Making):
        large(microbatch())


def test_free_memory_of_the_host_is_told():
    free = free_host_bytes()
    assert free is not None and 2**24 < free <= os.sysconf("SC_PHYS_PAGES") * os.sysconf(
        "SC_PAGE_SIZE"
    )


def test_what_a_function_holds():
    wide = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    size = 64 * 64 * 4
    # Elementwise: inside the kernel of the sum, or in the place of the product that it reads.
    assert peak_bytes(lambda a: jnp.sum(jnp.tanh(a) * 2.0), wide) == 4
    assert peak_bytes(lambda a: jnp.tanh(a @ a).T, wide) == size
    assert peak_bytes(lambda a: jnp.tanh(a @ a) @ a, wide) == 2 * size
    # Both factors of the last product, and the product.
    assert peak_bytes(lambda a: (a @ a) @ (a.T @ a), wide) == 3 * size
    # A loop's result takes the place of what it began with; its body holds a product beside it.
    loop = lambda a: jax.lax.scan(lambda c, _: (jnp.sin(c @ a), None), a @ a, length=9)[0]  # noqa: E731
    assert peak_bytes(loop, wide) == 2 * size


def test_what_a_function_holds_of_what_it_is_given():
    """An argument that it frees is there until it has been read for the last time."""
    wide = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    size = 64 * 64 * 4
    function = lambda a, b: (a @ b) @ b @ b  # noqa: E731
    assert peak_bytes(function, wide, wide) == 2 * size
    assert peak_bytes(function, wide, wide, freed=(0,)) == size  # gone when the second is made
    assert peak_bytes(function, wide, wide, freed=(1,)) == 2 * size  # read by the last of them
    assert peak_bytes(lambda a: jnp.tanh(a) * 2, wide, freed=(0,)) == 0  # made in its place


def test_what_is_sent_is_held_until_what_comes_is_read():
    """Other work is done meanwhile; nothing of a sum over devices comes to its reader's kernel."""
    wide = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    size = 64 * 64 * 4

    def sent(a):
        there = jax.lax.ppermute(a @ a, "i", [(0, 1), (1, 0)])
        beside = (a @ a) @ a
        return beside @ there

    def held(function):
        found = []
        jax.make_jaxpr(lambda: found.append(peak_bytes(function, wide)), axis_env=[("i", 2)])()
        return found[0]

    assert held(sent) == 4 * size  # sent, come, and the two products beside them
    scattered = lambda a: jax.lax.psum_scatter(a @ a, "i", tiled=True)  # noqa: E731
    assert held(scattered) == 1.5 * size


def test_a_kernel_holds_its_result_alone():
    """What it works with lies on the chip; its body is no program that could be traced again."""

    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...] * (1.0 + pl.program_id(0))

    wide = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    call = pl.pallas_call(kernel, out_shape=wide, grid=(1,), interpret=True)
    assert peak_bytes(lambda a: call(a) @ a, wide) == 2 * 64 * 64 * 4


def compiled_for_gpus():
    """Steps whose memory the compiler told, and what of it is predicted here."""
    for gpu, unroll in (("h100", False), ("h200", True)):
        for row in read_result(ROOT / f"results/train_memory_{gpu}.json")["rows"]:
            if "predicted_gib" in row:
                yield row, SHAPES[row["shape"]], row["compiled_gib"], unroll
    for row in read_result(ROOT / "results/gpus_2.json")["rows"]:
        mended = "no longer" in row.get("remark", "")  # the program since
        mended |= "weipipe" in row["schedule"] or "1f1b" in row["schedule"]  # slots lie apart since
        if row.get("predicted_gib") and "temp_gib" in row and not mended:
            taken = row["temp_gib"] + row["argument_gib"]
            yield {**row, "devices": 2, "microbatch_size": 1}, SHAPES["1b"], taken, True


def test_predictions_are_near_what_was_compiled_for_gpus():
    """An underestimate would let a step through that does not fit."""
    ratios = {}
    for row, config, compiled_gib, unroll in compiled_for_gpus():
        schedule = resolve(
            row["schedule"],
            devices=row["devices"],
            layers=config.num_layers,
            microbatches=row["microbatches"],
        )
        if any(task.kind is TaskKind.INPUT_GRADIENT for task in schedule.tasks):
            continue  # a split backward pass keeps less than when these were compiled
        tokens = row["microbatch_size"] * row["sequence_length"]
        if row["recompute"] in MADE_AGAIN and pieces_of(tokens, PIECE_TOKENS) > 1:
            continue  # what is computed again is made in pieces since
        ids = jax.ShapeDtypeStruct((row["microbatch_size"], row["sequence_length"]), jnp.int32)
        predicted = step_bytes(
            StepShape(
                schedule=schedule,
                model=layered(config, implementation="shapes"),
                parameters=abstract_parameters(config),
                state_bytes=12 * config.parameter_count(),
                microbatch={"inputs": ids, "targets": ids},
                compute_dtype=jnp.bfloat16,
                gradient_dtype=jnp.dtype(row.get("gradient_dtype", "float32")),
                recompute=row["recompute"],
                unroll=unroll,
            )
        )
        key = *(row[k] for k in ("schedule", "recompute", "sequence_length", "devices")), unroll
        ratios[key] = predicted / 2**30 / compiled_gib
    assert len(ratios) >= 12
    assert min(ratios.values()) > 0.94 and max(ratios.values()) < 1.1, ratios


def test_predictions_of_shared_sequences_are_near_what_was_compiled_for_gpus():
    """A microbatch is a device's only one there, and what is sent is held until what comes is."""
    ratios = {}
    for row in read_result(ROOT / "results/context_compiled_h200.json")["rows"]:
        if row["by"] == "gather":
            continue  # its sums begin with the first that is found since
        config = replace(SHAPES[row["shape"]], num_layers=row["layers"])
        policy, *others = row["recompute"].split(",")
        name, _, count = policy.partition("*")
        kept = int(count or row["layers"])
        ids = jax.ShapeDtypeStruct((1, row["length"]), jnp.int32)
        predicted = step_bytes(
            StepShape(
                schedule=resolve("zero-3", devices=1, layers=row["layers"], microbatches=1),
                model=layered(config, implementation="shapes"),
                parameters=abstract_parameters(config),
                state_bytes=12 * config.parameter_count(),
                microbatch={"inputs": ids, "targets": ids},
                compute_dtype=jnp.bfloat16,
                gradient_dtype=jnp.float32,
                recompute=(name,) * kept + (*others,) * (row["layers"] - kept),
                unroll=True,
                context=ContextSplit(parts=row["devices"], by=row["by"]),
            )
        )
        key = tuple(row[k] for k in ("shape", "by", "recompute", "layers"))
        ratios[key] = predicted / 2**30 / row["compiled_gib"]
    assert len(ratios) >= 5
    assert min(ratios.values()) > 0.95 and max(ratios.values()) < 1.05, ratios


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["selective", "block"])
@pytest.mark.parametrize(
    ("name", "members"),
    [("dp", 1), ("1f1b", 1), ("weipipe-interleave", 1), ("zero-3", 1), ("weipipe-keep", 4)],
)
def test_prediction_is_near_what_the_compiler_allocates(name, members, recompute):
    trainer = trainer_of(name, recompute=recompute, members=members)
    placed = trainer.place(batch(rows=4 * members))
    step: Any = trainer._step
    analysis = step.lower(trainer.state, placed).compile().memory_analysis()
    taken = (
        analysis.temp_size_in_bytes
        + analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
    ) / 2**30
    for limit, fits in ((taken * 0.8, False), (taken * 1.25, True)):
        limited = trainer_of(name, memory_gib=limit, recompute=recompute, members=members)
        if fits:
            limited._check_memory(microbatch())
        else:
            with pytest.raises(UsageError, match="predicted to need"):
                limited._check_memory(microbatch())
