"""jaxsys: training, planning and serving of large language models on JAX.

One idea carries the library: a step is a plan, and a plan says where every block of data is at
every moment. `jaxsys.schedule` is that plan as plain data; `jaxsys.train` runs it,
`jaxsys.planner` searches for it, and `jaxsys.serve` serves what was trained.

What users need is here by name; a name is imported when it is first asked for, so that
`import jaxsys` costs nothing. Modules hold more; what their `__all__` does not list may change.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxsys.errors import RunError, UsageError
    from jaxsys.layered import Layer, LayeredModel, Parameters, reference_loss
    from jaxsys.lowering import lower
    from jaxsys.mesh import make_mesh
    from jaxsys.model import DecoderConfig, load, preset, save_safetensors
    from jaxsys.planner import Cluster, plan
    from jaxsys.schedule import Costs, Link, Schedule, check, simulate
    from jaxsys.serve import DeploymentConfig, SamplingParameters, build_engine
    from jaxsys.strategies import Strategy, build
    from jaxsys.train import Batches, Trainer, from_function, from_linen, from_nnx

try:
    __version__ = version("jaxsys")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

_HOMES = {
    "errors": ("RunError", "UsageError"),
    "layered": ("Layer", "LayeredModel", "Parameters", "reference_loss"),
    "lowering": ("lower",),
    "mesh": ("make_mesh",),
    "model": ("DecoderConfig", "load", "preset", "save_safetensors"),
    "planner": ("Cluster", "plan"),
    "schedule": ("Costs", "Link", "Schedule", "check", "simulate"),
    "serve": ("DeploymentConfig", "SamplingParameters", "build_engine"),
    "strategies": ("Strategy", "build"),
    "train": ("Batches", "Trainer", "from_function", "from_linen", "from_nnx"),
}
"""Module -> what of it is found here."""
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Batches",
    "Cluster",
    "Costs",
    "DecoderConfig",
    "DeploymentConfig",
    "Layer",
    "LayeredModel",
    "Link",
    "Parameters",
    "RunError",
    "SamplingParameters",
    "Schedule",
    "Strategy",
    "Trainer",
    "UsageError",
    "__version__",
    "build",
    "build_engine",
    "check",
    "from_function",
    "from_linen",
    "from_nnx",
    "load",
    "lower",
    "make_mesh",
    "plan",
    "preset",
    "reference_loss",
    "save_safetensors",
    "simulate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'jaxsys' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"jaxsys.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
