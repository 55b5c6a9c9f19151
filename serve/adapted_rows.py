"""Which rows of a step have which adapter, as the device takes it."""

from collections.abc import Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Sharding

from jaxsys.errors import UsageError
from jaxsys.serve.lora import Adapted, AdapterSlots
from jaxsys.serve.outcomes import RequestFault
from jaxsys.serve.requests import Request


class AdaptedRows:
    """Of an executor's requests."""

    def __init__(self, adapters: AdapterSlots | None, placement: Sharding):
        """
        Args:
            adapters: where they lie; without, no request may have one.
            placement: of rows.
        """
        self._adapters = adapters
        self._placement = placement
        self.forget()

    def forget(self) -> None:
        """What lies on the device is gone."""
        self._batch: tuple[tuple[Request, ...], int, int] = ((), 0, 0)
        self._rows: tuple[jax.Array, jax.Array] | None = None

    def of_piece(self, request: Request) -> Adapted | None:
        """A prompt's; None where its request has no adapter.

        Raises:
            RequestFault: if its adapter is not here.
        """
        if request.adapter is None:
            return None
        slot = None if self._adapters is None else self._adapters.slot(request.adapter)
        if slot is None:
            unknown = UsageError(f"adapter {request.adapter!r} is not loaded here")
            raise RequestFault(request, unknown)
        return self.of_slots([slot], 1, 1)

    def slots_of(self, requests: Sequence[Request]) -> list[int | None] | None:
        """Of each request; None where nobody has an adapter."""
        if self._adapters is None or all(request.adapter is None for request in requests):
            return None
        # Of one that has ended, an adapter may be gone: nobody looks at its token.
        return [self._adapters.slot(request.adapter) for request in requests]

    def of_batch(
        self, requests: tuple[Request, ...], slots: list[int | None], batch: int, width: int
    ) -> Adapted:
        """A decode step's, of requests whose adapters lie in `slots`."""
        assert self._adapters is not None
        of, rows = (requests, batch, width), self._rows
        if self._batch != of or rows is None:
            # The same requests run for many steps: who has which adapter stays on the device.
            found = self.of_slots(slots, batch, width)
            rows = jax.device_put((found.slots, found.rows), self._placement)
            self._batch, self._rows = of, rows
        return Adapted(self._adapters.tables, *rows)

    def of_slots(self, slots: Sequence[int | None], batch: int, width: int) -> Adapted:
        """What `batch` rows, the first of which have `slots`, take of `width` of them at most."""
        assert self._adapters is not None
        every = self._adapters.count
        used = list(dict.fromkeys(slot for slot in slots if slot is not None))
        if width == every:
            used = list(range(every))
        places = {slot: place for place, slot in enumerate(used)}
        rows = np.full(batch, -1, np.int32)
        rows[: len(slots)] = [-1 if slot is None else places[slot] for slot in slots]
        padded = np.zeros(width, np.int32)
        padded[: len(used)] = used
        return Adapted(self._adapters.tables, cast(Any, padded), cast(Any, rows))
