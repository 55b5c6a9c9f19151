"""What the numbers of a configuration may be: a rule each, checked before anything computes."""

import math
from dataclasses import dataclass
from typing import Any

from jaxsys.errors import UsageError
from jaxsys.files import shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What a number must be."""

    says: str
    """After "must be"."""
    whole: bool = False
    """Written without a fraction, as 2 and not 2.0."""
    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf

    def read(self, name: str, value: Any) -> Any:
        """The number: an int where it is `whole`, else a float.

        Raises:
            UsageError: if it is none, or another than the rule allows.
        """
        found = self._number(value)
        if found is None or not (found >= self.least and found > self.above and found <= self.most):
            raise UsageError(f"{name}={shown(value)} must be {self.says}{self._instead(value)}")
        return value if self.whole else found

    def _number(self, value: Any) -> float | None:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            return None
        try:
            found = float(value)
        except OverflowError:
            return None
        return found if math.isfinite(found) else None

    def _instead(self, value: Any) -> str:
        """How the same number is written rightly, where there is such a number."""
        if isinstance(value, bool) or not isinstance(value, str | float):
            return ""
        try:
            meant = float(value)
        except ValueError:
            return ""
        if not math.isfinite(meant):
            return ""
        right = int(meant) if self.whole and meant.is_integer() else meant
        fits = self._number(right)
        if fits is None or not (fits >= self.least and fits > self.above and fits <= self.most):
            return ""
        return f"; write {right!r}"


WHOLE = Rule(says="a whole number", whole=True)
COUNT = Rule(says="a whole number of at least 0", whole=True, least=0)
SIZE = Rule(says="a whole number of at least 1", whole=True, least=1)
NUMBER = Rule(says="a number")
POSITIVE = Rule(says="a number above 0", above=0)
PART = Rule(says="a number above 0 and at most 1", above=0, most=1)


def listed(name: str, values: Any, rule: Rule) -> list[Any]:
    """A list of numbers that all follow a rule.

    Raises:
        UsageError: if it is no list, or one of them does not.
    """
    if not isinstance(values, list | tuple):
        raise UsageError(f"{name}={shown(values)} must be a list, of which each is {rule.says}")
    return [rule.read(f"{name}[{index}]", value) for index, value in enumerate(values)]
