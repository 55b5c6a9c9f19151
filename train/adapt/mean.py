"""A loss that is a mean over samples, taken apart into a sum and a weight.

A step sees one microbatch at a time; the mean of the whole batch is sum(sums) / sum(weights). So a
mean must be seen to be one: it ends in sums over an array along whose one axis samples lie, each
made of that sample alone (see `samples`), divided by the array's size, by the number of samples or
by a sum of the same kind (of a mask). Anything else, such as a product of means in an auxiliary
loss, is another number for the whole batch than for its parts, and is refused.

Legend: B samples in the microbatch.
"""

from dataclasses import dataclass, field
from typing import Any

from jaxsys.errors import UsageError
from jaxsys.train.adapt.samples import (
    Along,
    Followed,
    Mixed,
    Same,
    State,
    Unknown,
    everything_uneven,
    of_constant,
)
from jaxsys.train.adapt.values import BatchLeaf, Constant, Value

OUTPUT = "jaxsys_model_output"
"""The name of a model's outputs: in what cannot be followed up to there, samples are believed to
lie along the first axis."""

_WAY_OUT = (
    "return (sum over samples, their number) instead of a mean; each is then added up over "
    "microbatches"
)

_AS_IT_IS = ("convert_element_type", "copy", "name", "reshape", "squeeze")


@dataclass(slots=True)
class Mean:
    """What a mean is made of: (sum of factor * sums) / divisor + sum of factor * rests."""

    sums: list[tuple[Value, float]] = field(default_factory=list)
    """Sums over samples, with factors."""
    divisor: Value | None = None
    """A sum over samples of a mask; None where factors hold the number of samples."""
    rests: list[tuple[Value, float]] = field(default_factory=list)
    """What no sample enters, such as the norm of parameters."""


def mean_of(loss: Value, samples: int, key: int | None) -> Mean:
    """The parts of a mean over samples.

    Args:
        loss: a scalar of a program.
        samples: B.
        key: the microbatch's leaf that is its key.

    Raises:
        UsageError: if the loss is not seen to be a mean over samples.
    """
    mean = Mean()
    divisors: set[Value | None] = set()
    for value, factor, divisor in _Terms(loss, samples, key).of(loss, 1.0):
        if not value.varies:
            mean.rests.append((value, factor))
        else:
            mean.sums.append((value, factor))
            divisors.add(divisor)
    if len(divisors) != 1:
        what = "adds means over different numbers of elements" if divisors else "reads no sample"
        raise UsageError(f"the loss {what}; {_WAY_OUT}")
    mean.divisor = divisors.pop()
    return mean


def check_scales(mean: Mean, twice: Mean) -> None:
    """Raises UsageError unless a mean's factors are those of a mean, seen at B and at 2 B samples.

    A mean over a number of elements divides by it; a bare sum has the same factor for any number.
    """
    if len(mean.sums) != len(twice.sums):
        raise UsageError(f"the loss adds other sums for more samples; {_WAY_OUT}")
    ratio = 0.5 if mean.divisor is None else 1.0
    for (_, one), (_, other) in zip(mean.sums, twice.sums, strict=True):
        if abs(other - ratio * one) > 1e-6 * abs(one):
            raise UsageError(
                f"the loss holds a sum over samples that is not divided by their number; {_WAY_OUT}"
            )


class _Terms:
    """What a loss adds up."""

    def __init__(self, loss: Value, samples: int, key: int | None) -> None:
        # With one sample axes of one element come and go; it is then seen with two, `check_scales`.
        self.states = {} if samples == 1 else _states(loss, samples, key)

    def of(self, value: Value, factor: float) -> list[tuple[Value, float, Value | None]]:
        """(sum, factor, divisor) of each term."""
        maker = value.maker
        if maker is None or not value.varies:
            return [(value, factor, None)]
        name, inputs = maker.primitive.name, maker.inputs
        if name in _AS_IT_IS and not inputs[0].aval.shape:
            return self.of(inputs[0], factor)
        if name == "neg":
            return self.of(inputs[0], -factor)
        if name in ("add", "sub"):
            sign = -1.0 if name == "sub" else 1.0
            return [*self.of(inputs[0], factor), *self.of(inputs[1], sign * factor)]
        if name == "mul":
            for one, other in (inputs, inputs[::-1]):
                if isinstance(one, Constant):
                    return self.of(other, factor * float(one.words))
                if (inverse := _inverse(one)) is not None:
                    number, divisor = inverse
                    return self.divided(value, other, number * factor, divisor)
        if name == "div":
            if isinstance(inputs[1], Constant):
                return self.of(inputs[0], factor / float(inputs[1].words))
            return self.divided(value, inputs[0], factor, inputs[1])
        if name == "reduce_sum" and (parts := _scalars(inputs[0])):
            return [term for part in parts for term in self.of(part, factor)]
        if self.is_sum(value):
            return [(value, factor, None)]
        return self.refused(value)

    def divided(self, value: Value, above: Value, factor: float, below: Value) -> list[Any]:
        """The terms of a quotient, whose divisor must be a sum over samples."""
        divisor = _masked(below)
        if self.is_sum(divisor):
            terms = self.of(above, factor)
            if all(mine is None for _, _, mine in terms):
                return [(one, own, divisor) for one, own, _ in terms]
        return self.refused(value)

    def refused(self, value: Value) -> list[Any]:
        """Raises UsageError: what cannot be taken apart."""
        raise UsageError(
            f"the loss is not seen to be a mean over samples (at {self.where(value)}): for the "
            f"whole batch it may be another number than for its microbatches; {_WAY_OUT}"
        )

    def is_sum(self, value: Value) -> bool:
        """Whether a scalar is a sum over samples of each one's own."""
        maker = value.maker
        if maker is None or value.aval.shape:
            return False
        name, inputs = maker.primitive.name, maker.inputs
        if name in (*_AS_IT_IS, "neg") and not inputs[0].aval.shape:
            return self.is_sum(inputs[0])
        if not self.states:
            return name in ("reduce_sum", "dot_general")
        states = [self.states[value] for value in inputs]
        if name == "reduce_sum":
            return isinstance(states[0], Along) and states[0].axis in maker.parameters["axes"]
        if name == "dot_general":
            contracted, _ = maker.parameters["dimension_numbers"]
            pairs = list(zip(*contracted, strict=True))
            one, other = states
            return (
                isinstance(one, Along)
                and isinstance(other, Along)
                and (one.axis, other.axis) in pairs
            )
        return False

    def where(self, value: Value) -> str:
        """The operation in which samples first enter each other's parts, or the value's own."""
        seen: set[Value] = set()
        while value.maker is not None and value not in seen:
            seen.add(value)
            worse = [
                v for v in value.maker.inputs if isinstance(self.states.get(v), Mixed | Unknown)
            ]
            if not worse:
                break
            value = worse[0]
        return value.maker.primitive.name if value.maker is not None else "a leaf of the batch"


def _inverse(value: Value) -> tuple[float, Value] | None:
    """(a, b) where a value is the number a divided by b."""
    maker = value.maker
    if maker is None:
        return None
    name, inputs = maker.primitive.name, maker.inputs
    if name == "div" and isinstance(inputs[0], Constant):
        return float(inputs[0].words), inputs[1]
    if name == "integer_pow" and maker.parameters["y"] == -1:
        return 1.0, inputs[0]
    return None


def _states(loss: Value, samples: int, key: int | None) -> dict[Value, State]:
    """Of all that a loss is made of, where samples lie."""
    followed = Followed(samples)
    states: dict[Value, State] = {}

    def leaf(value: Value) -> State:
        if isinstance(value, Constant):
            shape = value.aval.shape  # keys made here would belong to whatever traces this
            return of_constant(value.words) if value.keys is None else everything_uneven(shape)
        if isinstance(value, BatchLeaf):
            if value.number == key:
                return Same(drawn=True)
            return Along(0) if value.aval.shape[:1] == (samples,) else Unknown()
        return everything_uneven(value.aval.shape)

    waiting = [loss]
    while waiting:
        value = waiting[-1]
        maker = value.maker
        if value in states:
            waiting.pop()
        elif maker is None:
            states[waiting.pop()] = leaf(value)
        elif ahead := [one for one in maker.inputs if one not in states]:
            waiting += ahead
        else:
            name = maker.primitive.name
            found = followed.results(
                name,
                maker.parameters,
                [states[one] for one in maker.inputs],
                [one.aval.shape for one in maker.inputs],
                [one.aval.shape for one in maker.outputs],
            )
            if name == "name" and maker.parameters.get("name") == OUTPUT:
                first = value.aval.shape[:1] == (samples,)
                found = [Along(0) if isinstance(s, Unknown) and first else s for s in found]
            states.update(zip(maker.outputs, found, strict=True))
            states.setdefault(value, found[value.place])
    return states


def _scalars(value: Value) -> list[Value]:
    """The scalars that an array is put together of, if it is."""
    maker = value.maker
    if not value.aval.shape:
        return [value]
    if maker is None:
        return []
    if maker.primitive.name in ("concatenate", "stack"):
        parts = [_scalars(one) for one in maker.inputs]
        return [part for found in parts for part in found] if all(parts) else []
    if maker.primitive.name in (*_AS_IT_IS, "broadcast_in_dim", "expand_dims") and (
        value.aval.size == maker.inputs[0].aval.size
    ):
        return _scalars(maker.inputs[0])
    return []


def _masked(value: Value) -> Value:
    """A divisor without what keeps it from zero: at least 1, or plus a little."""
    maker = value.maker
    while maker is not None:
        name, inputs = maker.primitive.name, maker.inputs
        if name == "convert_element_type":
            value = inputs[0]
        elif name in ("max", "add") and any(isinstance(v, Constant) for v in inputs):
            other, constant = inputs if isinstance(inputs[1], Constant) else inputs[::-1]
            if not isinstance(constant, Constant):
                break
            if float(constant.words) > (1.0 if name == "max" else 1e-6):
                break
            value = other
        else:
            break
        maker = value.maker
    return value
