"""Programs compiled several at a time, before any is timed."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def compiled_together(
    compile_one: Callable[[Any], Any], wanted: Sequence[Any], jobs: int
) -> list[Any]:
    """`compile_one` of each, `jobs` at a time: before anything is timed, which they would disturb.

    The first is compiled alone: what XLA finds about kernels there serves the others.
    """
    first = [compile_one(one) for one in wanted[:1]]
    with ThreadPoolExecutor(jobs) as pool:
        return first + list(pool.map(compile_one, wanted[1:]))
