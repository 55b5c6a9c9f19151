"""What is asked of a planner: a model's work, a cluster, a batch and a memory limit."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

from jaxsys.errors import UsageError
from jaxsys.planner.cluster import Cluster
from jaxsys.planner.costs import Precision
from jaxsys.planner.plans import Plan
from jaxsys.planner.program import ProgramBytes
from jaxsys.planner.workload import Workload


class Sizes(Protocol):
    """What of a problem a plan's schedule depends on."""

    @property
    def layers(self) -> int:
        """L."""
        ...

    @property
    def batch(self) -> int:
        """Sequences (or examples) of a step."""
        ...


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One planning problem."""

    workload_of: Callable[[int], Workload] = field(repr=False)
    """Microbatch size -> its workload. Layers and parameters must not depend on the size."""
    cluster: Cluster
    batch: int
    """Sequences (or examples) of a step."""
    memory_bytes: float
    """The limit per device."""
    precision: Precision = field(default_factory=Precision)
    contention: float | None = None
    """By what share compute takes longer beside transfers, in a program whose compiler knew what
    they take; None: as the cluster's links have it, in steps of `jaxsys.train`."""
    lowered: bool = False
    """Count memory as the programs of `jaxsys.lowering` allocate it, buffers that are not always
    full included; else what a schedule has alive, as papers count it."""

    program: Callable[[Plan], ProgramBytes] | None = field(default=None, repr=False)
    """What a step of a function of the user's sends and holds on a device; None: steps are made by
    `jaxsys.lowering`."""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise UsageError(f"batch={self.batch} must be at least 1")
        if not self.memory_bytes > 0:
            raise UsageError(f"a memory limit of {self.memory_bytes} bytes must be above 0")
        # Bound to the instance, so that it goes with it.
        object.__setattr__(self, "workload", lru_cache(maxsize=None)(self.workload_of))

    workload: Callable[[int], Workload] = field(init=False, repr=False, compare=False)
    """`workload_of`, remembered."""

    def work(self, plan: Plan) -> Workload:
        """What a device has of a plan's microbatch: all of it, or its part of every sequence."""
        whole = self.workload(plan.microbatch_size)
        split = plan.split
        return whole if split is None else whole.part(split)

    @property
    def layers(self) -> int:
        """L."""
        return self.workload(1).layers
