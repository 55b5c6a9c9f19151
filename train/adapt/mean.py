"""A loss that is a mean over samples, taken apart into a sum and a weight.

A step sees one microbatch at a time; the mean of the whole batch is sum(sums) / sum(weights). So a
mean must be seen to be one: it ends in sums over an array whose leading axis is the samples', each
sample's part made of that sample alone, divided by the array's size, by the number of samples or
by a sum of the same kind (of a mask). Anything else, such as a product of means in an auxiliary
loss, is another number for the whole batch than for its parts, and is refused.

Legend: B samples in the microbatch.
"""

from dataclasses import dataclass, field

from jaxsys.errors import UsageError
from jaxsys.train.adapt.program import BatchLeaf, Constant, Value

OUTPUT = "jaxsys_model_output"
"""The name of a model's outputs: what is made of each sample alone from there on is looked at."""

_WAY_OUT = (
    "return (sum over samples, their number) instead of a mean; each is then added up over "
    "microbatches"
)

_EACH = frozenset(
    ("abs", "add", "and", "ceil", "clamp", "convert_element_type", "copy", "cos")
    + ("custom_jvp_call", "div", "eq", "erf", "exp", "exp2", "expm1", "floor", "ge", "gt")
    + ("integer_pow", "is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min", "mul")
    + ("name", "ne", "neg", "not", "or", "pow", "rem", "round", "rsqrt", "select_n", "sign")
    + ("sin", "sqrt", "square", "stop_gradient", "sub", "tanh", "xor")
)
"""Element by element."""

_REDUCE = frozenset(
    ("argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_sum")
)


@dataclass(slots=True)
class Mean:
    """What a mean is made of: (sum of factor * sums) / divisor + sum of factor * rests."""

    sums: list[tuple[Value, float]] = field(default_factory=list)
    """Sums over samples, with factors."""
    divisor: Value | None = None
    """A sum over samples of a mask; None where factors hold the number of samples."""
    rests: list[tuple[Value, float]] = field(default_factory=list)
    """What no sample enters, such as the norm of parameters."""


def mean_of(loss: Value, samples: int) -> Mean:
    """The parts of a mean over samples.

    Args:
        loss: a scalar of a program.
        samples: B.

    Raises:
        UsageError: if the loss is not seen to be a mean over samples.
    """
    mean = Mean()
    divisors: set[Value | None] = set()
    for value, factor, divisor in _terms(loss, 1.0, samples):
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


def _terms(value: Value, factor: float, samples: int) -> list[tuple[Value, float, Value | None]]:
    """(sum, factor, divisor) of each term."""
    maker = value.maker
    if maker is None or not value.varies:
        return [(value, factor, None)]
    name, inputs = maker.primitive.name, maker.inputs
    if name in ("convert_element_type", "copy", "reshape", "squeeze"):
        return _terms(inputs[0], factor, samples)
    if name == "neg":
        return _terms(inputs[0], -factor, samples)
    if name in ("add", "sub"):
        sign = -1.0 if name == "sub" else 1.0
        ahead = _terms(inputs[0], factor, samples)
        return [*ahead, *_terms(inputs[1], sign * factor, samples)]
    if name == "mul":
        for one, other in (inputs, inputs[::-1]):
            if isinstance(one, Constant):
                return _terms(other, factor * float(one.words), samples)
    if name == "div":
        if isinstance(inputs[1], Constant):
            return _terms(inputs[0], factor / float(inputs[1].words), samples)
        divisor = _masked(inputs[1])
        if _is_sum(divisor, samples):
            terms = _terms(inputs[0], factor, samples)
            if all(mine is None for _, _, mine in terms):
                return [(value, own, divisor) for value, own, _ in terms]
    if _is_sum(value, samples):
        return [(value, factor, None)]
    raise UsageError(
        f"the loss is not seen to be a mean over samples (at {name}): for the whole batch it may "
        f"be another number than for its microbatches; {_WAY_OUT}"
    )


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


def _is_sum(value: Value, samples: int) -> bool:
    """Whether a scalar is a sum over samples of each one's own."""
    maker = value.maker
    if maker is None or value.aval.shape:
        return False
    name = maker.primitive.name
    if name in ("convert_element_type", "copy", "neg"):
        return _is_sum(maker.inputs[0], samples)
    if name != "reduce_sum":
        return False
    operand = maker.inputs[0]
    if samples == 1:
        return 0 in maker.parameters["axes"]  # whether it is one is seen at two, see `check_scales`
    return 0 in maker.parameters["axes"] and _by_sample(operand, samples, {})


def _by_sample(value: Value, samples: int, known: dict[Value, bool]) -> bool:
    """Whether the leading axis is the samples' and each one's part is made of that one alone."""
    if value not in known:
        known[value] = False
        shape = value.aval.shape
        known[value] = bool(shape) and shape[0] % samples == 0 and _made_so(value, samples, known)
    return known[value]


def _made_so(value: Value, samples: int, known: dict[Value, bool]) -> bool:
    if isinstance(value, BatchLeaf):
        return value.aval.shape[0] == samples
    maker = value.maker
    if maker is None:
        return False
    name, parameters, inputs = maker.primitive.name, maker.parameters, maker.inputs
    if name == "name" and parameters.get("name") == OUTPUT:
        return value.aval.shape[0] == samples
    first = inputs[0] if inputs else None
    if first is None:
        return False
    if name in _EACH:
        return any(v.varies for v in inputs) and all(
            _by_sample(v, samples, known) if v.varies else _same_for_all(v) for v in inputs
        )
    if not _by_sample(first, samples, known):
        # A table that is the same for all, read at each sample's own indices.
        return (
            name == "gather"
            and not first.varies
            and 0 not in parameters["dimension_numbers"].offset_dims
            and _by_sample(inputs[1], samples, known)
        )
    if name in _REDUCE:
        return 0 not in parameters["axes"]
    if name == "broadcast_in_dim":
        dimensions = parameters["broadcast_dimensions"]
        return bool(dimensions) and dimensions[0] == 0
    if name in ("reshape", "expand_dims"):
        return True  # rows stay in order
    if name == "squeeze":
        return 0 not in parameters["dimensions"]
    if name == "transpose":
        return parameters["permutation"][0] == 0
    if name == "slice":
        return value.aval.shape[0] == first.aval.shape[0]
    if name == "concatenate":
        return parameters["dimension"] != 0 and all(_by_sample(v, samples, known) for v in inputs)
    if name == "dot_general":
        (contracted, _), (batch, other_batch) = parameters["dimension_numbers"]
        if batch:
            paired = batch[0] == 0 and other_batch[0] == 0
            return paired and _by_sample(inputs[1], samples, known)
        return 0 not in contracted and not inputs[1].varies
    if name == "gather":
        numbers = parameters["dimension_numbers"]
        if 0 in numbers.offset_dims:  # rows whole, the same place of each
            moved = (*numbers.collapsed_slice_dims, *numbers.start_index_map)
            return 0 not in moved and not numbers.operand_batching_dims and not inputs[1].varies
        return (
            0 in numbers.operand_batching_dims
            and 0 in numbers.start_indices_batching_dims
            and _by_sample(inputs[1], samples, known)
        )
    return False


def _same_for_all(value: Value) -> bool:
    """Whether what does not vary with the microbatch is alike for all its samples."""
    shape = value.aval.shape
    if not shape or shape[0] == 1:
        return True
    maker = value.maker
    if maker is not None and maker.primitive.name == "broadcast_in_dim":
        dimensions = maker.parameters["broadcast_dimensions"]
        return 0 not in dimensions or maker.inputs[0].aval.shape[dimensions.index(0)] == 1
    return False
