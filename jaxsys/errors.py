"""The two ways a command can fail: the request was wrong, or the run was.

Library code raises `UsageError` (a `ValueError`) for input it refuses and `RunError` for a run
that could not go on; the command line turns them into one line and exit code 2 or 1.
"""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """The request cannot be met as asked: says the value, the rule and the way out."""


class FileError(UsageError):
    """What a file holds is wrong: names are the file's own, not those of options."""


class RunError(RuntimeError):
    """A run that began could not go on: says what stopped it and what is left behind."""


MOST_NAMES = 4
"""Names that are put forward at once."""
LONGEST_NAME = 100
"""Beyond it what was given is no name, and takes long to compare."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ " (did you mean 'dp'?)" if known names are near the one that is not, else nothing.

    Names are families, such as `weipipe-naive` and `weipipe-interleave`: what is near the beginning
    that several share means any of them.
    """
    if len(str(name)) > LONGEST_NAME:
        return ""
    typed, likeness = str(name).lower(), {}
    for one in known:
        words = one.lower().split("-")
        beginnings = ("-".join(words[:count]) for count in range(1, len(words) + 1))
        of_beginnings = [_likeness(typed, beginning) for beginning in beginnings]
        likeness[one] = max(of_beginnings), of_beginnings[-1]
    best = max((most for most, _ in likeness.values()), default=0.0)
    if best < 0.6:
        return ""
    near = [one for one, (most, _) in likeness.items() if most == best]
    whole = [one for one in near if likeness[one][1] == best]
    chosen = [repr(one) for one in whole or near][:MOST_NAMES]
    said = " or ".join(filter(None, (", ".join(chosen[:-1]), chosen[-1])))
    return f" (did you mean {said}?)"


def _likeness(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()
