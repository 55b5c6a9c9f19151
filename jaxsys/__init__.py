"""jaxsys: training, planning and serving of large language models on JAX.

One idea carries the library: a step is a plan, and a plan says where every block of data is at
every moment. `jaxsys.schedule` is that plan as plain data; `jaxsys.train` runs it,
`jaxsys.planner` searches for it, and `jaxsys.serve` serves what was trained.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("jaxsys")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
