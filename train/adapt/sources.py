"""Where in a user's own files an operation was written."""

import re
from pathlib import Path

from jax.extend import source_info_util

import jaxsys
from jaxsys.train.adapt.values import Operation

_OURS = str(Path(jaxsys.__file__).parent)
_MOST_FRAMES = 64


def written_at(operation: Operation) -> str:
    """An operation's name and its line: "reduce_max (train.py:40)"; of no line, the name alone."""
    name, place = operation.primitive.name, _line(operation)
    return name if place is None else f"{name} ({place})"


def _line(operation: Operation) -> str | None:
    """The innermost line that is of no installed package."""
    for source in operation.sources:
        frames = source_info_util.summarize(source, num_frames=_MOST_FRAMES).splitlines()
        for frame in reversed(frames):
            found = re.match(r"(.+?):(\d+)", frame)
            if found and "site-packages" not in found[1] and not found[1].startswith(_OURS):
                return f"{Path(found[1]).name}:{found[2]}"
    return None
