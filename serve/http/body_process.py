"""Parses bodies of requests: run as a script, by `bodies`, for those that are large.

What stands on standard input are frames: a length of four bytes, the rules as `RULES` packs them,
and the body as it came. Each is answered by one frame, a marshalled pair: a status of HTTP, and
what the body holds (200) or what is wrong with it. While Python's parser is at work it lets no
other thread go on; in a process of its own it holds up nobody who asks for health.
"""

import json
import marshal
import struct
import sys
import zlib
from typing import Any

LENGTH = struct.Struct("!I")
RULES = struct.Struct("!QQH8s")
"""Most bytes once unpacked, most marks, most fields, and how the body is packed."""
PART = 512 << 10
"""Bytes looked through at once."""
WINDOWS = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
"""How zlib is told what it unpacks."""
PACKED = frozenset({"", "identity", *WINDOWS})


EMPTY = ()
"""What no JSON is: there was no body."""


class Refused(Exception):
    """A status of HTTP, and what is wrong."""


def parse(data: bytes, packed: str, max_bytes: int, max_marks: int, max_fields: int) -> Any:
    """What a body holds.

    Args:
        data: the body.
        packed: its content encoding, one of `PACKED`.
        max_bytes: most bytes of it, once unpacked.
        max_marks: most commas, colons and opening brackets outside of strings: what parsing costs
            goes by them.
        max_fields: most fields of an object that it is.

    Returns:
        What was parsed, or `EMPTY`.

    Raises:
        Refused: if it is none that can be taken.
    """
    if packed in WINDOWS:
        data = _unpack(data, WINDOWS[packed], max_bytes)
    if len(data) > max_bytes:
        raise Refused(413, f"the body exceeds {max_bytes} bytes; send a shorter prompt")
    if marks(data, max_marks) > max_marks:
        raise Refused(
            400,
            f"the body holds over {max_marks} values; send fewer messages, prompts or token ids at "
            f"once",
        )
    try:
        value: Any = json.loads(data) if data else EMPTY
    except UnicodeDecodeError as error:
        raise Refused(400, f"the body is no UTF-8: byte {error.start}") from None
    except RecursionError:
        raise Refused(400, "the body is nested too deep") from None
    except ValueError as error:
        raise Refused(400, f"the body is no valid JSON: {error}") from None
    if isinstance(value, dict) and len(value) > max_fields:
        raise Refused(400, f"the body has {len(value)} fields; at most {max_fields} are taken")
    return value


def marks(data: bytes, enough: int) -> int:
    """Commas, colons and opening brackets outside of strings.

    Where there are no more than `enough` at all, those in strings are counted too; counting ends
    with the part that goes over it.
    """
    most = sum(data.count(mark) for mark in (b",", b":", b"[", b"{"))
    if most <= enough:
        return most
    import numpy as np

    marking = np.zeros(256, bool)
    marking[[*b",:[{"]] = True
    # Pairs of backslashes first, from the left: then a backslash before a quote escapes it.
    plain = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    characters = np.frombuffer(plain, np.uint8)
    found, quoted = 0, np.False_
    for at in range(0, len(characters), PART):
        part = characters[at : at + PART]
        inside = np.bitwise_xor.accumulate(part == ord('"')) ^ quoted
        found += int(np.count_nonzero(marking[part] & ~inside))
        quoted = inside[-1]
        if found > enough:
            break
    return found


def _unpack(data: bytes, window: int, most: int) -> bytes:
    stream = zlib.decompressobj(window)
    try:
        unpacked = stream.decompress(data, most + 1)
    except zlib.error as error:
        raise Refused(400, f"the body cannot be unpacked: {error}") from None
    if len(unpacked) <= most and (not stream.eof or stream.unused_data):
        raise Refused(400, "the body cannot be unpacked: it is cut short, or more stands behind")
    return unpacked


def answer(frame: bytes) -> bytes:
    """A frame's answer."""
    max_bytes, max_marks, max_fields, packed = RULES.unpack_from(frame)
    try:
        rules = (packed.rstrip(b"\0").decode(), max_bytes, max_marks, max_fields)
        return marshal.dumps((200, parse(frame[RULES.size :], *rules)))
    except Refused as refused:
        return marshal.dumps(refused.args)
    except ValueError:  # of marshal, which goes less deep than JSON
        return marshal.dumps((400, "the body is nested too deep"))


def main() -> None:
    """Answers until the other side is gone."""
    given, taken = sys.stdin.buffer, sys.stdout.buffer
    while header := given.read(LENGTH.size):
        found = answer(given.read(LENGTH.unpack(header)[0]))
        taken.write(LENGTH.pack(len(found)) + found)
        taken.flush()


if __name__ == "__main__":
    main()
