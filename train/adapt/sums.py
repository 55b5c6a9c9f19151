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
`LayeredModel.totals`; they must be made of the batch alone (counts, masks). Where a sample's part
reads such sums, or B, it is handed those of the whole batch: see `whole`.

Legend: B samples in the microbatch, N in the batch, S and T sums over samples.
"""

import dataclasses
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
from jaxsys.train.adapt.mean import WAY_OUT, Term, counts_in, number_of, terms_of
from jaxsys.train.adapt.pair import check_pair
from jaxsys.train.adapt.places import names_of
from jaxsys.train.adapt.values import (
    BatchLeaf,
    Constant,
    Program,
    Value,
    Whole,
    needed,
    run,
    value_of,
)
from jaxsys.train.adapt.whole import put_whole, round_of, value_of_whole

FORMS = (
    "a loss returns (sum, weight), (sum, weight, metrics), a mean over samples or (mean, metrics), "
    "all scalars"
)

_ALMOST_NONE = 1e-30
"""Less than any count, and no denormal."""

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
    wholes: tuple[Whole, ...] = ()
    """What a microbatch is handed of the whole batch."""
    needs: bool = False
    """Whether anything must be, as the loss is evaluated."""
    whole_weight: Callable[[list[Any]], Any] | None = None
    """Totals -> the sum of all weights, by which sum and weight are divided for the sake of
    derivatives; None where that is not needed."""

    @property
    def rounds(self) -> int:
        """How often all microbatches are looked at before the first one runs."""
        return 1 + max((round_of(whole) for whole in self.wholes), default=0)

    def ahead_in(self, number: int) -> list[Value]:
        """What of `ahead` is summed up in a round."""
        late = {whole.of: round_of(whole) for whole in self.wholes if whole.amount is None}
        return [value for value in self.ahead if late.get(value, 0) == number]

    def handed(self, totals: Sequence[Any]) -> list[Any]:
        """What a microbatch is handed, of what is summed up so far: [N, *ahead].

        In place of what is not there yet are zeros.
        """
        share = totals[0] / self.samples
        known = dict(zip(self.ahead, totals[1:], strict=False))
        return [
            value_of_whole(one, known.get(one.of, jnp.zeros(one.aval.shape)), share)
            for one in self.wholes
        ]

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
        UsageError: if a loss that is to be a mean is not seen to be one, or one that is to be sum
            and weight is seen to be none, is divided by what parameters enter, or has derivatives
            that microbatches would change.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(microbatch)
    number = next((n for n, (path, _) in enumerate(flat) if names_of(path) == key), None)
    leaves = [leaf for _, leaf in flat]
    lengths = [leaf.shape[0] for n, leaf in enumerate(leaves) if leaf.ndim and n != number]
    # Where leaves differ: of most, the others are no samples.
    samples = max(lengths, key=lengths.count, default=0)

    def grown(times: int) -> Program:
        """The program for so many times as many samples, traced anew."""
        more = [
            jax.ShapeDtypeStruct((times * samples, *leaf.shape[1:]), leaf.dtype)
            if n != number and leaf.ndim and leaf.shape[0] == samples
            else leaf
            for n, leaf in enumerate(leaves)
        ]
        try:
            return again(jax.tree.unflatten(structure, more))
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"the model takes {samples} samples and not {times * samples}, by which a mean is "
                f"told from a sum; {WAY_OUT}. JAX says: {str(error).splitlines()[0]}"
            ) from error

    if mean and not samples:
        raise UsageError(f"the microbatch has no samples to take a mean over; {FORMS}")
    traced = _Traced(program, samples, number, functools.cache(grown), mean)
    if not mean:
        loss, weight, *_ = program.outputs
        check_pair(loss, weight, samples, number, (traced.again(0), traced.again(1)))
    try:
        found = _of(traced)
        unseen = traced.unseen
    except UsageError as error:
        found, unseen = error, True
    if unseen and samples:
        found = _with_whole(traced, grown, len(leaves), found)
    if isinstance(found, UsageError):
        raise found
    if (found.needs or traced.curved) and not isinstance(microbatch, Mapping):
        raise UsageError(
            "the loss needs what the whole batch is divided by, which is put into a leaf of the "
            f"batch; make batches dicts, not {type(microbatch).__name__}"
        )
    program.outputs = [*traced.program.outputs, *found.ahead]
    program.operations = needed(traced.program.operations, program.outputs)
    return found


@dataclass(slots=True)
class _Traced:
    """A program that is looked at."""

    program: Program
    samples: int
    """B."""
    key: int | None
    """The batch's leaf that is its key."""
    grown: Callable[[int], Program]
    """The program for so many times as many samples."""
    mean: bool
    unseen: bool = False
    """Whether anything in a sum is not seen to be one."""

    @property
    def curved(self) -> bool:
        """Whether there are derivatives that are not linear."""
        return any(operation.not_linear for operation in self.program.operations)

    def again(self, output: int) -> Callable[[int], Value]:
        """An output for so many times as many samples."""
        return lambda times: self.grown(times).outputs[output]


def _with_whole(
    traced: _Traced, grown: Callable[[int], Program], leaves: int, found: "Sums | UsageError"
) -> "Sums | UsageError":
    """What is found once microbatches are handed what the whole batch has, if that helps."""
    try:
        programs = [grown(1), grown(2), grown(4)]
        wholes = put_whole(programs, traced.samples, leaves, traced.key)
        if not wholes:
            return found
        of_whole: dict[int, Program] = dict(zip((1, 2, 4), programs, strict=True))
        other = _Traced(
            programs[0], traced.samples, traced.key, lambda times: of_whole[times], traced.mean
        )
        better = _of(other)
    except UsageError as error:
        # What is left when all that the batch alone makes is known is the model's own doing.
        return error if isinstance(found, UsageError) else found
    if other.unseen:
        return found
    traced.program, traced.unseen = other.program, False
    kept = [whole for whole in wholes if whole.amount is None]
    ahead = (*better.ahead, *sorted((whole.of for whole in kept), key=_round_by(kept)))
    return dataclasses.replace(better, ahead=ahead, wholes=tuple(wholes), needs=True)


def _round_by(wholes: Sequence[Whole]) -> Callable[[Value], int]:
    rounds = {whole.of: round_of(whole) for whole in wholes}
    return lambda value: rounds[value]


def _of(traced: _Traced) -> Sums:
    """Takes a loss apart.

    Raises:
        UsageError: see `sums_of`.
    """
    program, samples, number, curved = traced.program, traced.samples, traced.key, traced.curved
    loss = program.outputs[0]

    def alone() -> bool:
        """Whether samples keep to themselves on the way back; of one it is not seen."""
        if samples > 1:
            return hand_on_alone(loss, samples, number)
        return hand_on_alone(traced.grown(2).outputs[0], 2, number)

    found = (_of_mean if traced.mean else _of_sum)(traced)
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
    return found


class _Totals:
    """What is known of the whole batch while a microbatch is evaluated."""

    def __init__(self, samples: int, ahead: Sequence[Value], totals: Sequence[Any]) -> None:
        self.samples, (self.every, *whole) = samples, totals
        self.whole = dict(zip(ahead, whole, strict=False))  # others are handed to programs

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
            part = term.scaled(own)
            if not term.seen:
                total += part
                continue
            if term.divisor is not None:
                part = part / term.divisor.guarded(self.whole[term.divisor.value])
            power = (not term.value.varies) - term.grows
            total += part * self.share**power if power else part
        return total


def _of_sum(traced: _Traced) -> Sums:
    """Of a loss that returns its sum and weight."""
    program, samples, curved = traced.program, traced.samples, traced.curved
    loss, weight, *metrics = program.outputs
    _check_divisor(program, weight)
    counted = counts_in(weight, samples, traced.key)
    if counted is not None:
        weight = counted
        program.outputs = [loss, weight, *metrics]
    number, grows, terms = number_of(weight), 1, [Term(loss, 1.0, seen=False)]
    if samples:
        try:
            if number is not None and number_of(traced.grown(2).outputs[1]) == number:
                grows = 0  # one number for any batch: the sum is not divided by what grows with it
            terms = terms_of(
                loss,
                samples,
                traced.key,
                traced.again(0),
                strict=False,
                quick=bool(grows),
            )
            traced.unseen = not all(term.seen for term in terms)
        except UsageError:  # a model of so many samples alone
            pass
    if grows == 0:
        # What is not seen to be a sum is averaged.
        terms = [t if t.seen else t._replace(seen=True, grows=-1) for t in terms]
    if all(term.is_sum for term in terms) and grows:
        alone = (weight,) if curved and number is None else ()

        def as_they_are(values: list[Any], _: list[Any]) -> list[Any]:
            weight = values[1] if counted is None else _above_zero(values[1])
            return [values[0], weight, *values[2:]]

        return Sums(
            made=as_they_are,
            samples=samples,
            ahead=alone,
            whole_weight=_whole_weight(samples, number, grows) if curved else None,
        )
    divisors = [term.divisor.value for term in terms if term.divisor is not None]
    first: list[Value] = [*divisors, *([weight] if curved and number is None else [])]
    ahead: list[Value] = list(dict.fromkeys(first))
    for value in divisors:
        _check_divisor(program, value)
    read = list(dict.fromkeys([*_read_by(terms), weight, *metrics]))
    program.outputs = read

    def made(found: list[Any], totals: list[Any]) -> list[Any]:
        own = dict(zip(read, map(jnp.float32, found), strict=True))
        batch = _Totals(samples, ahead, totals)
        mine = own[weight] if grows else own[weight] * batch.share
        mine = mine if counted is None else _above_zero(mine)
        return [batch.part(terms, own), mine, *(own[value] for value in metrics)]

    whole = None
    if curved:
        place = 1 + ahead.index(weight) if number is None else 0
        whole = _whole_weight(samples, number, grows, place)
    return Sums(made=made, samples=samples, ahead=tuple(ahead), needs=True, whole_weight=whole)


def _above_zero(count: Any) -> Any:
    """A count, of which there may be none in a microbatch or in all: 0 / 0 is 0 then."""
    return jnp.maximum(jnp.float32(count), _ALMOST_NONE)


def _whole_weight(
    samples: int, number: float | None, grows: int, place: int = 1
) -> Callable[[list[Any]], Any]:
    """Totals -> the sum of all weights: what is at a place, or a number that may grow with B."""
    if number is None:
        return lambda totals: totals[place]
    return lambda totals: number * (totals[0] / samples) ** grows


def _read_by(terms: Sequence[Term]) -> list[Value]:
    """What terms are made of, divisors aside."""
    return [v for term in terms for v in (term.value, *(value for value, _ in term.times))]


def _of_mean(traced: _Traced) -> Sums:
    """Of a loss that is a mean; the program's outputs become its sums."""
    program, samples, key, curved = traced.program, traced.samples, traced.key, traced.curved
    loss, _, *metrics = program.outputs
    terms = terms_of(loss, samples, key, traced.again(0))
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
    guarded = plain and any(one.guards for one in divisors)
    means = [_of_metric(value, samples, key, traced.again(n)) for n, value in enumerate(metrics, 2)]
    # By which metrics that are no means are averaged over microbatches.
    by = mask if None in means and mask is not None and _is_of_batch(mask, key) else None

    ahead = [] if plain and not curved else [one.value for one in divisors]
    ahead += [t.divisor.value for mean in means for t in mean or () if t.divisor is not None]
    ahead += [by] if by is not None else []
    ahead = list(dict.fromkeys(ahead))
    parts = [*terms, *(term for mean in means for term in mean or ())]
    read = list(dict.fromkeys([*_read_by(parts), *filter(None, masks), *metrics]))
    program.outputs = read

    def made(found: list[Any], totals: list[Any]) -> list[Any]:
        own = dict(zip(read, map(jnp.float32, found), strict=True))
        batch = _Totals(samples, ahead, totals)
        weight = jnp.float32(samples) if mask is None else own[mask]
        weight = _above_zero(weight) if guarded else weight
        if plain:
            total = sum(term.scaled(own) for term in sums)
            total = total if mask is not None else weight * total
            total += weight * sum((rest.scaled(own) for rest in rests), jnp.float32(0))
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
    value: Value, samples: int, key: int | None, again: Callable[[int], Value]
) -> list[Term] | None:
    """A metric over the whole batch; None where it is not seen to be a mean."""
    try:
        terms = terms_of(value, samples, key, again)
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
    moving = [
        leaf for leaf in leaves if leaf.depends and moves(leaf.aval) and not isinstance(leaf, Whole)
    ]

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
