"""A plan: how each block of data goes through devices and time, as a point of a finite space.

Data parallelism is one point. The others differ from it by how batch, features and layers are
split over devices, where state rests, and, layer by layer, how long a copy of the weights lives,
when the gradient is summed over devices and whether residuals are kept:

| weights | live | gradient | summed | residual | lives |
|---|---|---|---|---|---|
| stay | the whole step | once | after the last microbatch | keep | from F to B |
| within | from F to B | each | after every B | selective | what products made, likewise |
| between | from B to the next F | deferred | during the next F | recompute | in B alone |
| refetch | for one use | | | | |

Where layers rest on owners, B may be split into I (dL/dx) and W (dL/dw), and W put off. Nothing
here is a strategy's name; `recognise` finds names for plans.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import product
from typing import Any

from jaxsys.errors import UsageError
from jaxsys.fields import Fields
from jaxsys.files import parse_json, shown

FORMAT = "jaxsys-plan"
FORMAT_VERSION = 2
MOST_SIZE = 2**20
"""Of any one size of a plan in a file."""
MOST_LAYERS = 10_000
"""Likewise of its layers."""
_LEAST = dict.fromkeys(
    ("replicas", "shard", "features", "stages", "ring", "microbatch_size", "lookahead", "chunks"), 1
) | {"delay": 0}


class Weights(StrEnum):
    """How long a copy of a layer's weights lives."""

    STAY = "stay"
    WITHIN = "within"
    BETWEEN = "between"
    REFETCH = "refetch"


class Gradient(StrEnum):
    """When a layer's gradient is summed over devices."""

    ONCE = "once"
    EACH = "each"
    DEFERRED = "deferred"


class Residual(StrEnum):
    """What the backward pass finds of the forward pass."""

    KEEP = "keep"
    SELECTIVE = "selective"
    """What products and attention made; norms, rotations and gates are computed again."""
    RECOMPUTE = "recompute"
    """The layer's input alone."""


class State(StrEnum):
    """Where master weights and optimizer state rest."""

    WHOLE = "whole"
    SPLIT = "split"


class Order(StrEnum):
    """In which order a device runs its tasks."""

    DEPTH_FIRST = "depth-first"
    """A microbatch forward and back, then the next."""
    SIDE_BY_SIDE = "side-by-side"
    """One microbatch forward beside another's way back."""
    EARLIEST_BACKWARD = "earliest-backward"
    """A backward pass as soon as one can run."""
    EAGER_FORWARD = "eager-forward"
    """Likewise, after nearly twice as many forward passes."""
    SPACED = "spaced"
    """A backward pass a tick late, so that every hop travels under compute."""
    ALL_FORWARD = "all-forward"
    """Every forward pass first."""


class Backward(StrEnum):
    """Whether a backward pass is one task."""

    WHOLE = "whole"
    SPLIT = "split"
    """Two: I makes dL/dx, and W makes dL/dw of what I left, now or later."""


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
class Plan:
    """A point of the space. The product of the five ways is the number of devices."""

    replicas: int = 1
    """Copies of everything else, each on its part of the batch."""
    shard: int = 1
    """Devices that split a batch, and over which state, weights and gradients may be split."""
    features: int = 1
    """Parts of every block's features; the sequence is split alike between blocks."""
    stages: int = 1
    """Parts of the layers, each resting on its devices; activations travel."""
    ring: int = 1
    """Parts of the layers, each resting on its devices; weights travel."""
    microbatch_size: int = 1
    lookahead: int = 1
    """Ticks that a gather starts before its use and a sum may lag behind."""
    state: State = State.WHOLE
    order: Order = Order.DEPTH_FIRST
    chunks: int = 1
    """Runs of layers that each stage owns, apart from each other."""
    backward: Backward = Backward.WHOLE
    delay: int = 0
    """How far W is put off: in a pipeline microbatches per stage above, in a ring passes."""
    layers: tuple[LayerPath, ...]

    @property
    def devices(self) -> int:
        """N."""
        return self.replicas * self.shard * self.features * self.stages * self.ring

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
        plain = {k: v for k, v in raw.value.items() if k not in ("format", "version", "layers")}
        return Fields(plain, name=raw.name, hint=raw.hint).record(cls, layers=tuple(layers))


def data_parallel_plan(devices: int, layers: int) -> Plan:
    """Plain data parallelism, where every search starts."""
    path = LayerPath(weights=Weights.STAY, gradient=Gradient.ONCE, residual=Residual.KEEP)
    return Plan(shard=devices, layers=(path,) * layers)
