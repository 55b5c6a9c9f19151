"""Files: written whole or not at all, and read so that a damaged or foreign one is one line.

What others made (models, plans, profiles, traces) may hold anything. What a file can cost is
bounded before it is parsed, and whatever is wrong is a `UsageError` of one line. `jaxsys.fields`
hands out a JSON object's values by name and type.
"""

import collections
import json
import os
import re
import reprlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxsys.errors import UsageError

MIB = 2**20
MOST_BYTES = 32 * MIB
"""Of a JSON file where its reader sets no other bound."""
MOST_CONTAINERS = 200_000
"""Of objects and arrays in one JSON text; each takes some 60 to 250 bytes of memory."""
MOST_VALUES = 2_000_000
"""Of values in one JSON text, at 8 to 32 bytes each."""
DEEPEST = 64
"""Of objects and arrays within each other."""
MOST_DIGITS = 40
"""Of a whole number; tokenizers write their unbounded lengths with 31."""

_LONE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_SHORT.maxlevel = 3


def write_whole(path: Path, text: str) -> None:
    """Writes beside `path` first, then renames into place.

    Raises:
        OSError: if it cannot be written there.
    """
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def check_writable(folder: Path) -> None:
    """Raises UsageError if nothing can be written in a folder, which need not be there yet."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UsageError(f"nothing can be written in {folder}: {there}: {error.strerror}") from None


POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: Path) -> None:
    """Raises UsageError for a file that Git LFS left its pointer of."""
    with open(path, "rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise UsageError(
                f"{path} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull` "
                "in its folder"
            )


def shown(value: Any) -> str:
    """A value as an error says it: on one line, and short however large it is."""
    return _SHORT.repr(value)


def one_line(text: str, most: int = 600) -> str:
    """A text of others within an error: on one line, cut where it goes on and on."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]} ..."


def read_bytes(path: str | Path, *, what: str = "", most_bytes: int = MOST_BYTES) -> bytes:
    """A whole file, if it is not larger than `most_bytes`.

    Args:
        path: the file.
        what: what it should be, as errors put it before the path: "plan".
        most_bytes: no more than this is read.

    Raises:
        UsageError: if it is missing, cannot be read or is larger.
    """
    name = f"{what} {path}".lstrip()
    try:
        with open(path, "rb") as file:
            # Asked for more, `read` sets that much memory aside; pipes have no size.
            size = os.fstat(file.fileno()).st_size
            content = file.read(min(size, most_bytes) + 1)
            while size < len(content) <= most_bytes and (more := file.read(MIB)):
                content += more
    except OSError as error:
        raise UsageError(f"{name} cannot be read: {error.strerror}") from None
    except ValueError as error:  # a name that no file can have
        raise UsageError(f"{what or 'file'} {str(path)!r} cannot be read: {error}") from None
    if len(content) > most_bytes:
        raise UsageError(f"{name} is larger than {most_bytes} bytes, the most that is read")
    return content


def read_text(path: str | Path, *, what: str = "", most_bytes: int = MOST_BYTES) -> str:
    """A whole UTF-8 file; see `read_bytes`.

    Raises:
        UsageError: if it cannot be read, is larger than `most_bytes`, or is not UTF-8.
    """
    return _decoded(read_bytes(path, what=what, most_bytes=most_bytes), f"{what} {path}".lstrip())


def read_lines(
    path: str | Path, *, what: str = "", most_bytes: int = MOST_BYTES, errors: str = "strict"
) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file of any length, numbered from 1, none longer than `most_bytes`.

    Args:
        path: the file.
        what: what it should be, as errors put it before the path.
        most_bytes: of a line.
        errors: "replace" puts U+FFFD for bytes that are no UTF-8.

    Raises:
        UsageError: if it cannot be read, a line is longer, or one is not UTF-8.
    """
    name = f"{what} {path}".lstrip()
    try:
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(most_bytes + 1):
                number += 1
                if len(line) > most_bytes:
                    raise UsageError(
                        f"{name} line {number} is longer than {most_bytes} bytes, the most that "
                        "is read"
                    )
                text = _decoded(line, f"{name} line {number}", errors)
                yield number, text.rstrip("\r\n")
    except OSError as error:
        raise UsageError(f"{name} cannot be read: {error.strerror}") from None


def read_json(
    path: str | Path,
    *,
    what: str = "",
    most_bytes: int = MOST_BYTES,
    most_containers: int = MOST_CONTAINERS,
) -> Any:
    """A file's JSON value, at a cost that is known beforehand; see `parse_json`.

    Raises:
        UsageError: if it cannot be read, is too large, or is not JSON.
    """
    content = read_bytes(path, what=what, most_bytes=most_bytes)
    return parse_json(content, name=f"{what} {path}".lstrip(), most_containers=most_containers)


def parse_json(
    text: str | bytes,
    *,
    name: str,
    most_containers: int = MOST_CONTAINERS,
    unique: bool = False,
) -> Any:
    """A JSON text's value, if it holds no more than can be meant.

    Bounds are checked on the text, before values take memory: objects and arrays, values, their
    depth, the digits of a number. Strings with half of a surrogate pair, which nothing can write
    again, are refused.

    Args:
        text: of known size.
        name: what errors call it.
        most_containers: of objects and arrays.
        unique: refuse objects that hold a key twice; otherwise the last one counts.

    Raises:
        UsageError: if it is no JSON, or beyond those bounds.
    """
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    containers = raw.count(b"{") + raw.count(b"[")
    if containers > most_containers or raw.count(b",") > MOST_VALUES:
        raise UsageError(
            f"{name} is JSON of {containers} objects and arrays and {raw.count(b',')} commas; at "
            f"most {most_containers} and {MOST_VALUES} are read"
        )
    try:
        value = json.loads(
            raw.decode("utf-8"),
            parse_int=_whole_number,
            object_pairs_hook=_unique if unique else None,
        )
        if _LONE_SURROGATE.search(raw):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not JSON: byte {error.start} is not UTF-8") from None
    except UnicodeEncodeError:
        raise UsageError(f"{name} holds half of a surrogate pair, which is no text") from None
    except RecursionError:
        raise UsageError(f"{name} is JSON nested deeper than {DEEPEST} levels") from None
    except ValueError as error:
        raise UsageError(f"{name} is not JSON: {error}") from None
    level = [value]
    for _ in range(DEEPEST + 1):
        inner = (
            child.values() if isinstance(child, dict) else child
            for child in level
            if isinstance(child, dict | list)
        )
        level = [c for children in inner for c in children if isinstance(c, dict | list)]
        if not level:
            return value
    raise UsageError(f"{name} is JSON nested deeper than {DEEPEST} levels")


def _decoded(content: bytes, name: str, errors: str = "strict") -> str:
    try:
        return content.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 text (byte {error.start})") from None


def _whole_number(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits; at most {MOST_DIGITS} are read")
    return int(digits)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        twice = counts.most_common(1)[0][0]
        raise ValueError(f"an object holds the key {shown(twice)} twice")
    return value
