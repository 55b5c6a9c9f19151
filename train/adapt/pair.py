"""Whether a loss that returns two values returns a sum over samples and its weight.

`jax.value_and_grad(..., has_aux=True)` scripts return (mean, something) in the same form, which is
another thing: divided by that something, it would train otherwise without a word.

Legend: B samples in the microbatch.
"""

from collections.abc import Callable

from jaxsys.errors import UsageError
from jaxsys.train.adapt.axes import Unknown
from jaxsys.train.adapt.degree import degree_of
from jaxsys.train.adapt.mean import number_of, terms_of, unguarded
from jaxsys.train.adapt.states import states_of
from jaxsys.train.adapt.values import Operation, Value

Again = Callable[[int], Value]
"""Makes the same value of so many times B samples."""


def check_pair(
    loss: Value, weight: Value, samples: int, key: int | None, again: tuple[Again, Again]
) -> None:
    """Raises UsageError if what a loss returned is seen not to be (sum over samples, weight).

    Args:
        loss: the first value.
        weight: the second.
        samples: B.
        key: the microbatch's leaf that is its key.
        again: of the two.
    """
    if weight.depends:
        raise _refusal("the second depends on parameters, so it is no number of samples")
    try:
        # Not quickly: a number of samples may stand anywhere in what is summed up.
        terms = terms_of(loss, samples, key, again[0], strict=False)
        terms = [t for t in terms if t.value.varies]
        a_sum = any(t.seen and t.is_sum for t in terms)
        a_mean = not a_sum and any(t.divisor is not None or t.grows < 0 for t in terms)
        if not (a_sum or a_mean) and terms:
            others = (loss, again[0](2)) if samples > 1 else (again[0](2), again[0](4))
            a_mean = degree_of(*others) == 0
        grows = _grows(weight, samples, key, again[1])
    except UsageError:  # a model of so many samples alone
        a_sum, a_mean, grows = False, _is_average(loss), None
    by_one = number_of(weight) == 1.0 and not grows
    if a_mean and not by_one:
        raise _refusal("the first is a mean already")
    if a_sum and grows is False and number_of(weight) is None:
        raise _refusal("the second does not add up over samples")


def _grows(weight: Value, samples: int, key: int | None, again: Again) -> bool | None:
    """Whether a weight adds up over samples; None where operations are not followed."""
    number = number_of(weight)
    if number is not None:
        return number_of(again(2)) != number
    value, times = unguarded(weight)
    if times != 1.0 and unguarded(again(2))[1] != times:
        return False
    terms = terms_of(
        value, samples, key, lambda times: unguarded(again(times))[0], strict=False, quick=True
    )
    if all(term.seen for term in terms):
        return all(term.is_sum for term in terms)
    several = value if samples > 1 else unguarded(again(2))[0]
    states = states_of(several, max(samples, 2), key)
    return None if isinstance(states[several], Unknown) else False


def _is_average(value: Value) -> bool:
    """Whether a value is a sum divided by the number of what it adds up, as `jnp.mean` has it."""
    maker = _maker(value)
    if maker is None or maker.primitive.name not in ("div", "mul"):
        return False
    for one, other in (maker.inputs, maker.inputs[::-1]):
        number, summed = number_of(other), _maker(one)
        if number and summed is not None and summed.primitive.name == "reduce_sum":
            count = number if maker.primitive.name == "div" else 1 / number
            size = summed.inputs[0].aval.size
            return size > 1 and abs(count - size) < 1e-5 * size
    return False


def _maker(value: Value) -> Operation | None:
    """What made a value, conversions aside."""
    while value.maker is not None and value.maker.primitive.name == "convert_element_type":
        value = value.maker.inputs[0]
    return value.maker


def _refusal(what: str) -> UsageError:
    return UsageError(
        f"loss returned (first, second), which means (sum over samples, their weight), but {what}; "
        'return the loss alone, or (mean, {"accuracy": accuracy}), whatever else there is in a dict'
    )
