"""How sequences lie over devices where it is asked for, and where a schedule or a mesh says."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import jax
from jax.sharding import Mesh

from jaxsys.axes import CONTEXT, DividedAround
from jaxsys.errors import UsageError

from .fused import why_not_fused
from .split import ContextSplit, said_by

NOTHING: Mapping[str, Any] = MappingProxyType({})


def with_split(
    asked: Mapping[str, Any], more: Mapping[str, Any] = NOTHING
) -> tuple[dict[str, int | None], ContextSplit | None]:
    """What is asked of mesh axes, in numbers, and of a context whole.

    Args:
        asked: mesh axis -> devices along it, None where nothing is said; of a context also a
            `ContextSplit`. A number is of devices round which keys and values go.
        more: `jaxsys.axes.Option` -> what is asked of it, likewise.

    Raises:
        UsageError: if a context is neither, or options say how there is to be one and not how many.
    """
    found, context = dict(asked), asked.get(CONTEXT)
    by, exchange = more.get("context_by"), more.get("context_exchange")
    if context is None and (by is not None or exchange is not None):
        raise UsageError(
            "--context-by and --context-exchange say what travels between the devices that "
            "share a sequence; say how many with --context"
        )
    if context is not None and not isinstance(context, ContextSplit):
        if not isinstance(context, int) or isinstance(context, bool):
            raise UsageError(
                f"context={context!r} must be a number of devices, or a jaxsys.context.ContextSplit"
            )
        context = ContextSplit(parts=context, by=by or "ring", exchange=exchange)
    found[CONTEXT] = None if context is None else context.parts
    return found, context


def agreed_split(
    asked: ContextSplit | None,
    says: DividedAround,
    *,
    name: str,
    whole: str | None = None,
) -> ContextSplit | None:
    """How sequences lie, which what a schedule says may not contradict.

    Args:
        asked: how they are to lie, if it is asked for.
        says: the schedule.
        name: what it is called.
        whole: what says that sequences are whole where the schedule does not cut them; None: then
            what is asked for stands.

    Raises:
        UsageError: if it does.
    """
    planned = said_by(says)
    if asked is None or planned is None:
        if asked is not None and asked.parts > 1 and whole is not None:
            raise UsageError(
                f"context={asked.parts}, but {whole} is for whole sequences; leave it out, or name "
                "a schedule such as zero-3"
            )
        return planned if asked is None else asked
    if (asked.parts, asked.by, asked.exchange) != (planned.parts, planned.by, planned.exchange):
        raise UsageError(
            f"context={asked.parts} ({asked.by}), but schedule {name} is planned for "
            f"context={planned.parts} ({planned.by}); leave it out, or plan again"
        )
    return asked


def split_on(
    mesh: Mesh, says: DividedAround, asked: ContextSplit | None, *, name: str
) -> ContextSplit | None:
    """How sequences lie over a mesh: as asked, as the schedule says, or round a ring where the mesh
    has such an axis.

    Raises:
        UsageError: if what is asked is for another number of devices, or not what a schedule says.
    """
    parts = mesh.shape.get(CONTEXT, 1)
    asked = agreed_split(asked, says, name=name)
    if asked is not None and asked.parts != parts:
        raise UsageError(
            f"context={asked.parts}, but the mesh has {parts} device(s) for each sequence; use "
            f"make_mesh(..., {CONTEXT}={asked.parts})"
        )
    if parts == 1:
        return None
    split = asked or ContextSplit(parts=parts)
    here = jax.local_devices()[0]  # where GPUs are compiled for ahead, this one stands for them
    return replace(split, fused=split.fused and why_not_fused(here) is None)
