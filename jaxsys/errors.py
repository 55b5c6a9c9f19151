"""The two ways a command can fail: the request was wrong, or the run was.

Library code raises `UsageError` (a `ValueError`) for input it refuses and `RunError` for a run
that could not go on; the command line turns them into one line and exit code 2 or 1.
"""


class UsageError(ValueError):
    """The request cannot be met as asked: says the value, the rule and the way out."""


class RunError(RuntimeError):
    """A run that began could not go on: says what stopped it and what is left behind."""
