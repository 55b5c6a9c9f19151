"""Moves pages between a device and the host's memory, behind the back of its steps.

Pages to be saved are gathered into an array of their own, right behind the steps that filled them,
and travel while others run. Pages to be fetched are brought to the device by a thread, which waits
for them, and written into their places between two steps, as those handed over are.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from jaxsys.serve.executor import JaxExecutor
from jaxsys.serve.host_pages import Fetch, Save
from jaxsys.serve.requests import RequestState

logger = logging.getLogger(__name__)


class HostCopies:
    """The bytes, for one instance. All but the copying itself on the instance's thread."""

    def __init__(
        self, executor: JaxExecutor, count: int, post: Callable[[Callable[[], None]], None]
    ) -> None:
        """
        Args:
            count: pages there is room for.
            post: has a function called on the instance's thread.
        """
        self.executor = executor
        self._post = post
        like = executor.steps.contents_like(executor.shapes.host_width)
        lead, width, *page = like.shape
        self._like, self._width = like, width
        # Memory is taken as places are filled.
        self._pool = np.empty((count, lead, *page), like.dtype)
        self._thread = ThreadPoolExecutor(1, "host-pages")

    def save(self, saves: Sequence[Save], then: Callable[[bool], None]) -> None:
        """Copies pages, which may change behind this call; tells whether they are there."""
        pieces = []
        for start in range(0, len(saves), self._width):
            part = saves[start : start + self._width]
            pages = [save.page for save in part]
            contents = self.executor.extract([*pages, *pages[-1:] * (self._width - len(pages))])
            contents.copy_to_host_async()
            pieces.append((contents, [save.place for save in part]))
        self._thread.submit(self._store, pieces, then)

    def fetch(self, fetch: Fetch, then: Callable[[bool], None]) -> None:
        """Fills pages; tells whether they will be before whatever is dispatched next."""
        self._thread.submit(self._load, fetch, then)

    def close(self) -> None:
        """Copies nothing more."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    # --- on its thread --------------------------------------------------------------------------

    def _store(
        self, pieces: list[tuple[jax.Array, list[int]]], then: Callable[[bool], None]
    ) -> None:
        try:
            for contents, places in pieces:
                found = np.asarray(contents)
                for row, place in enumerate(places):
                    self._pool[place] = found[:, row]
        except Exception:
            logger.exception("pages were not saved")
            self._post(lambda: then(False))
        else:
            self._post(lambda: then(True))

    def _load(self, fetch: Fetch, then: Callable[[bool], None]) -> None:
        try:
            for start in range(0, len(fetch.places), self._width):
                places = fetch.places[start : start + self._width]
                pages = fetch.pages[start : start + self._width]
                part = np.zeros(self._like.shape, self._like.dtype)
                for row, place in enumerate(places):
                    part[:, row] = self._pool[place]
                placed = jax.block_until_ready(jax.device_put(part, self._like.sharding))
                self._insert(fetch, placed, pages)
        except Exception:
            logger.exception("pages were not fetched")
            self._post(lambda: then(False))
        else:
            self._post(lambda: then(True))

    def _insert(self, fetch: Fetch, placed: jax.Array, pages: Sequence[int]) -> None:
        def insert() -> None:
            # Of one that has ended the pages are others' by now.
            if fetch.request.state is RequestState.FETCHING:
                self.executor.insert(placed, pages)

        self._post(insert)
