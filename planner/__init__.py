"""Planning: parallel plans as trajectories of data through devices and time.

`plan(loss_fn, params, batch, cluster=Cluster(...))` finds one for your function; devices and links
are in `jaxsys.hardware`. `Space` narrows what `search` may choose from; `load_plan` reads a file of
`jaxsys plan`. `jaxsys.planner.cats` lists a plan's tensors, `jaxsys.planner.recognise` names it.
"""

if __name__ != "jaxsys.planner":
    raise ImportError(f"import jaxsys.planner, not {__name__}")

from jaxsys.planner.api import Planned, plan
from jaxsys.planner.cluster import Cluster
from jaxsys.planner.constraints import Conflict
from jaxsys.planner.costs import Precision
from jaxsys.planner.files import load_plan
from jaxsys.planner.plans import Plan
from jaxsys.planner.problem import Problem
from jaxsys.planner.search import Effort, search
from jaxsys.planner.space import Space

__all__ = [
    "Cluster",
    "Conflict",
    "Effort",
    "Plan",
    "Planned",
    "Precision",
    "Problem",
    "Space",
    "load_plan",
    "plan",
    "search",
]
