"""Whether custom derivatives that are not linear hand on each sample's gradient by itself.

Clipping a gradient commutes with cutting the batch if each sample's part is clipped alone, and if
what comes in is the gradient of the whole batch's loss: then a step divides the loss by the batch's
weight before its microbatches run (see `sums`), and a `custom_vjp` that clips is given the very
numbers that it gets in a loop. One that takes a norm over the batch, or clips what was summed over
samples (the gradient of a parameter), is given other numbers by microbatches.

Legend: B samples in the microbatch.
"""

from collections.abc import Sequence
from typing import Any

import jax

from jaxsys.train.adapt.axes import Along, Same, State, Summed
from jaxsys.train.adapt.fingerprint import UNKNOWN, call_of
from jaxsys.train.adapt.linear import Part, moves, parts_of, pulled, shapes_of
from jaxsys.train.adapt.samples import Followed
from jaxsys.train.adapt.states import states_of
from jaxsys.train.adapt.values import Operation, Value


def hand_on_alone(loss: Value, samples: int, key: int | None) -> bool:
    """Whether all derivatives behind a loss that are not linear treat samples one by one.

    Args:
        loss: a scalar of a program.
        samples: B, at least 2: of one sample it cannot be seen.
        key: the microbatch's leaf that is its key.
    """
    followed = _Backward(samples)
    states_of(loss, samples, key, followed)
    return followed.alone


class _Backward(Followed):
    """Follows operations, and of those with such derivatives the way back too."""

    def __init__(self, samples: int) -> None:
        # A number that is made of B may enter the way back unseen.
        super().__init__(samples, scales=False)
        self.alone = True
        self._watched: dict[int, Any] = {}
        self._found: dict[int, bool] = {}

    def operation(
        self,
        operation: Operation,
        states: Sequence[State],
        shapes: Any,
        outputs: Any,
    ) -> list[State]:
        self._watched = {id(e.params): e for e in operation.not_linear}
        # Loops are followed until nothing changes: the last visit counts.
        self._found = dict.fromkeys(self._watched, False)
        found = super().operation(operation, states, shapes, outputs)
        self.alone = self.alone and all(self._found.values())
        self._watched = {}
        return found

    def results(
        self, name: str, parameters: Any, states: Sequence[State], shapes: Any, outputs: Any
    ) -> list[State]:
        found = super().results(name, parameters, states, shapes, outputs)
        equation = self._watched.get(id(parameters))
        if equation is not None:
            self._found[id(parameters)] = self._hands_on_alone(equation, states, found)
        return found

    def _hands_on_alone(self, equation: Any, given: Sequence[State], made: list[State]) -> bool:
        shapes = shapes_of(equation)
        moving = [n for n, shape in enumerate(shapes) if moves(shape)]
        try:
            outputs = jax.eval_shape(call_of(equation), shapes)
            closed = jax.make_jaxpr(pulled(equation, moving))(shapes, outputs)
        except UNKNOWN:  # of the user's own
            return False
        # Each sample's gradient is its own where each sample's part of the result is.
        gradients = [
            state
            for state, variable in zip(made, equation.outvars, strict=True)
            if moves(variable.aval)
        ]
        if not all(isinstance(s, Along) and s == Along(s.axis) for s in gradients):
            return False
        found = self.jaxpr(closed.jaxpr, closed.consts, [*given, *gradients])
        parts = parts_of(closed, len(given))
        return all(
            self._adds_up(given[n], state, part)
            for n, state, part in zip(moving, found, parts, strict=True)
        )

    @staticmethod
    def _adds_up(given: State, gradient: State, part: Part) -> bool:
        """Whether an input's gradient is each sample's own, or of all their sum."""
        if not isinstance(given, Along):
            return part == "zero" or (part == "linear" and isinstance(gradient, Summed))
        if isinstance(gradient, Same):
            return given.axis not in gradient.uneven and not gradient.drawn
        return gradient == given
