"""A loss that is a mean over samples, taken apart into a sum and a weight.

A step sees one microbatch at a time; the mean of the whole batch is sum(sums) / sum(weights). So a
mean must be seen to be one: it ends in sums over an array along whose one axis samples lie, each
made of that sample alone (see `samples`), divided by the array's size, by the number of samples or
by a sum of the same kind (of a mask). Terms may have divisors of their own (a masked mean beside a
mean over all): see `sums`. Anything else, such as a product of means in an auxiliary loss, is
another number for the whole batch than for its parts, and is refused.

Legend: B samples in the microbatch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxsys.errors import UsageError
from jaxsys.train.adapt.axes import Mixed, Summed, Unknown
from jaxsys.train.adapt.samples import RANDOM, Followed
from jaxsys.train.adapt.sources import written_at
from jaxsys.train.adapt.states import states_of
from jaxsys.train.adapt.twins import numbers_between
from jaxsys.train.adapt.values import Operation, Value, known

WAY_OUT = (
    "return (sum over samples, their number) instead of a mean; each is then added up over "
    "microbatches"
)

_AS_IT_IS = ("convert_element_type", "copy", "name", "reshape", "squeeze")


class Guard(NamedTuple):
    """What keeps a divisor from zero."""

    name: str
    """"max" or "add" of a number, or "none": what it is where it would be zero."""
    number: float


@dataclass(frozen=True, slots=True)
class Divisor:
    """A sum over samples, of a mask or of weights, that other such sums are divided by."""

    value: Value
    guards: tuple[Guard, ...] = ()
    """First to last."""

    def also(self, guard: Guard) -> "Divisor":
        """With another guard, ahead of all."""
        return Divisor(self.value, (guard, *self.guards))

    def guarded(self, total: Any) -> Any:
        """The divisor as it is for a batch of which `value` is this."""
        for name, number in self.guards:
            if name == "none":
                total = jnp.where(total == 0, number, total)
            else:
                total = jnp.maximum(total, number) if name == "max" else total + number
        return total

    @property
    def counts(self) -> bool:
        """Whether it is a number of elements, for which a guard says nothing unless it is zero."""
        value = self.value
        while jnp.issubdtype(value.aval.dtype, jnp.floating):
            if value.maker is None or value.maker.primitive.name not in (
                *_AS_IT_IS,
                "broadcast_in_dim",
                "reduce_sum",
            ):
                return False
            value = value.maker.inputs[0]
        return True


class Term(NamedTuple):
    """A part of a loss: factor * value * times / divisor."""

    value: Value
    """A sum over samples, or what no sample enters (a penalty on parameters)."""
    factor: float
    divisor: Divisor | None = None
    grows: int = 0
    """The factor is another one for other numbers of samples: as B to this power, -1 in a mean."""
    seen: bool = True
    """Whether it is known to be such a sum."""
    times: tuple[tuple[Value, int], ...] = ()
    """Scalars that no sample enters, each to the power 1 or -1, by which it is multiplied too."""

    def scaled(self, own: Mapping[Value, Any]) -> Any:
        """factor * value, of what values are."""
        part = self.factor * own[self.value]
        for value, power in self.times:
            part = part * own[value] if power > 0 else part / own[value]
        return part

    @property
    def is_sum(self) -> bool:
        """Whether microbatches just add up to the whole batch's."""
        return not self.seen or (self.divisor is None and self.grows == (not self.value.varies))


def terms_of(
    loss: Value,
    samples: int,
    key: int | None,
    again: Callable[[int], Value],
    *,
    strict: bool = True,
    quick: bool = False,
) -> list[Term]:
    """What a loss of B samples adds up.

    Args:
        loss: a scalar of a program.
        samples: B.
        key: the microbatch's leaf that is its key.
        again: makes the same loss of so many times B samples, by which numbers are seen to depend
            on B.
        strict: all must be seen; otherwise what is not is a term that is not `seen`.
        quick: sums that are multiplied by no number are believed to be of no such.

    Raises:
        UsageError: if something is not seen.
    """
    found = _Terms(loss, samples, key, strict)
    terms = found.of(loss, 1.0)
    # Where axes of one element come and go, what enters is compared for 2 B and 4 B samples.
    more = 2 if samples == 1 else 1
    if strict and not any(term.value.varies for term in terms):
        raise UsageError(f"the loss reads no sample; {WAY_OUT}")
    if quick and not (found.scaled or any(t.divisor or not t.value.varies for t in terms)):
        return terms
    several = [terms]
    for times in (2, 4)[:more]:
        other = again(times)
        seen = _Terms(other, times * samples, key, strict)
        twins = seen.of(other, 1.0)
        if samples > 1 and seen.followed.groups != found.followed.groups:
            if not strict:
                return [Term(loss, 1.0, seen=False)]
            raise UsageError(
                "the loss puts samples into groups that are larger where there are more of them, "
                f"which is not seen to be a mean; {WAY_OUT}"
            )
        if len(terms) != len(twins):
            if not strict:
                return [Term(loss, 1.0, seen=False)]
            raise UsageError(f"the loss adds other sums for more samples; {WAY_OUT}")
        several.append(twins)
    return [_grown(*each, key=key, strict=strict) for each in zip(*several, strict=True)]


def counts_in(weight: Value, samples: int, key: int | None) -> Value | None:
    """What a weight counts where something keeps it from zero; None where nothing does.

    `maximum(mask.sum(), 1)` of microbatches would count one for each that has none.
    """
    divisor, number = _unguarded(weight)
    kept = divisor.guards and divisor.counts and number == 1.0 and samples
    if not kept or not _Terms(weight, samples, key, False).is_sum(divisor.value):
        return None
    return divisor.value


def unguarded(weight: Value) -> tuple[Value, float]:
    """What a weight adds up, without what keeps it from zero, and what number it is times."""
    divisor, times = _unguarded(weight)
    return (divisor.value, times) if divisor.guards else (weight, 1.0)


def _grown(one: Term, other: Term, *more: Term, key: int | None, strict: bool) -> Term:
    """A term, with what it becomes for 2 B samples, and perhaps for 4 B, seen."""
    if not (one.seen and other.seen):
        mean = abs(2 * other.factor - one.factor) <= 1e-6 * abs(one.factor) and one.factor
        return one._replace(seen=False, grows=-1 if mean else 0)
    powers = (0,) if one.divisor is not None else (-1, 0, 1)
    where = one.value.maker
    for power in powers:
        if abs(other.factor - 2.0**power * one.factor) > 1e-6 * abs(one.factor):
            continue
        # Numbers that are seen here aside, there may be others further down.
        pair = (other, more[0]) if more else (one, other)
        compared = _compared(*pair, key)
        if compared != []:
            where = compared[0][0][0] if isinstance(compared, list) else compared
            break
        return one._replace(grows=power)
    if not strict:
        return one._replace(seen=False)
    at = "" if where is None else f" (at {written_at(where)})"
    raise UsageError(
        "the loss adds a term that is made with another number for more samples, which is not seen "
        f"to be a mean{at}; {WAY_OUT}"
    )


def _compared(one: Term, other: Term, key: int | None) -> Any:
    """What is found between two terms, see `numbers_between`; nothing if they are made alike."""
    pairs = [(one.value, other.value)]
    if one.divisor is not None and other.divisor is not None:
        pairs.append((one.divisor.value, other.divisor.value))
    if [power for _, power in one.times] != [power for _, power in other.times]:
        return None
    pairs += [(a, b) for (a, _), (b, _) in zip(one.times, other.times, strict=True)]
    return numbers_between(pairs, key)


class _Terms:
    """What a loss adds up."""

    def __init__(self, loss: Value, samples: int, key: int | None, strict: bool) -> None:
        # With one sample axes of one element come and go; it is then seen with two, `terms_of`.
        self.followed = Followed(samples)
        self.states = {} if samples == 1 else states_of(loss, samples, key, self.followed)
        self.strict = strict
        self.scaled = samples == 1
        """Whether anything is multiplied by numbers."""

    def of(self, value: Value, factor: float) -> list[Term]:
        """The terms of a value times a factor."""
        maker = value.maker
        if maker is None or not (value.varies or value.depends):
            return [] if number_of(value) == 0 else [Term(value, factor)]
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
                if value.varies and _is_still(one):
                    return _times(self.of(other, factor), one, 1)
                if (number := number_of(one)) is not None:
                    self.scaled = True
                    return self.of(other, factor * number)
                if value.varies and (inverse := _inverse(one)) is not None:
                    number, divisor = inverse
                    return self.divided(value, other, number * factor, divisor)
        if name == "div":
            if (number := number_of(inputs[1])) is not None:
                self.scaled = True
                return self.of(inputs[0], factor / number)
            if not value.varies:
                return [Term(value, factor)]
            if _is_still(inputs[1]):
                return _times(self.of(inputs[0], factor), inputs[1], -1)
            return self.divided(value, inputs[0], factor, inputs[1])
        if name == "select_n" and (found := _where_counted(value)) is not None:
            chosen, base, guard = found
            nothing = guard.number == 0  # of the quotient: as over infinitely many
            guard = guard._replace(number=float("inf"))
            terms = self.of(chosen, factor) if nothing else []
            if terms and all(t.divisor is not None and t.divisor.value is base for t in terms):
                return [t._replace(divisor=t.divisor.also(guard)) for t in terms if t.divisor]
        if name == "reduce_sum" and (parts := _scalars(inputs[0])):
            return [term for part in parts for term in self.of(part, factor)]
        if not value.varies or self.is_sum(value):
            return [Term(value, factor)]
        return self.unseen(value, factor)

    def divided(self, value: Value, above: Value, factor: float, below: Value) -> list[Term]:
        """The terms of a quotient, whose divisor must be a sum over samples."""
        divisor, number = _unguarded(below)
        if self.is_sum(divisor.value):
            terms = self.of(above, factor / number)
            if all(term.divisor is None and term.seen for term in terms):
                return [term._replace(divisor=divisor) for term in terms]
        return self.unseen(value, factor)

    def unseen(self, value: Value, factor: float) -> list[Term]:
        """What cannot be taken apart, as it is.

        Raises:
            UsageError: if all must be.
        """
        if not self.strict:
            return [Term(value, factor, seen=False)]
        at = self.where(value)
        where = "a leaf of the batch" if at is None else written_at(at)
        drawn = [
            one
            for one in (() if at is None else at.inputs)
            if self.followed.samples in one.aval.shape and _is_drawn_once(one)
        ]
        if drawn:
            raise UsageError(
                "the loss is not seen to be a mean over samples: random numbers of the batch's "
                f"shape, drawn with a fixed key, enter at {where}, and each microbatch would get "
                "the same; draw them with the batch's leaf 'key', which is each microbatch's own"
            )
        raise UsageError(
            "the loss is not seen to be a mean over samples: they enter each other's parts at "
            f"{where}, so for the whole batch it may be another number than for its microbatches; "
            "make each sample's part of that sample alone (of groups side by side, give a "
            "microbatch at least two whole ones), or return (sum over samples, their number) "
            "instead of a mean, which is another number then: each microbatch's, added up"
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
            return name in ("reduce_sum", "dot_general", "scan")
        return isinstance(self.states[value], Summed)

    def where(self, value: Value) -> Operation | None:
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
        return value.maker


def _is_drawn_once(value: Value) -> bool:
    """Whether a value is drawn with a key that is neither the batch's nor a parameter."""
    waiting, seen = [value], {value}
    while waiting:
        one = waiting.pop()
        if one.depends or one.varies or one.maker is None:
            continue
        if one.maker.primitive.name in RANDOM:
            return True
        waiting += [v for v in dict.fromkeys(one.maker.inputs) if v not in seen]
        seen.update(one.maker.inputs)
    return False


def _is_still(value: Value) -> bool:
    """Whether a scalar is made of parameters and of what the whole batch has, no sample's part."""
    return value.depends and not value.varies and not value.aval.shape


def _times(terms: list[Term], value: Value, power: int) -> list[Term]:
    """The terms, each times what no sample enters."""
    return [t._replace(times=(*t.times, (value, power))) for t in terms]


def _inverse(value: Value) -> tuple[float, Value] | None:
    """(a, b) where a value is the number a divided by b."""
    maker = value.maker
    if maker is None:
        return None
    name, inputs = maker.primitive.name, maker.inputs
    if name == "div" and (number := number_of(inputs[0])) is not None:
        return number, inputs[1]
    if name == "integer_pow" and maker.parameters["y"] == -1:
        return 1.0, inputs[0]
    return None


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


def number_of(value: Value) -> float | None:
    """A scalar that depends on nothing; None if a value is none."""
    if value.aval.shape or value.depends or value.varies or not _is_number(value.aval.dtype):
        return None
    return float(known(value))


def _is_number(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.number) and not jnp.issubdtype(dtype, jnp.complexfloating)


def _unguarded(value: Value) -> tuple[Divisor, float]:
    """A divisor without what keeps it from zero, and what number it is times."""
    guards: list[Guard] = []
    times = 1.0
    while (maker := value.maker) is not None:
        name, inputs = maker.primitive.name, maker.inputs
        if name in ("convert_element_type", "copy"):
            value = inputs[0]
        elif name == "select_n" and not guards and (found := _where_counted(value)) is not None:
            chosen, base, guard = found
            if base is not _bare(chosen):
                break
            guards.append(guard)
            value = base
        elif name in ("mul", "div", "max", "add") and len(inputs) == 2:
            other, number = inputs[0], number_of(inputs[1])
            if number is None and name != "div":
                other, number = inputs[1], number_of(inputs[0])
            if number is None:
                break
            if name in ("mul", "div"):
                if guards or not number or not jnp.issubdtype(value.aval.dtype, jnp.floating):
                    break
                times = times * number if name == "mul" else times / number
            elif times != 1.0 or number > (1.0 if name == "max" else 1e-6):
                break
            else:
                guards.append(Guard(name, number))
            value = other
        else:
            break
    return Divisor(value, tuple(guards[::-1])), times


def _bare(value: Value) -> Value:
    """A value before its conversions."""
    while value.maker is not None and value.maker.primitive.name in _AS_IT_IS:
        value = value.maker.inputs[0]
    return value


def _where_counted(value: Value) -> tuple[Value, Value, "Guard"] | None:
    """`where(T > 0, chosen, number)`: (chosen, T, what T becomes where there is none)."""
    assert value.maker is not None
    if len(value.maker.inputs) != 3:
        return None
    which, *cases = value.maker.inputs
    which = _bare(which)
    if which.maker is None or which.maker.primitive.name not in ("gt", "eq", "ne", "lt"):
        return None
    name, sides = which.maker.primitive.name, list(which.maker.inputs)
    if number_of(sides[0]) is not None:
        name, sides = {"gt": "lt", "lt": "gt"}.get(name, name), sides[::-1]
    if number_of(sides[1]) != 0.0 or name == "lt":
        return None
    none, some = (1, 0) if name == "eq" else (0, 1)
    number = number_of(cases[none])
    if number is None:
        return None
    base = _bare(sides[0])
    return cases[some], base, Guard("none", number)
