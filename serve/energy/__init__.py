"""The control that saves energy within the SLOs: prediction, clocks, routes."""
