"""A step that cannot fit is refused before it is compiled, and told what would fit."""

import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsys.errors import UsageError
from jaxsys.lowering import Recompute
from jaxsys.model import initial_parameters, layered, preset
from jaxsys.results import read_result
from jaxsys.train import Trainer
from jaxsys.train.liveness import peak_bytes

TOKENS = 64
ROOT = Path(__file__).parents[2]


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
    lean._check_memory(lean.place(batch()))


def test_nothing_would_fit_and_going_on_anyway():
    with pytest.raises(UsageError, match="nothing tried would fit, the least"):
        trainer_of("zero-3", memory_gib=0.001).step(batch())
    with pytest.raises(UsageError, match="memory_gib=nan must be above 0"):
        trainer_of("dp", memory_gib=math.nan)
    trainer = trainer_of("dp", memory_gib=math.inf)
    trainer._check_memory(trainer.place(batch()))


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


def test_predictions_were_near_what_was_compiled_for_h100s():
    """Recorded together; an underestimate would let a step through that does not fit."""
    found = read_result(ROOT / "results/train_memory_h100.json")["rows"]
    ratios = [r["predicted_gib"] / r["compiled_gib"] for r in found if "predicted_gib" in r]
    assert len(ratios) >= 10
    assert min(ratios) > 0.95 and max(ratios) < 1.1, ratios


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["selective", "block"])
@pytest.mark.parametrize("name", ["dp", "1f1b", "weipipe-interleave", "zero-3"])
def test_prediction_is_near_what_the_compiler_allocates(name, recompute):
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
    for limit, fits in ((taken * 0.8, False), (taken * 1.25, True)):
        limited = trainer_of(name, memory_gib=limit, recompute=recompute)
        if fits:
            limited._check_memory(limited.place(batch()))
        else:
            with pytest.raises(UsageError, match="predicted to need"):
                limited._check_memory(limited.place(batch()))
