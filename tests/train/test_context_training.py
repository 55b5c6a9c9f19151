"""Training whose sequences lie over devices: the same losses, and what is asked wrongly."""

import argparse
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsys.context import ContextSplit
from jaxsys.errors import UsageError
from jaxsys.model import initial_parameters, layered, preset
from jaxsys.train import Trainer
from jaxsys.train.checkpoint import CheckpointStore
from jaxsys.train.cli import asked_around, parser
from jaxsys.train.layout import AskedLayout, lay_out

CONFIG = dataclasses.replace(preset("bench-tiny"), num_layers=2)


def batch() -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (4, 2, 33), dtype=np.int32)
    return {"inputs": tokens[..., :-1], "targets": tokens[..., 1:]}


def trainer(**how) -> Trainer:
    shapes = {name: jax.ShapeDtypeStruct((2, 32), jnp.int32) for name in ("inputs", "targets")}
    return Trainer(
        layered(CONFIG),
        initial_parameters(CONFIG),
        optax.adamw(1e-2),
        microbatches=4,
        microbatch=shapes,
        clip_norm=1.0,
        **how,
    )


@pytest.mark.slow
def test_steps_held_out_losses_and_checkpoints_do_not_depend_on_the_split(tmp_path):
    """Three steps, the second half of them resumed under another split."""
    one = trainer(schedule="dp", devices=1)
    wanted = [float(one.step(batch()).loss) for _ in range(3)]
    ring = trainer(schedule="zero-3", devices=2, context=2)
    found = [float(ring.step(batch()).loss) for _ in range(2)]
    store = CheckpointStore(tmp_path)
    ring.save(store)
    store.wait()
    heads = ContextSplit(parts=4, by="ulysses")
    resumed = trainer(schedule="zero-1", devices=1, context=heads)
    assert resumed.restore(store) == 2
    found.append(float(resumed.step(batch()).loss))
    np.testing.assert_allclose(found, wanted, rtol=2e-5)
    losses = [t.evaluate([batch()]) for t in (one, resumed)]
    np.testing.assert_allclose(*losses, rtol=2e-5)


def asked(*options: str) -> argparse.Namespace:
    return parser("jaxsys train").parse_args([*options])


def split_asked(arguments: argparse.Namespace):
    return asked_around(arguments)[1]


def lay(devices: int, **options):
    return lay_out(CONFIG, jax.devices()[:devices], AskedLayout(**options))


def test_a_split_is_laid_out_over_the_devices_of_a_run():
    split = split_asked(asked("--context", "4", "--context-by", "mixed", "--context-exchange", "2"))
    found = lay(8, split=split)
    assert dict(found.mesh.shape) == {"data": 1, "ring": 2, "context": 4}
    assert found.schedule.name == "zero-3" and found.split == split


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: split_asked(asked("--context-by", "ring")), "say how many with --context"),
        (lambda: lay(4, split=ContextSplit(parts=3), sequence_length=96), "does not divide"),
        (
            lambda: lay(4, split=ContextSplit(parts=2), sequence_length=50),
            "sequence_length=50 cannot be cut into 2 x context=2 pieces; use sequence_length=48",
        ),
        (
            lambda: lay(4, split=ContextSplit(parts=2), schedule="auto"),
            "schedule 'auto' chooses for devices that each compute whole blocks",
        ),
        (lambda: trainer(schedule="auto", devices=2, context=2), "name a schedule such as zero-3"),
        (lambda: trainer(schedule="zero-1", devices=1, context="two"), "must be a number of"),
        (lambda: trainer(schedule="weipipe-interleave", devices=2, context=2), "has all devices"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(attempt, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        attempt()
