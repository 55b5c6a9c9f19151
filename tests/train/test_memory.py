"""A step that cannot fit is refused before it is compiled, and told what would fit."""

import math
import time
from typing import Any

import numpy as np
import optax
import pytest

from jaxsys.errors import UsageError
from jaxsys.lowering import Recompute
from jaxsys.model import initial_parameters, layered, preset
from jaxsys.train import Trainer

TOKENS = 64


def trainer_of(schedule: str, memory_gib: float | None = None, recompute: Recompute = "none"):
    config = preset("byte-llama")
    return Trainer(
        layered(config),
        initial_parameters(config),
        optax.adam(1e-3),
        schedule=schedule,
        devices=2,
        microbatches=4,
        recompute=recompute,
        memory_gib=memory_gib,
    )


def batch(rows: int = 4, size: int = 8):
    return {name: np.zeros((rows, size, TOKENS), np.int32) for name in ("inputs", "targets")}


def test_refused_before_compiling_with_what_would_fit():
    trainer = trainer_of("dp", memory_gib=0.1)
    start = time.monotonic()
    with pytest.raises(UsageError, match="predicted to need 0.* of 0.1 GiB") as caught:
        trainer.step(batch())
    assert time.monotonic() - start < 20
    text = str(caught.value)
    assert "what would fit: recompute" in text
    assert "go on anyway with memory_gib=inf" in text
    # And what is named is let through to the compiler.
    name = text.split("what would fit: recompute ")[1].split()[0]
    lean = trainer_of("dp", memory_gib=0.1, recompute="block" if name == "block" else "selective")
    lean._check_memory(lean.place(batch()))


def test_nothing_would_fit_and_going_on_anyway():
    with pytest.raises(UsageError, match="nothing tried would fit, the least"):
        trainer_of("zero-3", memory_gib=0.001).step(batch())
    with pytest.raises(UsageError, match="memory_gib=nan must be above 0"):
        trainer_of("dp", memory_gib=math.nan)
    trainer = trainer_of("dp", memory_gib=math.inf)
    trainer._check_memory(trainer.place(batch()))


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["selective", "block"])
@pytest.mark.parametrize("name", ["dp", "1f1b", "weipipe-interleave", "zero-3"])
def test_prediction_is_near_what_the_compiler_allocates(name, recompute):
    """XLA on CPU keeps buffers of slots twice in places: up to half as much again."""
    trainer = trainer_of(name, recompute=recompute)
    placed = trainer.place(batch())
    step: Any = trainer._step
    analysis = step.lower(trainer.state, placed).compile().memory_analysis()
    taken = (
        analysis.temp_size_in_bytes
        + analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
    ) / 2**30
    for limit, fits in ((taken / 2, False), (taken * 1.5, True)):
        limited = trainer_of(name, memory_gib=limit, recompute=recompute)
        if fits:
            limited._check_memory(limited.place(batch()))
        else:
            with pytest.raises(UsageError, match="predicted to need"):
                limited._check_memory(limited.place(batch()))
