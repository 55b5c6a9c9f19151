"""How many requests a server has, counted by one engine alone or by those of several fronts."""

import contextlib
from contextlib import AbstractContextManager
from typing import Protocol


class Crowd(Protocol):
    """Requests that have not ended."""

    def lock(self) -> AbstractContextManager[object]:
        """Held from the question whether there is room until the request is counted."""
        ...

    def add(self, change: int, adapter: str | None) -> None:
        """Counts a request in, or out.

        Args:
            adapter: the key of the one it is computed with.
        """
        ...

    def total(self) -> int:
        """All of them, those of other fronts too."""
        ...


class OwnCrowd:
    """Of one engine."""

    def __init__(self) -> None:
        self._count = 0

    def lock(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext()

    def add(self, change: int, adapter: str | None) -> None:
        self._count += change

    def total(self) -> int:
        return self._count
