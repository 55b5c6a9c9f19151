"""The two ways a command can fail: the request was wrong, or the run was.

Library code raises `UsageError` (a `ValueError`) for input it refuses and `RunError` for a run
that could not go on; the command line turns them into one line and exit code 2 or 1.
"""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """The request cannot be met as asked: says the value, the rule and the way out."""


class RunError(RuntimeError):
    """A run that began could not go on: says what stopped it and what is left behind."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ " (did you mean 'dp'?)" if a known name is near the one that is not, else nothing."""
    by_case = {one.lower(): one for one in known}
    near = difflib.get_close_matches(str(name).lower(), by_case, n=1, cutoff=0.6)
    return f" (did you mean {by_case[near[0]]!r}?)" if near else ""
