"""Planning: parallel plans as trajectories of data through devices and time."""

if __name__ != "jaxsys.planner":
    raise ImportError(f"import jaxsys.planner, not {__name__}")
