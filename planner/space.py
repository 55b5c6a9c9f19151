"""The space of plans, by subtraction: all that data dependencies allow, less what is excluded.

A `Space` starts with every split, placement, lifetime and order that the model's shapes and the
batch permit. Primitives take away from it:

    space = (
        Space.of(problem)
        .split("features", 2)                       # every block's features in two
        .copy("between", layers=range(16))          # lower layers keep their weights for the next F
        .not_("order", "all-forward")
    )

Memory is no constraint: it is pressure in the search. What must be where and when it is used is
one, and is not for the user to state: no point of the space breaks it.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from jaxsys.axes import AROUND, AXES, BATCH, SHARERS, parts_of_batch
from jaxsys.errors import UsageError, did_you_mean
from jaxsys.planner.axes import PLANNED
from jaxsys.planner.constraints import (
    RULE,
    Conflict,
    Domains,
    Relation,
    culprits,
    propagate,
    relation,
    satisfiable,
    solutions,
)
from jaxsys.planner.estimates import POLICY
from jaxsys.planner.orders import legal_order
from jaxsys.planner.plans import PATHS, Backward, Gradient, Order, Plan, Residual, State, Weights
from jaxsys.planner.problem import Problem
from jaxsys.strategies import orders

WAYS = tuple(AXES)
ORDER = ("order", "backward", "delay", "chunks")
SHARED = tuple(option.name for axis in AROUND.values() for option in axis.more)
COMMON = (*WAYS, *SHARED, "microbatch_size", "turns", "lookahead", "state", *ORDER)
COPIES = tuple(axis.name for axis in AROUND.values() if axis.copies)
LAYERED = ("weights", "gradient", "residual")
LOOKAHEADS = (1, 2, 4)
DELAYS = (0, 1, 2)
CHUNKS = (1, 2, 4)


@dataclass(frozen=True, kw_only=True)
class Space:
    """All plans of a problem that no constraint excludes. Make one with `Space.of`."""

    problem: Problem
    domains: Domains = field(repr=False)
    rules: tuple[Relation, ...] = field(repr=False)
    """What shapes, batch and data dependencies ask for."""
    user: tuple[Relation, ...] = ()
    """What has been taken away by primitives."""

    @classmethod
    def of(cls, problem: Problem, *, microbatch_sizes: Collection[int] | None = None) -> "Space":
        """Everything that shapes, batch and data dependencies allow.

        Args:
            problem: the problem.
            microbatch_sizes: the sizes to consider; powers of two that divide the batch, up to 8,
                if not given.
        """
        ways = tuple(_divisors(problem.cluster.devices))
        domains: Domains = {name: ways for name in WAYS}
        for axis in PLANNED.values():
            domains |= axis.domains(problem, ways)
        sizes = microbatch_sizes or [b for b in (1, 2, 4, 8) if problem.batch % b == 0]
        domains["microbatch_size"] = tuple(sizes)
        domains["turns"] = tuple(_divisors(problem.batch))
        domains["lookahead"] = LOOKAHEADS
        domains["state"] = tuple(State)
        domains |= {"order": (*Order, *orders()), "backward": tuple(Backward)}
        domains |= {"delay": DELAYS, "chunks": CHUNKS}
        known = problem.workload(1).recompute_policies
        residuals = tuple(residual for residual in Residual if POLICY[residual] in known)
        for layer in range(problem.layers):
            domains[f"weights[{layer}]"] = tuple(Weights)
            domains[f"gradient[{layer}]"] = tuple(Gradient)
            domains[f"residual[{layer}]"] = residuals
        rules = _rules(problem, _legal(problem, domains), whole=False)
        return cls(problem=problem, domains=domains, rules=tuple(rules))

    # Primitives. Each returns a narrower space.

    def domain(self, what: str, *values: Any, layers: Iterable[int] | None = None) -> "Space":
        """Allows only these values of `what`."""
        return self._narrow("domain", what, layers, lambda v: v in values, values)

    def not_(self, what: str, *values: Any, layers: Iterable[int] | None = None) -> "Space":
        """Excludes these values of `what`."""
        return self._narrow("not", what, layers, lambda v: v not in values, values)

    def split(self, what: str, ways: int) -> "Space":
        """Cuts `batch`, `sequences`, `state` or what an axis splits into parts on as many devices.

        `backward` is cut in two tasks, dL/dx and dL/dw, on the same device.
        """
        label = f"split {what} into {ways}"
        if what == "backward":
            if ways != 2:
                raise UsageError(f"a backward pass splits in 2, not in {ways}")
            return self.require(label, ("backward",), lambda b: b == Backward.SPLIT)
        if what in PLANNED:
            return self.require(label, (what,), lambda parts: parts == ways)
        if what == "sequences":
            return self.require(label, SHARERS, lambda *c: math.prod(c) == ways)
        if what == "batch":
            return self.require(label, (*COPIES, "shard"), lambda *n: math.prod(n) == ways)
        if what == "state":
            return self.require(
                label,
                ("state", "shard", *SHARERS),
                lambda t, s, *c: t == State.SPLIT and s * math.prod(c) == ways,
            )
        known = f"batch, sequences, {', '.join(PLANNED)}, state or backward"
        raise UsageError(f"cannot split {what!r}; split {known}")

    def assign(self, what: str, ways: int, *, travels: str) -> "Space":
        """Gives each of `ways` devices its own layers; `activations` or `weights` travel."""
        if what != "layers":
            raise UsageError(f"cannot assign {what!r}; assign layers")
        names = {"activations": "stages", "weights": "ring"}
        if travels not in names:
            raise UsageError(f"travels={travels!r} must be activations or weights")
        label = f"assign layers to {ways} devices while {travels} travel"
        return self.require(label, (names[travels],), lambda n: n == ways)

    def copy(self, until: str, *, layers: Iterable[int] | None = None) -> "Space":
        """How long copies of weights live: stay, within, between or refetch."""
        return self._narrow("copy", "weights", layers, lambda v: v == until, (until,))

    def reduce(self, when: str, *, layers: Iterable[int] | None = None) -> "Space":
        """When gradients are summed over devices: once, each or deferred."""
        return self._narrow("reduce", "gradient", layers, lambda v: v == when, (when,))

    def order(self, order: str, *, delay: int | None = None) -> "Space":
        """In which order devices run their tasks, and how far dL/dw is put off."""
        space = self._narrow("order", "order", None, lambda v: v == order, (order,))
        return space if delay is None else space.domain("delay", delay)

    def redirect(self, *, layers: Iterable[int] | None = None) -> "Space":
        """Takes residuals from computing the forward pass again instead of from memory."""
        wanted = Residual.RECOMPUTE
        return self._narrow("redirect", "residual", layers, lambda v: v == wanted, (wanted,))

    def require(self, label: str, variables: Iterable[str], allows: Callable[..., bool]) -> "Space":
        """Allows only what a predicate over the variables' values is true for."""
        names = tuple(variables)
        for name in names:
            if name not in self.domains:
                known = ", ".join([*COMMON, *(f"{w}[layer]" for w in LAYERED)])
                near = did_you_mean(name, self.domains)
                raise UsageError(
                    f"{name!r} is not a variable of the space{near}; there are {known}"
                )
        return replace(self, user=(*self.user, relation(label, names, self.domains, allows)))

    def _narrow(
        self,
        verb: str,
        what: str,
        layers: Iterable[int] | None,
        allows: Callable[[Any], bool],
        values: tuple[Any, ...],
    ) -> "Space":
        shown = ", ".join(str(v) for v in values)
        if what in LAYERED:
            every = range(self.problem.layers)
            chosen = list(every if layers is None else layers)
            wrong = [layer for layer in chosen if layer not in every]
            if wrong:
                raise UsageError(f"layers={wrong} are not among layers 0 to {len(every) - 1}")
            where = "" if layers is None else f" of layers {_runs(chosen)}"
            names = [f"{what}[{layer}]" for layer in chosen]
        elif layers is not None:
            raise UsageError(f"{what!r} is not told apart by layers; {', '.join(LAYERED)} are")
        else:
            where, names = "", [what]
        for name in names:
            if name in self.domains:
                legal = self.domains[name]
                odd = [v for v in values if v not in legal]
                if odd:
                    raise UsageError(
                        f"{what}={odd[0]!r} is not a value of the space; use one of "
                        f"{', '.join(str(v) for v in legal)}"
                    )
        label = f"{verb} {what}{where}: {shown}"
        space = self
        for name in names:
            space = space.require(label, (name,), allows)
        return space

    # Readers.

    @property
    def relations(self) -> tuple[Relation, ...]:
        """Rules and user constraints."""
        return (*self.rules, *self.user)

    @cached_property
    def left(self) -> Domains:
        """The domains after propagation.

        Raises:
            Conflict: if no plan is left; names the constraints that conflict.
        """
        found = propagate(self.domains, self.relations)
        if found is None or not satisfiable(found, self.relations):
            # Each rule by itself, where the others are not taken for granted.
            rules = _rules(self.problem, self.domains, whole=True)
            raise Conflict(culprits(self.domains, (*rules, *self.user)))
        return found

    def bases(self) -> Iterator[Plan]:
        """Every legal common part, with the first legal path in all layers."""
        for values in solutions(self.left, self.relations, COMMON):
            codes = self.codes(values)
            if codes is not None:
                layers = tuple(PATHS[options[0]] for options in codes)
                common = {k: v for k, v in values.items() if k != "turns"}
                yield Plan(layers=layers, **common)

    def codes(self, common: dict[str, Any]) -> list[np.ndarray] | None:
        """For each layer the codes that are legal beside a common part; None if one has none."""
        if any(value not in self.left[name] for name, value in common.items()):
            return None
        if self._across_layers:
            fixed = {name: (value,) for name, value in common.items()}
            domains = propagate({**self.left, **fixed}, self.relations)
            if domains is None:
                return None
            found = [self._codes_of_layer(layer, domains) for layer in range(self.problem.layers)]
        else:
            # Nothing ties layers together: like layers have like codes, found one by one.
            cache = self._codes_by_kind
            found = []
            for layer, (kind, needs) in enumerate(self._layer_kinds):
                key = (kind, tuple(common[name] for name in needs))
                if key not in cache:
                    cache[key] = self._codes_of_layer(layer, self._beside(layer, common))
                found.append(cache[key])
        return None if any(len(options) == 0 for options in found) else found

    def _beside(self, layer: int, common: dict[str, Any]) -> Domains:
        """A layer's domains beside a common part."""
        mine = {f"{what}[{layer}]" for what in LAYERED}
        fixed: Domains = {name: (value,) for name, value in common.items()}
        scope = {**fixed, **{name: self.left[name] for name in mine}}
        near = [one for one in self.relations if mine.intersection(one.variables)]
        return propagate(scope, near) or {name: () for name in mine}

    def _codes_of_layer(self, layer: int, domains: Domains) -> np.ndarray:
        weights, gradient, residual = (domains[f"{what}[{layer}]"] for what in LAYERED)
        return np.array(
            [
                code
                for code, path in enumerate(PATHS)
                if path.weights in weights
                and path.gradient in gradient
                and path.residual in residual
            ],
            int,
        )

    @cached_property
    def _codes_by_kind(self) -> dict[Any, np.ndarray]:
        return {}

    @cached_property
    def _across_layers(self) -> bool:
        """Whether any relation ties layers to each other."""
        return any(
            len({name[name.index("[") :] for name in one.variables if "[" in name}) > 1
            for one in self.relations
        )

    @cached_property
    def _layer_kinds(self) -> list[tuple[Any, tuple[str, ...]]]:
        """For each layer what its codes depend on: its relations, and the common names in them."""
        by_layer: list[list[Relation]] = [[] for _ in range(self.problem.layers)]
        for one in self.relations:
            for layer in {int(n[n.index("[") + 1 : -1]) for n in one.variables if "[" in n}:
                by_layer[layer].append(one)
        kinds = []
        for layer, relations in enumerate(by_layer):
            names = sorted({n for one in relations for n in one.variables if "[" not in n})
            shape = tuple(
                (tuple(n.split("[")[0] for n in one.variables), one.allowed) for one in relations
            )
            own = tuple(self.left[f"{what}[{layer}]"] for what in LAYERED)
            kinds.append(((shape, own), tuple(names)))
        numbers: dict[Any, int] = {}
        return [(numbers.setdefault(kind, len(numbers)), names) for kind, names in kinds]

    def codes_of(self, plan: Plan) -> list[np.ndarray] | None:
        """The legal codes beside a plan's common part, or None if that is not in the space."""
        turns = self._turns(plan)
        if turns is None:
            return None
        common = {name: getattr(plan, name) for name in COMMON if name != "turns"}
        common["turns"] = turns
        if any(value not in self.left[name] for name, value in common.items()):
            return None
        for one in self.relations:
            values = tuple(common.get(name) for name in one.variables)
            if None not in values and values not in one.allowed:
                return None
        return self.codes(common)

    def contains(self, plan: Plan) -> bool:
        """Whether no constraint excludes the plan."""
        options = self.codes_of(plan)
        if options is None:
            return False
        if plan.recomputes_alike and len({path.residual for path in plan.layers}) > 1:
            return False
        return all(code in legal for code, legal in zip(plan.codes, options, strict=True))

    def why_not(self, plan: Plan) -> str | None:
        """The first constraint that excludes a plan, in words; None if none does."""
        turns = self._turns(plan)
        if turns is None:
            return f"its microbatches do not divide a step of {self.problem.batch} sequences"
        values: dict[str, Any] = {n: getattr(plan, n) for n in COMMON if n != "turns"}
        values["turns"] = turns
        for layer, path in enumerate(plan.layers):
            values |= {f"{what}[{layer}]": getattr(path, what) for what in LAYERED}
        for name, value in values.items():
            if value not in self.domains[name]:
                legal = ", ".join(map(str, self.domains[name]))
                return f"{name}={value} is none of {legal}"
        for one in self.relations:
            if tuple(values[name] for name in one.variables) not in one.allowed:
                return one.label
        return None if self.contains(plan) else "layers that run in one loop recompute alike"

    def groups(self) -> list[list[int]]:
        """Layers that are alike in cost and in what they may do, together."""
        blocks = self.problem.workload(1).blocks
        found: dict[Any, list[int]] = {}
        for layer, block in enumerate(blocks):
            key = (block, *(self.left[f"{what}[{layer}]"] for what in LAYERED))
            found.setdefault(key, []).append(layer)
        return list(found.values())

    def _turns(self, plan: Plan) -> int | None:
        unit = parts_of_batch(plan) * plan.shard * plan.microbatch_size
        return None if self.problem.batch % unit else self.problem.batch // unit


def _legal(problem: Problem, domains: Domains) -> Domains:
    """The domains without the ways that a rule of one variable forbids."""
    layers = problem.layers

    def alone(label: str, names: tuple[str, ...], allows: Callable[..., bool]) -> Relation:
        if len(names) == 1:
            return relation(label, names, domains, allows)
        return Relation(label=label, variables=names, allowed=frozenset())

    legal = {name: tuple(n for n in domains[name] if n <= layers) for name in ("stages", "ring")}
    for axis in PLANNED.values():
        for one in axis.rules(problem, domains, alone):
            if len(one.variables) == 1:
                (name,) = one.variables
                legal[name] = tuple(n for n in domains[name] if (n,) in one.allowed)
    return {**domains, **legal}


def _rules(problem: Problem, domains: Domains, *, whole: bool) -> Iterator[Relation]:
    """Yields the built-in rules, each with its reason as label.

    Args:
        problem: what is planned.
        domains: what relations are written out over.
        whole: each says all that it allows, whatever others forbid; else what all of them allow is
            the same, in fewer tuples.
    """
    devices, layers, batch = problem.cluster.devices, problem.layers, problem.batch
    workload = problem.workload(1)

    def rule(label: str, names: tuple[str, ...], allows: Callable[..., bool]) -> Relation:
        return relation(f"{RULE}{label}", names, domains, allows)

    # Written out: of all there are, the ways that multiply to the devices are few.
    yield Relation(
        label=f"{RULE}{' x '.join(WAYS)} = {devices} devices",
        variables=WAYS,
        allowed=frozenset(
            found
            for found in _factorings(devices, [domains[name] for name in WAYS])
            if whole or _one_schedule(**dict(zip(WAYS, found, strict=True)))
        ),
    )
    for axis in PLANNED.values():
        yield from axis.rules(problem, domains, rule)
    for name in ("stages", "ring"):
        yield rule(f"{name} must be at most {layers} layers", (name,), lambda n: n <= layers)
    cuts = (*(AROUND[name].name for name in BATCH), "shard", "microbatch_size", "turns")
    product = " x ".join(cuts).replace("_", " ")
    yield Relation(
        label=f"{RULE}{product} = {batch} sequences of a step",
        variables=cuts,
        allowed=frozenset(_factorings(batch, [domains[name] for name in cuts])),
    )
    yield rule("the ring divides the microbatches", ("ring", "turns"), lambda w, k: k % w == 0)
    yield rule(
        "at most one of shard, stages and ring splits the schedule's devices",
        ("shard", "stages", "ring"),
        lambda s, p, w: (s > 1) + (p > 1) + (w > 1) <= 1,
    )
    yield rule(
        "what is split over a shard group has an axis that it divides",
        ("state", "shard", *SHARERS),
        lambda t, s, *c: t == State.WHOLE or workload.uncut(s * math.prod(c)) is None,
    )
    yield rule(
        "order, backward pass, its delay and chunks must suit stages or ring",
        ("stages", "ring", *ORDER),
        # What other rules forbid is not looked up, which takes longest.
        lambda p, w, *order: (
            (p == 1 or w == 1) and max(p, w) <= layers and legal_order(p, w, *order)
        ),
    )
    yield rule(
        f"stages x chunks must be at most {layers} layers",
        ("stages", "chunks"),
        lambda p, c: p * c <= layers,
    )
    yield rule(
        "stages of several chunks divide the microbatches",
        ("stages", "chunks", "turns"),
        lambda p, c, k: c == 1 or k % p == 0,
    )
    yield rule(
        "only split state is gathered ahead",
        ("lookahead", "state"),
        lambda a, t: a == 1 or t == State.SPLIT,
    )
    # With one microbatch `between` is `refetch`, `within` is `stay`, and there is no later forward
    # pass to sum in: nothing may be kept or put off across the update.
    at_rest = "weights and gradients that rest whole stay and are summed once"
    single = "with one microbatch nothing is kept for or put off to a next one"
    stay, refetch, once = Weights.STAY, Weights.REFETCH, Gradient.ONCE
    tied: tuple[tuple[str, str, str, Callable[..., bool]], ...] = (
        (at_rest, "weights", "state", lambda w, t: w == stay or t == State.SPLIT),
        (at_rest, "gradient", "state", lambda g, t: g == once or t == State.SPLIT),
        (single, "weights", "turns", lambda w, k: k > 1 or w in (stay, refetch)),
        (single, "gradient", "turns", lambda g, k: k > 1 or g == once),
    )
    for label, what, other, allows in tied:
        first = rule(label, (f"{what}[0]", other), allows)
        for layer in range(layers):
            yield replace(first, variables=(f"{what}[{layer}]", other))


def _one_schedule(*, shard: int, stages: int, ring: int, **around: int) -> bool:
    """Whether one axis at most splits the schedule's devices, and places that share what travels
    have a ring."""
    placed = any(around[axis.name] > 1 for axis in PLANNED.values() if axis.joins)
    return (shard > 1) + (stages > 1) + (ring > 1) <= 1 and (ring > 1 or not placed)


def _factorings(number: int, domains: Sequence[Sequence[int]]) -> Iterator[tuple[int, ...]]:
    """The ways to write a number as a product of one of each domain."""
    if not domains:
        if number == 1:
            yield ()
        return
    for first in domains[0]:
        if number % first == 0:
            for rest in _factorings(number // first, domains[1:]):
                yield first, *rest


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _runs(numbers: list[int]) -> str:
    """0, 1, 2, 5 -> "0-2, 5"."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)
