"""A plan: how each block of data goes through devices and time, as a point of a finite space.

Data parallelism is one point. The others differ from it by how batch, features and layers are
split over devices, where state rests, and, layer by layer, how long a copy of the weights lives,
when the gradient is summed over devices and whether residuals are kept:

| weights | live | gradient | summed | residual | lives |
|---|---|---|---|---|---|
| stay | the whole step | once | after the last microbatch | keep | from F to B |
| within | from F to B | each | after every B | selective | what products made, likewise |
| between | from B to the next F | deferred | during the next F | attention | what attention made |
| refetch | for one use | | | recompute | in B alone |

Where layers rest on owners, B may be split into I (dL/dx) and W (dL/dw), and W put off. Nothing
here is a strategy's name; `recognise` finds names for plans.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import product
from typing import Any

from jaxsys.axes import AXES, CALLED, Divided, parts_sharing
from jaxsys.context import ContextSplit, said_by
from jaxsys.errors import UsageError
from jaxsys.fields import Fields
from jaxsys.files import parse_json, shown
from jaxsys.schedule import Placement, why_not_divided
from jaxsys.strategies import (
    RECOMPUTES,
    Backward,
    Choices,
    Gradient,
    Order,
    State,
    Weights,
    orders,
)

FORMAT = "jaxsys-plan"
FORMAT_VERSION = 2
MOST_SIZE = 2**20
"""Of any one size of a plan in a file."""
MOST_LAYERS = 10_000
"""Likewise of its layers."""
_LEAST = dict.fromkeys((*AXES, "microbatch_size", "lookahead", "chunks"), 1) | {"delay": 0}


class Residual(StrEnum):
    """What the backward pass finds of the forward pass."""

    KEEP = "keep"
    SELECTIVE = "selective"
    """What products and attention made; norms, rotations and gates are computed again."""
    ATTENTION = "attention"
    """The layer's input and what attention made; all but attention is computed again."""
    RECOMPUTE = "recompute"
    """The layer's input alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPath:
    """The way of one layer's data."""

    weights: Weights
    gradient: Gradient
    residual: Residual

    def __str__(self) -> str:
        return f"{self.weights}/{self.gradient}/{self.residual}"


PATHS: tuple[LayerPath, ...] = tuple(
    LayerPath(weights=w, gradient=g, residual=r) for w, g, r in product(Weights, Gradient, Residual)
)
"""Every way a layer can go; plans are searched over indices into this."""
CODES: Mapping[LayerPath, int] = {path: code for code, path in enumerate(PATHS)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(Divided):
    """A point of the space, of so many parts along each of `jaxsys.axes.AXES` (`Divided`)."""

    microbatch_size: int = 1
    lookahead: int = 1
    """Ticks that a gather starts before its use and a sum may lag behind."""
    state: State = State.WHOLE
    order: str = Order.DEPTH_FIRST
    """An `Order`, or one that a strategy from elsewhere has for its own."""
    chunks: int = 1
    """Runs of layers that each stage owns, apart from each other."""
    backward: Backward = Backward.WHOLE
    delay: int = 0
    """How far W is put off: in a pipeline microbatches per stage above, in a ring passes."""
    layers: tuple[LayerPath, ...]

    def __post_init__(self) -> None:
        refused = why_not_divided(self)
        if refused is not None:
            raise UsageError(refused)

    @property
    def owners(self) -> int:
        """The devices on which layers rest apart; 1 where all have all layers."""
        return self.stages * self.ring

    @property
    def group(self) -> int:
        """The devices over which what is split lies: a shard group, and all that share its
        sequences; 1 where nothing is."""
        return self.shard * parts_sharing(self) if self.state is State.SPLIT else 1

    @property
    def sharers(self) -> int:
        """Devices within a place that add up gradients of weights that all of them have whole."""
        return 1 if self.state is State.SPLIT else parts_sharing(self)

    @property
    def split(self) -> ContextSplit | None:
        """How its sequences lie over devices; None where each is whole on one."""
        return said_by(self)

    @property
    def placement(self) -> Placement:
        """Where its layers rest."""
        if self.owners > 1:
            return Placement.OWNER
        return Placement.REPLICATED if self.state is State.WHOLE else Placement.SHARDED

    @property
    def recomputes_alike(self) -> bool:
        """Whether one policy of recompute must do for all layers: they run in one loop."""
        return not RECOMPUTES[self.placement].by_layer

    @property
    def schedule_devices(self) -> int:
        """The devices of the plan's schedule: replicas stand around them, and in each of them its
        members, and those that share sequences and features."""
        return self.shard * self.owners

    @property
    def choices(self) -> Choices:
        """What it chooses for the devices of its schedule, recompute left aside."""
        axis = "ring" if self.ring > 1 else "stages" if self.stages > 1 else "shard"
        if axis != "shard":
            return Choices(
                axis=axis,
                devices=self.schedule_devices,
                order=self.order,
                backward=self.backward,
                delay=self.delay,
                chunks=self.chunks,
            )
        return Choices(
            axis=axis,
            devices=self.shard,
            state=self.state,
            weights=frozenset(path.weights for path in self.layers),
            gradients=frozenset(path.gradient for path in self.layers),
        )

    @property
    def codes(self) -> tuple[int, ...]:
        """The layers as indices into `PATHS`."""
        return tuple(CODES[path] for path in self.layers)

    def to_json(self) -> dict[str, Any]:
        """A versioned JSON value; equal neighbouring layers are written as runs."""
        value = asdict(self)
        runs: list[dict[str, Any]] = []
        for path in self.layers:
            row = {k: str(v) for k, v in asdict(path).items()}
            if runs and runs[-1]["path"] == row:
                runs[-1]["count"] += 1
            else:
                runs.append({"count": 1, "path": row})
        value["layers"] = runs
        for name in ("state", "order", "backward"):
            value[name] = str(value[name])
        return {"format": FORMAT, "version": FORMAT_VERSION, **value}

    @classmethod
    def from_json(cls, value: Mapping[str, Any] | str) -> "Plan":
        """Reads `to_json`'s value or its text.

        Raises:
            UsageError: if it is no plan, or of another version.
        """
        read = parse_json(value, name="the plan") if isinstance(value, str) else value
        raw = Fields(read, name="", hint="make the plan again")
        if raw.get("format", None) != FORMAT:
            raise UsageError(f"not a plan: its format must be {FORMAT!r}")
        if raw.get("version", None) != FORMAT_VERSION:
            raise UsageError(
                f"plan version {shown(raw.value.get('version'))} cannot be read; this jaxsys reads "
                f"version {FORMAT_VERSION}: make the plan again"
            )
        for name, least in _LEAST.items():
            if name in raw.value:
                raw.integer(name, least=least, most=MOST_SIZE)
        layers: list[LayerPath] = []
        for run in raw.objects("layers"):
            count = run.integer("count", least=1, most=MOST_LAYERS)
            layers += [run.fields("path").record(LayerPath)] * count
            if len(layers) > MOST_LAYERS:
                raise raw.fault(f"it has more than {MOST_LAYERS} layers")
        for option in (one for axis in AXES.values() for one in axis.more):
            if option.choices is not None:
                raw.choice(option.name, option.choices, None)
        order = raw.choice("order", (*Order, *orders()), Order.DEPTH_FIRST)
        apart = ("format", "version", "layers", "order")
        plain = {k: v for k, v in raw.value.items() if k not in apart}
        plain = Fields(plain, name=raw.name, hint=raw.hint)
        return plain.record(cls, called=CALLED, layers=tuple(layers), order=order)


def data_parallel_plan(devices: int, layers: int) -> Plan:
    """Plain data parallelism, where every search starts."""
    path = LayerPath(weights=Weights.STAY, gradient=Gradient.ONCE, residual=Residual.KEEP)
    return Plan(shard=devices, layers=(path,) * layers)
