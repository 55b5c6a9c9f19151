"""What a program of the user's sends and holds on a device: its jaxpr, and the cuts of its inputs.

As a compiler does, elementwise operations are made inside what reads them, but for dear ones that
several read; partial sums are added up at the end of the program or of a turn of a loop, all at
once, if nothing but results needs them before, and not in place. Loops hold what they take apart
and what they stack from their first turn to their last.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jax.extend import core

from jaxsys.lowering.jaxprs import VIEWS, is_literal
from jaxsys.lowering.residuals import ELEMENTWISE
from jaxsys.planner.value_cuts import LOOPS, Cuts, alive, scan_counts

GATHERED = "gathered_weights"
"""The name, for `jax.checkpoint` policies, of a layer's weights once they are whole."""
FUSED = ELEMENTWISE | {*VIEWS, "gather", "dynamic_slice", "stop_gradient", "integer_pow"}
"""Operations that are made inside what reads them."""
ALIASES = frozenset(
    ("reshape", "squeeze", "expand_dims", "copy", "stop_gradient", "optimization_barrier")
)
"""Those whose result is their operand."""
DEAR = frozenset(
    {
        *("exp", "exp2", "log", "log1p", "expm1", "tanh", "logistic", "sin", "cos", "tan"),
        *("erf", "erfc", "erf_inv", "pow", "sqrt", "rsqrt", "cbrt", "div", "rem"),
    }
)
"""Operations that are not done again for each of several readers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramBytes:
    """What one run of a program sends and holds on a device."""

    summed: float
    """Results of all-reduces."""
    gathered: float
    """Results of all-gathers."""
    held: float
    """The most of temporaries and results at a time."""
    doubts: tuple[str, ...] = ()
    """What may be lower or higher in a compiled program, and why."""


def program_bytes(jaxpr: core.Jaxpr, cuts: Cuts, results: Sequence[float]) -> ProgramBytes:
    """What a program sends and holds.

    Args:
        jaxpr: with its calls written out.
        cuts: of its values.
        results: bytes of each of its results that a device is to have.
    """
    summed, gathered = _sent(jaxpr, cuts)
    return ProgramBytes(summed=summed, gathered=gathered, held=_Held(cuts).program(jaxpr, results))


def _sent(jaxpr: core.Jaxpr, cuts: Cuts) -> tuple[float, float]:
    summed = gathered = 0.0
    whole: dict[Any, float] = {}  # what is gathered is there for all who read it
    for equation in alive(jaxpr):
        for variable in equation.outvars:
            if variable in cuts.sums:
                summed += cuts.bytes_of(variable)
        whole |= cuts.gathered.get(id(equation), {})
        if is_gather(equation):
            gathered += cuts.bytes_of(equation.outvars[0])
        inside = [_sent(body, cuts) for body in cuts.bodies.get(id(equation), ())]
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        if inside:
            dearest = max(inside, key=sum)
            summed, gathered = summed + times * dearest[0], gathered + times * dearest[1]
    return summed, gathered + sum(whole.values())


def is_gather(equation: Any) -> bool:
    """Whether a layer's weights are gathered here."""
    return equation.primitive.name == "name" and equation.params.get("name") == GATHERED


class _Held:
    def __init__(self, cuts: Cuts) -> None:
        self.cuts = cuts

    def program(self, jaxpr: core.Jaxpr, results: Sequence[float]) -> float:
        """The most bytes at a time besides the inputs: results have a place of their own."""
        kernels = _Kernels(jaxpr, self.cuts)
        after: list[float] = []
        for variable, wanted in zip(jaxpr.outvars, results, strict=True):
            if is_literal(variable):
                continue
            mine = self.cuts.bytes_of(variable)
            if variable not in kernels.after:
                for made in kernels.source.get(variable, ()):
                    kernels.instead[made] = 0.0
            elif wanted >= mine:
                after.append(mine)
        # Of sums that are added up at the end some are results, others are cut down or added.
        late = max(0.0, kernels.late_bytes - sum(after))
        return sum(results) + self.most(kernels, late, sorted(after))

    def most(self, kernels: "_Kernels", late_bytes: float, places: Sequence[float] = ()) -> float:
        """The most at a time; `places` are results' that stand empty until the end."""
        held: dict[Any, float] = {}
        most = 0.0
        for index, (equation, read) in enumerate(kernels.rows):
            name = equation.primitive.name
            dying = [v for v in read if kernels.last.get(v) == index and v in held]
            kept = set(kernels.apart(equation)) if name in LOOPS else set()
            if name in FUSED or name in LOOPS:  # a result takes the place of what is read last
                for variable in [v for v in dying if v not in kept]:
                    del held[variable]
            held |= {v: kernels.bytes_of(v) for v in equation.outvars}
            held |= {turned: turned.size for turned in kernels.turned.get(index, ())}
            copied = kernels.copied & read
            held |= {v: kernels.bytes_of(v) for v in copied}
            dying += [v for v in copied if kernels.last.get(v) == index]
            inside = 0.0
            for body in self.cuts.bodies.get(id(equation), ()):
                turn = _Kernels(body, self.cuts, _slices(equation, body))
                inside = max(inside, self.most(turn, turn.late_bytes))
            # A partial sum and the sum are there at once.
            beside = sum(kernels.bytes_of(v) for v in equation.outvars if v in kernels.early)
            now = sum(held.values()) + inside + beside
            if now > most:
                most = max(most, now - _fitted(held.values(), places))
            for variable in [*dying, *equation.outvars]:
                if kernels.last.get(variable, index) <= index:
                    held.pop(variable, None)
        return max(most, sum(held.values()) + late_bytes)


def _fitted(sizes: Iterable[float], places: Sequence[float]) -> float:
    """Bytes of values that lie in the places of later ones, one in each, places in order."""
    left, fitted = sorted(sizes), 0.0
    waiting: list[float] = []
    for place in places:
        while left and left[0] <= place:
            waiting.append(left.pop(0))
        if waiting:
            fitted += waiting.pop()
    return fitted


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class _Turned:
    """A copy of a value with its axes in another order."""

    size: float


def _slices(equation: Any, body: core.Jaxpr) -> set[Any]:
    """What a turn of a loop has of arrays that the loop takes apart."""
    if equation.primitive.name != "scan":
        return set()
    return set(body.invars[sum(scan_counts(equation, body)) :])


class _Kernels:
    """The operations whose results are written to memory, and the written ones that each reads."""

    def __init__(
        self, jaxpr: core.Jaxpr, cuts: Cuts, slices: Collection[Any] = frozenset()
    ) -> None:
        self.cuts = cuts
        self.equations = alive(jaxpr)
        self.made = {v: e for e in self.equations for v in e.outvars}
        self.instead: dict[Any, float] = {}
        self.written = self._written(jaxpr)
        self.copied = self.written & set(slices)
        """Slices that no product reads where they lie."""
        outputs = [v for v in jaxpr.outvars if not is_literal(v)]
        self.late = self._late(outputs)
        """Partial sums that only results read: added up at the end."""
        self.early = {v for v in cuts.sums if v in self.made} - self.late
        self.late_bytes = sum(cuts.bytes_of(v) for v in self.late)
        source: dict[Any, set[Any]] = {v: {v} for v in [*jaxpr.invars, *jaxpr.constvars]}
        self.source = source
        self.after = after = set(self.late)  # what is made of sums takes their place
        self.rows: list[tuple[Any, set[Any]]] = []
        for equation in self.equations:
            read: set[Any] = set()
            for variable in equation.invars:
                if not is_literal(variable):
                    read |= source.get(variable, set())
            name = equation.primitive.name
            if any(v in after for v in equation.invars if not is_literal(v)):
                after.update(equation.outvars)
                continue
            if name == "optimization_barrier":
                for out, given in zip(equation.outvars, equation.invars, strict=True):
                    source[out] = set() if is_literal(given) else source.get(given, set())
            elif name in FUSED | ALIASES and not any(v in self.written for v in equation.outvars):
                for out in equation.outvars:
                    source[out] = read
            elif name == "name" and not is_gather(equation):
                source[equation.outvars[0]] = read
            else:
                for out in equation.outvars:
                    source[out] = {out}
                if name == "broadcast_in_dim" and is_literal(equation.invars[0]):
                    self.instead[equation.outvars[0]] = 0.0  # a constant, made where it is read
                self.rows.append((equation, read))
        self.turned = self._turned()
        self.last: dict[Any, int] = {}
        for index, (_, read) in enumerate(self.rows):
            self.last.update(dict.fromkeys(read, index))
        results = {v for out in outputs if out not in after for v in source.get(out, ())}
        for variable in results | self.late:
            self.last[variable] = len(self.rows)

    def bytes_of(self, variable: Any) -> float:
        return self.instead.get(variable, self.cuts.bytes_of(variable))

    def apart(self, equation: Any) -> Iterator[Any]:
        """What a loop holds from its first turn to its last: all but what it carries."""
        if equation.primitive.name != "scan":
            return
        (body,) = self.cuts.bodies[id(equation)]
        consts, carried = scan_counts(equation, body)
        for index, variable in enumerate(equation.invars):
            if not is_literal(variable) and not consts <= index < consts + carried:
                yield from self.source.get(variable, ())

    def base(self, variable: Any) -> Any:
        """What a value is, whose shape alone is another."""
        while variable in self.made and self.made[variable].primitive.name in ALIASES:
            maker = self.made[variable]
            place = maker.outvars.index(variable)
            variable = maker.invars[place if len(maker.outvars) > 1 else 0]
            if is_literal(variable):
                return None
        return variable

    def _written(self, jaxpr: core.Jaxpr) -> set[Any]:
        written = {self.base(v) for v in jaxpr.outvars if not is_literal(v)}
        for equation in self.equations:
            name = equation.primitive.name
            if name in ALIASES or name == "name" and not is_gather(equation):
                continue
            if name not in FUSED:
                written |= set(equation.outvars)
                read = [self.base(v) for v in equation.invars if not is_literal(v)]
                if name.startswith("reduce_"):  # a sum of products makes them as it goes
                    read = [x for v in read for x in self._factors(v)]
                written.update(read)
        # In which kernels a value is made again; a dear one in one alone.
        kernels: dict[Any, set[int]] = {}
        for equation in reversed(self.equations):
            name = equation.primitive.name
            here = {id(equation)}
            if name in FUSED | ALIASES and not any(v in written for v in equation.outvars):
                here = set[int]().union(*(kernels.get(v, set()) for v in equation.outvars))
                if len(here) > 1 and name in DEAR:
                    written |= set(equation.outvars)
                    here = {id(equation)}
            for variable in equation.invars:
                if not is_literal(variable):
                    kernels.setdefault(variable, set()).update(here)
        return written

    def _turned(self) -> dict[int, list[_Turned]]:
        """Row -> copies of what it makes for convolutions that read it with other axes.

        They are made at once, however late they are read: of a kernel's gradient both operands.
        """
        made_at = {v: index for index, (e, _) in enumerate(self.rows) for v in e.outvars}
        found: dict[int, list[_Turned]] = {}
        for equation, read in self.rows:
            if equation.primitive.name != "conv_general_dilated":
                continue
            numbers = equation.params["dimension_numbers"]
            specs = numbers.lhs_spec, numbers.rhs_spec
            if numbers.lhs_spec[0] == 0:  # examples first, as they come
                continue
            for variable, _ in zip(equation.invars, specs, strict=False):
                base = None if is_literal(variable) else self.base(variable)
                if base is None:
                    continue
                copy = _Turned(size=self.bytes_of(base))
                found.setdefault(made_at.get(base, 0), []).append(copy)
                read.add(copy)
        return found

    def _factors(self, variable: Any) -> list[Any]:
        maker = self.made.get(variable)
        if maker is None or maker.primitive.name not in ("mul", "square", "integer_pow"):
            return [variable]
        return [self.base(v) for v in maker.invars if not is_literal(v)]

    def _late(self, outputs: Collection[Any]) -> set[Any]:
        """Partial sums that nothing reads but what makes results of them elementwise."""
        needed: set[Any] = set()
        for equation in reversed(self.equations):
            name = equation.primitive.name
            passes = name in FUSED | ALIASES and not any(v in needed for v in equation.outvars)
            if not passes:
                needed.update(v for v in equation.invars if not is_literal(v))
        return {v for v in self.cuts.sums if v in self.made and v not in needed}
