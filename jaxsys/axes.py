"""Axes, named once: in what ways a plan splits a step over devices.

A row says all of an axis that depends on neither model nor cluster: what its devices have a part
of, the mesh axis that runs it and where that stands, and what it is asked for by. Meshes,
schedules, plans, the trainer, its command and `jaxsys plan` ask this table; what an axis costs and
when it is legal says `jaxsys.planner.axes`, how a decoder is cut along it `jaxsys.model.parts`.

`RING` is the mesh axis along which schedules run (weights, activations or shards move on it);
`DATA` holds replicas of whole rings. Four more are there where a step is split so: along `TENSOR`
devices share the features of every block, along `CONTEXT` its sequences, along `EXPERT` its
experts, each beside its part of the batch, and along `MEMBER` the chunks of a place of a ring,
likewise.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from jaxsys.errors import did_you_mean

RING = "ring"
DATA = "data"
TENSOR = "tensor"
EXPERT = "expert"
CONTEXT = "context"
"""Devices that share every sequence in each place of a ring."""
MEMBER = "member"
"""Devices of one place of a ring, a node: each holds and sends a piece of every chunk that is
there, and computes microbatches of its own."""


Way = Literal["ring", "gather", "ulysses", "mixed"]
"""What travels between devices that share a sequence. `ring`: keys and values, from device to
device, while queries stay. `gather`: keys and values, to every device at once. `ulysses`: each
device gives up tokens for heads, and back. `mixed`: heads are exchanged among neighbours, keys and
values go round a ring of such groups."""

WAYS: tuple[Way, ...] = get_args(Way)

Joining = Literal["gather", "ring"]
"""How devices that share features join what each has or made. `gather`: activations are gathered
before products and summed after them. `ring`: both in pieces, from device to device, beside the
products."""

JOININGS: tuple[Joining, ...] = get_args(Joining)


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """What says how an axis splits, beside its number of parts."""

    name: str
    """A field of schedules and plans; of `jaxsys train` an option, with hyphens."""
    help: str
    """What that option says of itself."""
    choices: tuple[str, ...] | None = None
    """Its values; None: whole numbers."""
    metavar: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One way to split a step over devices; a plan says into how many parts."""

    name: str
    """Of its number of parts in plans, and in schedules where it stands around them."""
    splits: str
    """What each of its devices has a part of."""
    mesh: str | None
    """The mesh axis that `jaxsys.lowering` runs it on; None: no schedule does."""
    user: str
    """The mesh axis of `jaxsys.planner.plan`, for a step that `jax.jit` partitions."""
    costs: str
    """What it sends, and where that is counted."""
    asked: str = ""
    """What it is asked for by: an argument of `Trainer`, an option of `jaxsys train`."""
    help: str = ""
    """What that option says of itself."""
    more: tuple[Option, ...] = ()
    """What is asked for beside the number."""
    within: bool = False
    """Its devices are of one place of a ring; else whole rings stand beside each other."""
    batch: bool = False
    """Each of its devices has microbatches of its own."""
    block: bool = False
    """A block itself is split, and its devices run one schedule's tasks together."""
    shards: bool = False
    """What rests in shards is cut over its devices as well as over the ring's."""
    place: str | None = None
    """What a place of a ring is called that its devices share, where that has a name."""

    @property
    def copies(self) -> bool:
        """Its devices have all that a schedule has, and but another part of the batch."""
        return not (self.within or self.block)

    @property
    def shares(self) -> bool:
        """Its devices compute every task of a place together, each with all of its weights."""
        return self.within and not (self.batch or self.block)

    @property
    def joint(self) -> bool:
        """Its devices need each other within a task, and so compute none of it alone."""
        return self.block or self.shares


@dataclass(frozen=True, slots=True, kw_only=True)
class DividedAround:
    """Parts along the axes that stand around a schedule's devices, or within each of them."""

    replicas: int = 1
    """Copies of everything else, each on its part of the batch."""
    experts: int = 1
    """Copies that share the experts of every block, each on its part of the batch."""
    context: int = 1
    """Devices that compute every task together, each a part of its sequences; what is split over a
    shard group is split over these too. See `jaxsys.schedule.inside`."""
    context_by: str = "ring"
    """What travels between devices that share a sequence: one of `WAYS`."""
    context_exchange: int | None = None
    """How many neighbours of them exchange heads, where that is `mixed`."""
    members: int = 1
    """Devices in each place of a ring, as those of a node: each has and sends a piece of its
    weights and their gradients, and computes microbatches of its own. What a task reads is joined
    among them before it, what it adds is cut among them after."""
    features: int = 1
    """Devices that compute every task together, each a part of every block's features; the
    sequence is split alike between blocks."""
    features_by: str = "gather"
    """How devices that share features join them: one of `JOININGS`."""

    @property
    def joint(self) -> bool:
        """Whether devices need each other within a task."""
        return any(getattr(self, axis.name) > 1 for axis in AROUND.values() if axis.joint)


@dataclass(frozen=True, slots=True, kw_only=True)
class Divided(DividedAround):
    """Parts along all axes; their product is the number of devices."""

    shard: int = 1
    """Devices that split a batch, and over which state, weights and gradients may be split."""
    stages: int = 1
    """Parts of the layers, each resting on its devices; activations travel."""
    ring: int = 1
    """Parts of the layers, each resting on its devices; weights travel."""

    @property
    def devices(self) -> int:
        """N."""
        return math.prod(getattr(self, axis) for axis in AXES)


AXES: Mapping[str, Axis] = MappingProxyType(
    {
        axis.name: axis
        for axis in (
            Axis(
                name="replicas",
                splits="the batch, around everything else",
                mesh=DATA,
                user="replica",
                costs="gradients, summed once a step: `planner.costs.frame`",
                asked="replicas",
                help="rings side by side (default 1)",
                batch=True,
            ),
            Axis(
                name="experts",
                splits="every block's experts, and the batch around the ring",
                mesh=EXPERT,
                user="replica",
                costs="rows to experts and back: `planner.axes.experts`; other gradients, summed "
                "once a step: `planner.costs.frame`",
                asked="expert",
                help="devices that share every block's experts, each beside its own microbatches "
                "(default 1, or as a plan says)",
                batch=True,
                block=True,
            ),
            Axis(
                name="shard",
                splits="the batch, and where state is split masters, weights and gradients",
                mesh=RING,
                user="shard",
                costs="gathers and sums of a layer: moves of `strategies.zero`, `data_parallel`",
            ),
            Axis(
                name="context",
                splits="every sequence, and where state is split masters, weights and gradients",
                mesh=CONTEXT,
                user="shard",
                costs="keys and values, or heads for tokens: `planner.sharing`; gradients "
                "that are not split, summed once a step: `planner.costs.frame`",
                asked="context",
                help="devices that share every sequence in each place of a ring (default 1)",
                more=(
                    Option(
                        name="context_by",
                        choices=WAYS,
                        help="what travels between them: keys and values round a ring or to all "
                        "at once, heads for sequence, or heads among neighbours in a ring of such "
                        "groups (default ring)",
                    ),
                    Option(
                        name="context_exchange",
                        metavar="U",
                        help="neighbours that exchange heads, with --context-by mixed",
                    ),
                ),
                within=True,
                shards=True,
            ),
            Axis(
                name="members",
                splits="what rests and travels in each place of a ring, and the batch around it",
                mesh=MEMBER,
                user="shard",
                costs="pieces of a chunk joined and its gradient cut, in every task: "
                "`planner.costs.block_cost`",
                asked="members",
                help="devices of a node that share each place of a weight ring: a chunk goes from "
                "node to node in so many pieces at once (default 1, or as a plan says)",
                within=True,
                batch=True,
                shards=True,
                place="node",
            ),
            Axis(
                name="features",
                splits="every block's features, and the sequence between blocks",
                mesh=TENSOR,
                user="features",
                costs="activations, joined twice a pass: `planner.axes.features`",
                asked="tensor",
                help="devices that share every block's features and the sequence between blocks "
                "(default 1, or as a plan says)",
                more=(
                    Option(
                        name="features_by",
                        choices=JOININGS,
                        help="how they join them: gathered before products and summed after them, "
                        "or piece by piece round a ring beside the products (default gather)",
                    ),
                ),
                within=True,
                block=True,
            ),
            Axis(
                name="stages",
                splits="the layers, each resting on its devices while activations travel",
                mesh=RING,
                user="shard",
                costs="an activation a hop: moves of `strategies.stages`",
            ),
            Axis(
                name="ring",
                splits="the layers, each resting on its devices while weights travel",
                mesh=RING,
                user="shard",
                costs="a chunk's weights and gradient a hop: moves of `strategies.weipipe`",
            ),
        )
    }
)
"""Name -> axis, from the outermost in; a plan has a number of parts for each (`Divided`)."""

MESH: tuple[str, ...] = tuple(
    dict.fromkeys(axis.mesh for axis in AXES.values() if axis.mesh is not None)
)
"""The mesh axes, from the outermost in: the last one's neighbours are adjacent devices."""

AROUND: Mapping[str, Axis] = MappingProxyType(
    {axis.mesh: axis for axis in AXES.values() if axis.mesh not in (None, RING)}
)
"""Mesh axis -> axis, of all that stand around a ring or within its places: a schedule has a number
of parts for each, by its name (`DividedAround`)."""

CALLED: Mapping[str, str] = MappingProxyType(
    {word: axis.name for mesh, axis in AROUND.items() for word in (mesh, axis.asked)}
)
"""What users call the number of parts along an axis -> what plans and schedules call it."""
ALWAYS = (DATA, RING)
"""The mesh axes that every mesh has, be they of one device."""
SHARING: tuple[str, ...] = tuple(name for name, axis in AROUND.items() if axis.shares)
"""Mesh axes whose devices compute a task together, and have the same rows of a batch."""
PIECES: tuple[str, ...] = tuple(n for n, axis in AROUND.items() if axis.within and axis.batch)
"""Mesh axes whose devices have pieces of what rests and travels in a place of a ring."""
SHARERS: tuple[str, ...] = tuple(AROUND[name].name for name in SHARING)
"""Likewise by the names that plans have for them."""
INNER: tuple[str, ...] = tuple(name for name, axis in AROUND.items() if axis.block)
"""Mesh axes along which a block itself is split, and whose devices run one schedule's tasks
together."""
CUT: tuple[Axis, ...] = tuple(axis for axis in AROUND.values() if axis.block and axis.within)
"""The axes along which a block's own products and matrices are split in one place."""
BATCH: tuple[str, ...] = tuple(name for name, axis in AROUND.items() if axis.batch)
"""Mesh axes beside the ring along which the batch is split, from the outermost in."""


def parts_around(parts: DividedAround) -> dict[str, int]:
    """Mesh axis -> devices along it, of all that stand around a ring or within its places."""
    return {name: getattr(parts, axis.name) for name, axis in AROUND.items()}


def parts_within(parts: DividedAround, *, shards: bool = True) -> int:
    """How many devices are one of a schedule's together.

    Args:
        parts: of a plan or schedule.
        shards: those along which shards are cut further among them.
    """
    within = (axis for axis in AROUND.values() if axis.within and (shards or not axis.shards))
    return math.prod(getattr(parts, axis.name) for axis in within)


def parts_sharing(parts: DividedAround) -> int:
    """How many devices of a place compute a task together, each with all of its weights."""
    return math.prod(getattr(parts, name) for name in SHARERS)


def place_of(parts: DividedAround) -> str:
    """What a place of a ring is called: a device, or after those that share it."""
    shared = (axis.place for axis in AROUND.values() if getattr(parts, axis.name) > 1)
    return next(filter(None, shared), "device")


def parts_of_block(parts: DividedAround) -> int:
    """Over how many devices of a place a block's own products and matrices are split."""
    return math.prod(getattr(parts, axis.name) for axis in CUT)


def parts_of_batch(parts: DividedAround) -> int:
    """On how many parts of a batch a schedule runs, each with its own microbatches."""
    return math.prod(getattr(parts, AROUND[name].name) for name in BATCH)


def joined_so(by: str, sizes: Mapping[str, int]) -> DividedAround:
    """What a schedule says whose devices, so many along each mesh axis, join features so."""
    return DividedAround(features=sizes.get(TENSOR, 1), features_by=by)


def why_not_joined(parts: DividedAround) -> str | None:
    """Why devices do not join features as a plan or schedule says; None if they do."""
    by = parts.features_by
    if by not in JOININGS:
        near = did_you_mean(by, JOININGS)
        return f"features_by={by!r} is not known{near}; use one of {', '.join(JOININGS)}"
    if by != "gather" and parts.features == 1:
        return (
            f"features_by={by!r} is of devices that share features, and features=1; leave it out, "
            "or split features over 2 devices or more"
        )
    return None


def hops_along(parts: DividedAround) -> str:
    """The mesh axis along which most permutes of a step go."""
    return TENSOR if parts.features_by == "ring" else RING
