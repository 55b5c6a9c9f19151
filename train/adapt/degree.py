"""How a value grows with the number of samples, whatever is done to sums on the way.

Told by two tracings, for B and 2 B samples: were all samples there twice, a sum over them would be
twice as large (degree 1), a mean the same (degree 0).
"""

import math

from jaxsys.train.adapt.mean import number_of
from jaxsys.train.adapt.samples import EACH
from jaxsys.train.adapt.values import Operation, Value

_KEEP = frozenset(
    ("abs", "broadcast_in_dim", "convert_element_type", "copy", "expand_dims", "neg", "reshape")
    + ("name", "reduce_max", "reduce_min", "slice", "squeeze", "stop_gradient", "transpose")
)
_ALIKE = frozenset(("add", "add_any", "concatenate", "max", "min", "select_n", "stack", "sub"))


def degree_of(one: Value, other: Value) -> float | None:
    """The power of B by which a value grows; None where that is not seen.

    Args:
        one: of B samples.
        other: the same of 2 B.
    """
    found: dict[tuple[Value, Value], float | None] = {}
    waiting = [(one, other)]
    while waiting:
        pair = waiting[-1]
        makers = pair[0].maker, pair[1].maker
        if pair in found:
            waiting.pop()
        elif (number := number_of(pair[0])) is not None:
            found[waiting.pop()] = _of_numbers(number, number_of(pair[1]))
        elif not (pair[0].depends or pair[0].varies) or makers == (None, None):
            found[waiting.pop()] = 0.0
        elif (
            makers[0] is None
            or makers[1] is None
            or makers[0].primitive is not makers[1].primitive
            or len(makers[0].inputs) != len(makers[1].inputs)
        ):
            found[waiting.pop()] = None
        else:
            inputs = list(zip(makers[0].inputs, makers[1].inputs, strict=True))
            ahead = [each for each in inputs if each not in found]
            if ahead:
                waiting += ahead
                continue
            degrees = [found[each] for each in inputs]
            found[waiting.pop()] = _made(makers[0], makers[1], degrees)
    return found[one, other]


def _of_numbers(number: float, other: float | None) -> float | None:
    if number == other or not number or math.isnan(number):
        return 0.0
    if not other or other / number <= 0:
        return None
    return round(math.log2(other / number), 4)  # of what is no power of 2, 1 / n is rounded


def _growth(length: int, other: int) -> float:
    return math.log2(other / length) if length and other else 0.0


def _made(one: Operation, other: Operation, given: list[float | None]) -> float | None:
    """Of what an operation makes of values whose degrees are these."""
    name = one.primitive.name
    degrees = [degree for degree in given if degree is not None]
    if len(degrees) < len(given):
        return None
    grows = _growth(*(o.outputs[0].aval.size for o in (one, other)))
    if name == "reduce_sum":
        return degrees[0] + _growth(*(o.inputs[0].aval.size for o in (one, other))) - grows
    if name == "dot_general":
        (axes, _), _ = one.parameters["dimension_numbers"]
        lengths = (math.prod(o.inputs[0].aval.shape[axis] for axis in axes) for o in (one, other))
        return sum(degrees) + _growth(*lengths)
    if name == "mul":
        return degrees[0] + degrees[1]
    if name == "div":
        return degrees[0] - degrees[1]
    if name == "integer_pow":
        return degrees[0] * one.parameters["y"]
    if name == "square":
        return 2 * degrees[0]
    if name in ("sqrt", "rsqrt"):
        return degrees[0] / (2 if name == "sqrt" else -2)
    if name in _KEEP:
        return degrees[0]
    if name in _ALIKE:
        return _alike(one, degrees)
    # All others, loops included, of what does not grow: element by element, where samples stay
    # apart, or where none is read.
    apart = name in EACH or (grows and not name.startswith("cum"))
    apart = apart or not any(value.varies for value in one.inputs)
    return 0.0 if apart and not any(degrees) else None


def _alike(one: Operation, degrees: list[float]) -> float | None:
    """Of what is chosen or added up of several; numbers aside, which guard."""
    start = 1 if one.primitive.name == "select_n" else 0
    several = {
        degree
        for value, degree in zip(one.inputs[start:], degrees[start:], strict=True)
        if number_of(value) is None
    }
    return several.pop() if len(several) == 1 else None if several else 0.0
