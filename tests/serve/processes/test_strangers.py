"""What listens between a server's processes turns strangers away, and goes on."""

import asyncio
import contextlib
import queue
import socket
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.serve.clock import WallClock
from jaxsys.serve.engine import Engine
from jaxsys.serve.processes import remote
from jaxsys.serve.processes.page_transfer import PageServer
from jaxsys.serve.processes.remote import Switchboard
from jaxsys.serve.processes.secret import CHALLENGE_BYTES, MAX_STRANGERS, proof, proves


def test_a_proof_is_of_one_secret_purpose_and_challenge():
    answer = proof("secret", b"pages", b"1" * CHALLENGE_BYTES)
    assert proves("secret", b"pages", b"1" * CHALLENGE_BYTES, answer)
    assert not proves("other", b"pages", b"1" * CHALLENGE_BYTES, answer)
    assert not proves("secret", b"switchboard", b"1" * CHALLENGE_BYTES, answer)
    assert not proves("secret", b"pages", b"2" * CHALLENGE_BYTES, answer)
    assert not proves("", b"pages", b"", proof("", b"pages", b""))


def ended(connection):
    """Whether the other side closes the connection, whatever it says before."""
    connection.settimeout(10)
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    return True


def test_pages_are_given_to_those_who_know_the_secret_only():
    device = jax.devices()[0]
    here, there, stranger = (
        PageServer(device, "127.0.0.1", timeout_s=5, secret=secret)
        for secret in ("one", "one", "two")
    )
    contents = jnp.arange(48, dtype=jnp.bfloat16).reshape(2, 4, 3, 2, 1)
    like = jax.ShapeDtypeStruct(contents.shape, contents.dtype, sharding=contents.sharding)
    ticket = here.publish("a", contents)
    host, port = here.address.split(":")
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for sent in (b"good morning, is anybody there?", b"x" * 100, b""):
        with socket.create_connection((host, int(port)), 10) as connection:
            connection.sendall(sent)
            with contextlib.suppress(OSError):  # it may have been turned away already
                connection.shutdown(socket.SHUT_WR)
            assert ended(connection)
    stranger.fetch(ticket, like, results.put)
    assert isinstance(results.get(timeout=20), OSError)
    there.fetch(ticket, like, results.put)
    assert np.array_equal(results.get(timeout=20), contents)
    for server in (here, there, stranger):
        server.close()


def test_pages_on_a_network_need_a_secret():
    with pytest.raises(ValueError, match="need a secret"):
        PageServer(jax.devices()[0], "0.0.0.0")


def test_the_switchboard_reads_little_of_a_stranger(monkeypatch):
    monkeypatch.setattr(remote, "PROVE_S", 0.3)
    parsed = []
    monkeypatch.setattr(remote.Frames, "feed", lambda _, data: parsed.append(data) or iter(()))

    async def run():
        board = Switchboard(
            Engine(clock=WallClock(), max_requests=1),
            "secret",
            on_up=lambda _: None,
            on_down=lambda _: None,
        )
        port = await board.open("127.0.0.1")

        async def call(sent):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                await reader.readexactly(CHALLENGE_BYTES)
                writer.write(sent)
                async with asyncio.timeout(5):
                    assert await reader.read() == b""
            except ConnectionError:
                pass
            writer.close()

        try:
            await call(b"x" * (1 << 20))
            await call(b"")  # says nothing
            silent = [
                await asyncio.open_connection("127.0.0.1", port) for _ in range(MAX_STRANGERS + 5)
            ]
            await asyncio.sleep(0.1)
            assert len(board.lines) <= MAX_STRANGERS
            await asyncio.sleep(0.5)
            assert not board.lines
            for _, writer in silent:
                writer.close()
        finally:
            await board.close()

    asyncio.run(run())
    assert not parsed
