"""Studies that scripts run: what they compute, beside the command lines that do."""
