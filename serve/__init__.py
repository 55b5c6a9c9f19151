"""Serving: the decode server and the control that saves energy within its SLOs."""

if __name__ != "jaxsys.serve":
    raise ImportError(f"import jaxsys.serve, not {__name__}")
