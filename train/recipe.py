"""A language-model run in numbers: what `jaxsys train` is asked for, checked before JAX starts.

AdamW with a warm-up and a cosine down to a tenth; weights but not norms decay. Step k of S has

    k / w * peak                                        while k <= w, the steps of the warm-up
    (0.1 + 0.9 (1 + cos(pi (k - w) / (S - w))) / 2) * peak    after

so the first step trains, and the last is at a tenth.
"""

from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxsys.errors import UsageError
from jaxsys.layered import PyTree
from jaxsys.model import DecoderConfig
from jaxsys.model.contract import attended, attention_widths
from jaxsys.train.flops import training_flops_per_token

MOST_FLOAT32 = float(jnp.finfo(jnp.float32).max)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What the trajectory of a run depends on; how it is run (schedule, devices) is not here."""

    model: str
    steps: int
    """The length of the learning-rate schedule."""
    batch_sequences: int
    """G, sequences in a step."""
    sequence_length: int
    learning_rate: float
    warm_up_steps: int
    weight_decay: float = 0.1
    compute_dtype: str = "float32"
    packing: str = "windows"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_sequences", "sequence_length"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} must be at least 1")
        if self.seed < 0:
            raise UsageError(f"seed={self.seed} must be at least 0")
        if not 0 < self.learning_rate < MOST_FLOAT32:
            raise UsageError(
                f"learning_rate={self.learning_rate} must be above 0, and finite in float32"
            )
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise UsageError(f"compute_dtype={self.compute_dtype!r} must be float32 or bfloat16")

    def settings(self, *, data: str, held_out: str) -> dict[str, Any]:
        """What a checkpoint remembers and a resumed run must not change unasked.

        Args:
            data: the fingerprint of what is trained on.
            held_out: of what is kept out.
        """
        return {**asdict(self), "data": data, "held_out": held_out}

    def rates(self) -> optax.Schedule:
        """The learning rate of a step, by how many steps came before it."""
        rate = optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=self.learning_rate,
            warmup_steps=min(self.warm_up_steps, self.steps),
            decay_steps=max(self.steps, self.warm_up_steps + 1),
            end_value=self.learning_rate / 10,
        )
        # optax counts from 0, where the warm-up's rate is 0: a step that would train nothing.
        return lambda count: rate(count + 1)

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW over the recipe's learning rates."""
        return optax.adamw(
            self.rates(), b1=0.9, b2=0.95, weight_decay=self.weight_decay, mask=decays
        )


def decays(parameters: PyTree) -> PyTree:
    """Which leaves decay: matrices do, norm scales (vectors) do not."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, parameters)


def decoder_flops_per_token(config: DecoderConfig, sequence_length: int) -> float:
    """FLOP to train a decoder on one token, see `jaxsys.train.flops`.

    Parameters are those that a token uses; a layer with a window attends to that.
    """
    queries, values = attention_widths(config)
    # Layers of full attention count S H each; those that see less, as many times less.
    keys = sum(
        len(config.layers_of(kind)) * 2 * attended(kind.window, sequence_length)
        for kind in config.kinds
    )
    return training_flops_per_token(
        parameters=config.active_parameter_count(),
        layers=keys / sequence_length,
        sequence_length=sequence_length,
        attention_width=(queries + values) / 2,
    )
