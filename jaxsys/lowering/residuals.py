"""Chooses what a forward pass keeps, so that nothing is kept twice in other words.

`jax.vjp` keeps what each operation's own derivative asks for. Of silu(g) * u that is the sigmoid of
g, one less it, its silu, u and the product, all made from g and u; of a norm the input in float32
and again normalised. A compiler that sees both passes makes such values again inside the kernels
that use them. Across a buffer or another device's turn it cannot, so it is done here: a residual
that elementwise operations made from less is made again from that.

What a kernel has to write anyway is a stop: results of products, attention, reductions and whatever
else is not elementwise, and what those read.
"""

from typing import Any

from .jaxprs import VIEWS, bytes_of, is_literal

_ARITHMETIC = (
    *("add", "sub", "mul", "div", "rem", "neg", "max", "min", "abs", "sign", "square", "add_any"),
    *("sqrt", "rsqrt", "cbrt", "pow", "integer_pow", "exp", "exp2", "log", "log1p", "expm1"),
    *("tanh", "logistic", "sin", "cos", "tan", "erf", "erfc", "erf_inv"),
)
_CHOICES = (
    *("floor", "ceil", "round", "clamp", "select_n", "is_finite"),
    *("not", "and", "or", "xor", "eq", "ne", "lt", "le", "gt", "ge"),
)
_LAYOUT = (
    *("convert_element_type", "reduce_precision", "copy"),
    *("slice", "dynamic_slice", "concatenate", "pad", "rev", "iota"),
)
ELEMENTWISE = frozenset((*_ARITHMETIC, *_CHOICES, *_LAYOUT))
"""Primitives that a compiler fuses into the kernel that reads their result."""
SENT_AGAIN = frozenset(("all_gather", "ppermute"))
"""What devices gather from each other is gathered again, be it hop by hop: each keeps its own
part."""


def what_to_keep(jaxpr: Any, wanted: list[Any], given: set[Any]) -> list[Any]:
    """The variables from which `wanted` can be made again by elementwise operations alone.

    Args:
        jaxpr: of the forward pass, calls written out.
        wanted: variables that the backward pass asks for.
        given: input variables that the backward pass has as well; what depends on them alone is
            free, whatever it takes to make it.

    Returns:
        Variables of the jaxpr in its order, each once. Together they have at most the bytes of the
        distinct `wanted`.
    """
    makers = {v: e for e in jaxpr.eqns for v in e.outvars}
    free = set(given) | set(jaxpr.constvars)
    for equation in jaxpr.eqns:
        if all(is_literal(v) or v in free for v in equation.invars):
            free.update(equation.outvars)

    def bare(variable: Any) -> Any:
        """What a rearranged value was before; of two views of a value one is kept."""
        maker = makers.get(variable)
        while maker is not None and maker.primitive.name in VIEWS and variable not in free:
            (variable, *_) = maker.invars
            maker = makers.get(variable)
        return variable

    def is_made_by(variable: Any, names: frozenset[str]) -> bool:
        maker = makers.get(variable)
        return maker is not None and maker.primitive.name in names

    def fusible(variable: Any) -> bool:
        return is_made_by(variable, ELEMENTWISE) or is_made_by(variable, SENT_AGAIN)

    def stops(variable: Any) -> bool:
        if is_made_by(variable, SENT_AGAIN):
            return False
        return variable in read_by_kernels or not fusible(variable)

    read_by_kernels = {
        bare(v)
        for e in jaxpr.eqns
        if e.primitive.name not in ELEMENTWISE and e.primitive.name not in VIEWS
        if not e.primitive.name.startswith("reduce_")
        for v in e.invars
        if not is_literal(v)
    }
    kept: set[Any] = set()

    def sources(variable: Any) -> set[Any]:
        """The stops from which `variable` is made."""
        found, seen, wanted = set(), set(), list(makers[variable].invars)
        while wanted:
            v = wanted.pop()
            if is_literal(v) or v in seen or v in free:
                continue
            seen.add(v)
            v = bare(v)
            if v in free:
                continue
            if v in kept or stops(v):
                found.add(v)
            else:
                wanted.extend(makers[v].invars)
        return found

    asked = {bare(v) for v in wanted if not is_literal(v)} - free
    order = [v for v in [*jaxpr.invars, *makers] if v in asked]
    kept.update(v for v in order if stops(v))
    for variable in order:
        if variable not in kept:
            instead = sources(variable) - kept
            kept |= instead if sum(map(bytes_of, instead)) < bytes_of(variable) else {variable}
    return [v for v in [*jaxpr.invars, *makers] if v in kept]
