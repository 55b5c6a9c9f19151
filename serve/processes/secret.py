"""Who may speak to a server's processes: whoever proves that he knows the deployment's secret.

    listener -> caller   32 random bytes
    caller -> listener   HMAC-SHA256(secret, purpose, those bytes)

That is all a listener reads of a stranger, by fixed sizes and within a few seconds; what comes
behind it is looked at only if the proof is right. The secret itself never travels, and a proof that
was overheard is worth nothing at another connection.
"""

import hashlib
import hmac
import secrets
import socket
import time
from typing import Literal

Purpose = Literal[b"switchboard", b"pages"]

CHALLENGE_BYTES = 32
PROOF_BYTES = 32
PROVE_S = 5.0
"""How long a caller has for its proof."""
MAX_STRANGERS = 64
"""Connections that may be without their proof at once; more are closed as they come."""


def challenge() -> bytes:
    """What a listener sends first."""
    return secrets.token_bytes(CHALLENGE_BYTES)


def proof(secret: str, purpose: Purpose, challenged: bytes) -> bytes:
    """A caller's answer to a challenge."""
    return hmac.digest(secret.encode(), purpose + b"\0" + challenged, hashlib.sha256)


def proves(secret: str, purpose: Purpose, challenged: bytes, answer: bytes) -> bool:
    """Whether an answer is right; without a secret none is."""
    right = proof(secret, purpose, challenged)
    return bool(secret) and hmac.compare_digest(answer, right)


def prove(connection: socket.socket, secret: str, purpose: Purpose) -> None:
    """The caller's part, on a connection that was just made.

    Raises:
        OSError: if the listener goes away, or says nothing for long.
    """
    before_s = connection.gettimeout()
    challenged = read_exactly(connection, CHALLENGE_BYTES, within_s=PROVE_S)
    connection.sendall(proof(secret, purpose, challenged))
    connection.settimeout(before_s)


def read_exactly(connection: socket.socket, count: int, *, within_s: float | None = None) -> bytes:
    """`count` bytes.

    Args:
        within_s: all of them, however they trickle in; None takes the connection's own limit for
            each part.

    Raises:
        ConnectionError: if the connection ends before.
        OSError: if it fails, or takes longer than its time limit.
    """
    data = bytearray(count)
    read_into(connection, memoryview(data), within_s=within_s)
    return bytes(data)


def read_into(
    connection: socket.socket, view: memoryview, *, within_s: float | None = None
) -> None:
    """Fills `view`; as `read_exactly`."""
    deadline_s = None if within_s is None else time.monotonic() + within_s
    while view:
        if deadline_s is not None:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError("nothing came for too long")
            connection.settimeout(left_s)
        received = connection.recv_into(view)
        if not received:
            raise ConnectionError("the connection ended")
        view = view[received:]
