"""How a loss becomes what a schedule adds up: a sum, a weight and metrics a microbatch.

A step's loss is sum(sums) / sum(weights). Of one mean these are its own sum and divisor, and a loss
that returns (sum, weight) says them itself. What else a loss adds up is taken so that microbatches
make the whole batch's number:

    of the batch                              a microbatch's part
    a sum over samples, S                     S
    a mean over all, S / n                    S / n * B / N
    a masked mean, S / T                      S / T, T of the whole batch
    what no sample enters, c (a penalty)      c * B / N

Metrics beside a mean are taken likewise. A custom derivative that is not linear is given the
gradient that it gets in a loop if sum and weight are divided by the sum of all weights. For all
that N and T must be known before the first microbatch runs, which a model asks for by
`LayeredModel.totals`; they must be made of the batch alone (counts, masks).

Legend: B samples in the microbatch, N in the batch, S and T sums over samples.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxsys.errors import UsageError
from jaxsys.layered import PyTree
from jaxsys.train.adapt.alone import hand_on_alone
from jaxsys.train.adapt.linear import NOT_LINEAR, are_zero, moves
from jaxsys.train.adapt.mean import WAY_OUT, Term, number_of, terms_of
from jaxsys.train.adapt.places import names_of
from jaxsys.train.adapt.values import (
    BatchLeaf,
    Constant,
    Program,
    Value,
    needed,
    run,
    value_of,
)

FORMS = (
    "a loss returns (sum, weight), (sum, weight, metrics), a mean over samples or (mean, metrics), "
    "all scalars"
)

Made = Callable[[list[Any], list[Any]], list[Any]]
"""(what the head evaluates, totals) -> [sum, weight, *metrics]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """How sum, weight and metrics come of a program's outputs."""

    made: Made
    samples: int
    """B."""
    ahead: tuple[Value, ...] = ()
    """What of the batch alone must be summed over all of it, besides B."""
    needs: bool = False
    """Whether anything must be, as the loss is evaluated."""
    whole_weight: Callable[[list[Any]], Any] | None = None
    """Totals -> the sum of all weights, by which sum and weight are divided for the sake of
    derivatives; None where that is not needed."""

    def of(self, values: Sequence[Any], totals: Sequence[Any] | None, divide: bool) -> list[Any]:
        """[sum, weight, *metrics] of a microbatch.

        Args:
            values: the program's outputs; `ahead` are the last of them.
            totals: of the whole batch, see `ahead`; None if the microbatch is all there is.
            divide: by the sum of all weights, where derivatives need that.
        """
        values = list(values)
        own = [jnp.float32(self.samples), *values[len(values) - len(self.ahead) :]]
        totals = own if totals is None else list(totals)
        loss, weight, *metrics = self.made(values[: len(values) - len(self.ahead)], totals)
        if divide and self.whole_weight is not None:
            whole = jnp.float32(self.whole_weight(totals))
            loss, weight = loss / whole, weight / whole
        return [loss, weight, *metrics]


def sums_of(
    program: Program,
    microbatch: PyTree,
    again: Callable[[PyTree], Program],
    *,
    mean: bool,
    key: tuple[str, ...],
) -> Sums:
    """Takes a loss apart; the program's outputs are then what `Sums.of` reads.

    Args:
        program: whose outputs are loss, weight (of a mean nothing) and metrics.
        microbatch: shapes and dtypes.
        again: traces the program for another microbatch.
        mean: whether the loss is a mean.
        key: path of the leaf that holds the microbatch's key.

    Raises:
        UsageError: if a loss that is to be a mean is not seen to be one, is divided by what
            parameters enter, or has derivatives that microbatches would change.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(microbatch)
    number = next((n for n, (path, _) in enumerate(flat) if names_of(path) == key), None)
    leaves = [leaf for _, leaf in flat]
    lengths = [leaf.shape[0] for n, leaf in enumerate(leaves) if leaf.ndim and n != number]
    # Where leaves differ: of most, the others are no samples.
    samples = max(lengths, key=lengths.count, default=0)
    curved = any(operation.not_linear for operation in program.operations)

    @functools.cache
    def twice() -> Program:
        """The program for as many samples again."""
        doubled = [
            jax.ShapeDtypeStruct((2 * samples, *leaf.shape[1:]), leaf.dtype)
            if n != number and leaf.ndim and leaf.shape[0] == samples
            else leaf
            for n, leaf in enumerate(leaves)
        ]
        try:
            return again(jax.tree.unflatten(structure, doubled))
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"the model takes {samples} samples and not {2 * samples}, by which a mean is told "
                f"from a sum; {WAY_OUT}. JAX says: {str(error).splitlines()[0]}"
            ) from error

    loss = program.outputs[0]

    def alone() -> bool:
        """Whether samples keep to themselves on the way back; of one it is not seen."""
        if samples > 1:
            return hand_on_alone(loss, samples, number)
        return hand_on_alone(twice().outputs[0], 2, number)

    if mean:
        if not samples:
            raise UsageError(f"the microbatch has no samples to take a mean over; {FORMS}")
        found = _of_mean(program, samples, number, twice, curved)
    else:
        found = _of_sum(program, samples, number, twice, curved)
    if curved and not (samples and alone()):
        raise UsageError(
            f"{NOT_LINEAR}, and it is not seen to treat each sample's alone (a norm over the "
            "batch, or a parameter's gradient, is another number of a microbatch); clip each "
            "sample's alone, along axes of the batch's, or leave that to the optimizer"
        )
    for value in found.ahead:
        if not _is_of_batch(value, number):
            what = NOT_LINEAR if curved else "the loss adds means over different numbers"
            raise UsageError(
                f"{what}; that needs what the whole batch is divided by before it is run, and a "
                f"divisor is made of parameters or drawn; {WAY_OUT}"
            )
    if (found.needs or curved) and not isinstance(microbatch, Mapping):
        raise UsageError(
            "the loss needs what the whole batch is divided by, which is put into a leaf of the "
            f"batch; make batches dicts, not {type(microbatch).__name__}"
        )
    program.outputs = [*program.outputs, *found.ahead]
    program.operations = needed(program.operations, program.outputs)
    return found


class _Totals:
    """What is known of the whole batch while a microbatch is evaluated."""

    def __init__(self, samples: int, ahead: Sequence[Value], totals: Sequence[Any]) -> None:
        self.samples, (self.every, *whole) = samples, totals
        self.whole = dict(zip(ahead, whole, strict=True))

    @property
    def share(self) -> Any:
        """B / N."""
        return self.samples / self.every

    def part(self, terms: Sequence[Term], own: Mapping[Value, Any]) -> Any:
        """The microbatch's part of what terms are of the whole batch; parts add up to it.

        Args:
            terms: of a loss.
            own: what they are made of, of this microbatch.
        """
        total = jnp.float32(0)
        for term in terms:
            part = term.factor * own[term.value]
            if not term.seen:
                total += part
                continue
            if term.divisor is not None:
                part = part / term.divisor.guarded(self.whole[term.divisor.value])
            power = (not term.value.varies) - term.grows
            total += part * self.share**power if power else part
        return total


def _of_sum(
    program: Program,
    samples: int,
    key: int | None,
    twice: Callable[[], Program],
    curved: bool,
) -> Sums:
    """Of a loss that returns its sum and weight."""
    loss, weight, *metrics = program.outputs
    _check_divisor(program, weight)
    number, grows, terms = number_of(weight), 1, [Term(loss, 1.0, seen=False)]
    if samples:
        try:
            if number is not None and number_of(twice().outputs[1]) == number:
                grows = 0  # one number for any batch: the sum is not divided by what grows with it
            terms = terms_of(
                loss,
                samples,
                key,
                lambda: twice().outputs[0],
                strict=False,
                quick=bool(grows),
            )
        except UsageError:  # a model of so many samples alone
            pass
    if grows == 0:
        # What is not seen to be a sum is averaged.
        terms = [t if t.seen else t._replace(seen=True, grows=-1) for t in terms]
    if all(term.is_sum for term in terms) and grows:
        alone = (weight,) if curved and number is None else ()
        return Sums(
            made=lambda values, _: values,
            samples=samples,
            ahead=alone,
            whole_weight=_whole_weight(samples, number, grows) if curved else None,
        )
    divisors = [term.divisor.value for term in terms if term.divisor is not None]
    first: list[Value] = [*divisors, *([weight] if curved and number is None else [])]
    ahead: list[Value] = list(dict.fromkeys(first))
    for value in divisors:
        _check_divisor(program, value)
    read = list(dict.fromkeys([*(term.value for term in terms), weight, *metrics]))
    program.outputs = read

    def made(found: list[Any], totals: list[Any]) -> list[Any]:
        own = dict(zip(read, map(jnp.float32, found), strict=True))
        batch = _Totals(samples, ahead, totals)
        mine = own[weight] if grows else own[weight] * batch.share
        return [batch.part(terms, own), mine, *(own[value] for value in metrics)]

    whole = None
    if curved:
        place = 1 + ahead.index(weight) if number is None else 0
        whole = _whole_weight(samples, number, grows, place)
    return Sums(made=made, samples=samples, ahead=tuple(ahead), needs=True, whole_weight=whole)


def _whole_weight(
    samples: int, number: float | None, grows: int, place: int = 1
) -> Callable[[list[Any]], Any]:
    """Totals -> the sum of all weights: what is at a place, or a number that may grow with B."""
    if number is None:
        return lambda totals: totals[place]
    return lambda totals: number * (totals[0] / samples) ** grows


def _of_mean(
    program: Program,
    samples: int,
    key: int | None,
    twice: Callable[[], Program],
    curved: bool,
) -> Sums:
    """Of a loss that is a mean; the program's outputs become its sums."""
    loss, _, *metrics = program.outputs
    terms = terms_of(loss, samples, key, lambda: twice().outputs[0])
    divisors = [term.divisor for term in terms if term.divisor is not None]
    for one in divisors:
        _check_divisor(program, one.value)
    sums = [term for term in terms if term.value.varies]
    rests = [term for term in terms if not term.value.varies]
    masks = list({None if t.divisor is None else t.divisor.value: None for t in sums})
    plain = (
        len(masks) == 1
        and all(term.grows == (-1 if term.divisor is None else 0) for term in sums)
        and all(term.divisor is None and not term.grows for term in rests)
        and all(not one.guards or one.counts for one in divisors)
    )
    mask = masks[0] if plain else None
    means = [
        _of_metric(value, samples, key, lambda n=n: twice().outputs[n])
        for n, value in enumerate(metrics, 2)
    ]
    # By which metrics that are no means are averaged over microbatches.
    by = mask if None in means and mask is not None and _is_of_batch(mask, key) else None

    ahead = [] if plain and not curved else [one.value for one in divisors]
    ahead += [t.divisor.value for mean in means for t in mean or () if t.divisor is not None]
    ahead += [by] if by is not None else []
    ahead = list(dict.fromkeys(ahead))
    parts = [*terms, *(term for mean in means for term in mean or ())]
    read = list(dict.fromkeys([*(t.value for t in parts), *filter(None, masks), *metrics]))
    program.outputs = read

    def made(found: list[Any], totals: list[Any]) -> list[Any]:
        own = dict(zip(read, map(jnp.float32, found), strict=True))
        batch = _Totals(samples, ahead, totals)
        weight = jnp.float32(samples) if mask is None else own[mask]
        if plain:
            total = sum(term.factor * own[term.value] for term in sums)
            total = total if mask is not None else weight * total
            total += weight * sum((r.factor * own[r.value] for r in rests), jnp.float32(0))
        else:
            total = batch.every * batch.part(terms, own)
        mine = batch.share if by is None else own[by] / batch.whole[by]
        averaged = [
            own[value] * mine if mean is None else batch.part(mean, own)
            for value, mean in zip(metrics, means, strict=True)
        ]
        return [total, weight, *averaged]

    number = 0 if mask is None else 1 + ahead.index(mask) if curved else 0
    return Sums(
        made=made,
        samples=samples,
        ahead=tuple(ahead),
        needs=not plain or bool(metrics),
        whole_weight=(lambda totals: totals[number]) if curved else None,
    )


def _of_metric(
    value: Value, samples: int, key: int | None, twin: Callable[[], Value]
) -> list[Term] | None:
    """A metric over the whole batch; None where it is not seen to be a mean."""
    try:
        terms = terms_of(value, samples, key, twin)
    except UsageError:
        return None
    divisors = [term.divisor.value for term in terms if term.divisor is not None]
    return terms if all(_is_of_batch(one, key) for one in divisors) else None


def _check_divisor(program: Program, value: Value) -> None:
    """Raises UsageError if parameters move what a loss is divided by."""
    if value.depends and moves(value.aval) and _has_gradient(program, value):
        raise UsageError(
            "the loss is divided by what depends on parameters, whose gradient a step, which "
            "divides last, would leave out; divide by counts or weights of the batch, or by "
            "jax.lax.stop_gradient of it"
        )


def _has_gradient(program: Program, value: Value) -> bool:
    """Whether the gradient of a value with respect to parameters is other than zero."""
    operations = needed(program.operations, [value])
    read = dict.fromkeys([value, *(v for one in operations for v in one.inputs)])
    leaves = [v for v in read if v.maker is None and not isinstance(v, Constant)]
    moving = [leaf for leaf in leaves if leaf.depends and moves(leaf.aval)]

    def pulled(given: list[Any]) -> list[Any]:
        def of(chosen: list[Any]) -> Any:
            values = dict(zip(leaves, given, strict=True))
            values.update(zip(moving, chosen, strict=True))
            run(operations, values)
            return value_of(value, values)

        own = dict(zip(leaves, given, strict=True))
        made, back = jax.vjp(of, [own[leaf] for leaf in moving])
        return back(jnp.ones_like(made))[0]

    shapes = [jax.ShapeDtypeStruct(leaf.aval.shape, leaf.aval.dtype) for leaf in leaves]
    closed = jax.make_jaxpr(pulled)(shapes)
    return not are_zero(closed)


def _is_of_batch(value: Value, key: int | None) -> bool:
    """Whether a value is made of the batch alone, its key aside."""
    waiting, seen = [value], set()
    while waiting:
        one = waiting.pop()
        if one.depends or (isinstance(one, BatchLeaf) and one.number == key):
            return False
        if one not in seen and one.maker is not None:
            waiting += one.maker.inputs
        seen.add(one)
    return True
