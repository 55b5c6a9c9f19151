"""Replays that a search asks for one by one, computed by several processes.

What a search asks for next depends on what it is told, but mostly it can be guessed: while one
replay is waited for, those likely to follow are computed beside it. Answers do not depend on the
number of processes.
"""

import contextlib
import itertools
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, Generic, TypeVar

Key = TypeVar("Key")
Answer = TypeVar("Answer")

_answer: Callable[[Any], Any] | None = None
"""Of a worker: what it was made for."""


class Replays(Generic[Key, Answer]):
    """What a function answers, each key asked for once."""

    def __init__(
        self, answer: Callable[[Key], Answer], pool: ProcessPoolExecutor | None, jobs: int
    ) -> None:
        self._answer = answer
        self._pool = pool
        self._jobs = jobs
        self._begun: dict[Key, Future[Answer]] = {}

    def get(self, key: Key, likely: Iterable[Key] = ()) -> Answer:
        """The answer; those in `likely` are begun beside it, as far as there are processes."""
        if self._pool is None:
            return self._answer(key)
        for each in itertools.chain([key], likely):
            running = sum(not one.done() for one in self._begun.values())
            if running >= self._jobs and key in self._begun:
                break
            if each not in self._begun:
                self._begun[each] = self._pool.submit(_work, each)
        return self._begun.pop(key).result()


@contextlib.contextmanager
def replays(answer: Callable[[Key], Answer], jobs: int) -> Iterator[Replays[Key, Answer]]:
    """`answer` in so many processes, in this one alone with 1; what is not asked for any more is
    ended.

    Args:
        answer: pickled where there are several.
    """
    if jobs == 1:
        yield Replays(answer, None, 1)
        return
    others = set(multiprocessing.active_children())
    # Forked processes would inherit locks that JAX's threads hold.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, initializer=_begin, initargs=(answer,))
    try:
        yield Replays(answer, pool, jobs)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
            worker.join()


def _begin(answer: Callable[[Any], Any]) -> None:
    global _answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who asks ends them
    _answer = answer


def _work(key: Any) -> Any:
    assert _answer is not None
    return _answer(key)
