"""Random keys for models that draw (dropout): one a microbatch, in a leaf of the batch.

A key depends on the run's seed, the step and the microbatch's number in the whole step alone, so it
is the same under every schedule and on any number of devices that makes as many microbatches, and a
resumed run draws what the unbroken one would have.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxsys.errors import UsageError
from jaxsys.layered import LayeredModel, PyTree, microbatch_keys, seed_key, step_key


class Keys:
    """The keys of one run."""

    def __init__(self, model: LayeredModel, seed: int) -> None:
        self._leaf, self._seed = model.draws, seed

    def lacks(self, batch: PyTree) -> bool:
        """Whether the model draws and the batch has no keys of its own."""
        if self._leaf is None:
            return False
        if not isinstance(batch, Mapping):
            raise UsageError(
                f"the model draws random numbers from a batch's leaf {self._leaf!r}; make batches "
                "dicts, to which it can be added"
            )
        return self._leaf not in batch

    def of_step(self, step: int, rows: int) -> dict[str, np.ndarray]:
        """The leaf of a step's batch: raw keys uint32 [rows, ...]."""
        assert self._leaf is not None
        keys = microbatch_keys(step_key(seed_key(self._seed), step), rows)
        return {self._leaf: np.asarray(jax.random.key_data(keys))}

    def with_shape(self, microbatch: PyTree) -> Any:
        """Shapes of a microbatch with its key."""
        if not self.lacks(microbatch):
            return microbatch
        keys = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
        return {**microbatch, self._leaf: keys}
