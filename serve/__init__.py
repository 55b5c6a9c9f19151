"""Serving: the decode server, and the control that saves energy within its latency targets.

`jaxsys serve` is the server. `build_engine(jaxsys.model.load(path), DeploymentConfig())` makes the
engine behind it; `engine.generate(tokens, SamplingParameters())` is an iterator of `TokenEvent`s.
`jaxsys.serve.simulation.comparison` compares energy policies on simulated GPUs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if __name__ != "jaxsys.serve":
    raise ImportError(f"import jaxsys.serve, not {__name__}")

if TYPE_CHECKING:
    from jaxsys.serve.deployment import DeploymentConfig, build_engine
    from jaxsys.serve.engine import Engine, Overloaded
    from jaxsys.serve.member import TokenEvent
    from jaxsys.serve.requests import SamplingParameters

__all__ = [
    "DeploymentConfig",
    "Engine",
    "Overloaded",
    "SamplingParameters",
    "TokenEvent",
    "build_engine",
]

_HOMES = {
    "DeploymentConfig": "deployment",
    "Engine": "engine",
    "Overloaded": "engine",
    "SamplingParameters": "requests",
    "TokenEvent": "member",
    "build_engine": "deployment",
}
"""Imported when first asked for: routers and replays do without JAX."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
