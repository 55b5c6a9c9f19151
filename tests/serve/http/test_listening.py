"""Connections that say nothing keep nobody out, and what is large holds up nobody else."""

import asyncio
import contextlib
import errno
import gzip
import json
import os
import resource
import socket
import threading
import time

import httpx
import pytest
import uvloop

from jaxsys.errors import UsageError
from jaxsys.model import ByteTokenizer
from jaxsys.serve.http import body_process, listening
from jaxsys.serve.http.bodies import Bodies
from jaxsys.serve.http.listening import Connections, HttpServer, raise_descriptor_limit
from jaxsys.serve.http.protocol import CompletionRequest
from jaxsys.serve.http.starting import Gateway, StartProgress
from jaxsys.serve.processes.front import bind

JSON = {"Content-Type": "application/json"}


@contextlib.contextmanager
def listening_on(app, most=None):
    """Serves an application on a thread; the server and its port."""
    listener = bind("127.0.0.1", 0)
    listener.listen(128)
    server = HttpServer(app)
    if most is not None:
        server.open_connections.most = most
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        yield server, listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()


def test_silent_connections_make_room_and_are_told_once(caplog, monkeypatch):
    monkeypatch.setattr(listening, "HEAD_S", 1.0)
    caplog.set_level("WARNING", logger="jaxsys.serve.http.listening")

    async def crowd(port):
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(60)]
        silent[-1][1].write(b"GET /health HTTP/1.1\r\nHost:")  # a head that never ends
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            for _ in range(5):
                assert (await client.get("/health")).status_code == 503
        async with asyncio.timeout(10):
            for reader, writer in silent:
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
                writer.close()

    with listening_on(Gateway(StartProgress()), most=8) as (server, port):
        asyncio.run(crowd(port))
        assert len(server.open_connections.open) <= 8
    assert len(caplog.records) == 1


def test_descriptors_that_run_out_are_told_once_a_minute(caplog):
    caplog.set_level("WARNING", logger="jaxsys.serve.http.listening")
    loop = asyncio.new_event_loop()
    connections = Connections(4)
    fault = {"message": "socket.accept() out of system resource", "exception": OSError(24, "full")}
    for _ in range(1000):
        connections.handle(loop, fault)
    loop.close()
    assert len(caplog.records) == 1


@pytest.mark.parametrize("loop_factory", [None, uvloop.new_event_loop])
@pytest.mark.parametrize("count", [1, 2])
def test_who_shares_a_socket_takes_one_connection_at_a_time(
    count, loop_factory, monkeypatch, caplog
):
    """Also where descriptors run out for a moment, which is told, and waited for."""
    monkeypatch.setattr(listening, "ACCEPT_AGAIN_S", 0.05)
    caplog.set_level("WARNING", logger="jaxsys.serve.http.listening")
    faults = [OSError(errno.EMFILE, "Too many open files")] * 2 if count == 1 else []

    class Listener(socket.socket):
        def accept(self):
            if faults:
                raise faults.pop()
            return super().accept()

    async def run():
        first = bind("127.0.0.1", 0)
        first.listen(128)
        port = first.getsockname()[1]
        listeners = [Listener(fileno=os.dup(first.fileno())) for _ in range(count)]
        servers = [HttpServer(Gateway(StartProgress()), one_by_one=True) for _ in listeners]
        # All of them wait before anybody takes one.
        waiting = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
        serving = [
            asyncio.create_task(server.serve(sockets=[one]))
            for server, one in zip(servers, listeners, strict=True)
        ]
        async with asyncio.timeout(10):
            while sum(len(server.open_connections.open) for server in servers) < 40:
                await asyncio.sleep(0.01)
        shares = [len(server.open_connections.open) for server in servers]
        reader, writer = await asyncio.open_connection(sock=waiting[0])
        writer.write(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        async with asyncio.timeout(10):
            assert (await reader.readline()).startswith(b"HTTP/1.1 503")
        writer.close()
        for one in waiting[1:]:
            one.close()
        first.close()
        for server in servers:
            server.should_exit = True
        await asyncio.gather(*serving)
        return shares

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        shares = runner.run(run())
    assert sum(shares) == 40 and min(shares) >= 40 / count - 5
    assert not faults and ("Too many open files" in caplog.text) == (count == 1)


def test_the_descriptor_limit_is_raised():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
        assert raise_descriptor_limit() == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        assert raise_descriptor_limit() >= soft
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    "text",
    [
        b'{"a": [1, 2, {"b": "x, y: [z] {"}], "c": "\\"[,\\\\"}',
        b'{"a\\\\\\"": "\\\\\\\\", "b": [[], {}]}',
        b"[]",
    ],
)
def test_marks_are_counted_outside_of_strings(text):
    plain = json.dumps(json.loads(text, parse_int=float), separators=(",", ":"))
    expected, quoted, escaped = 0, False, False
    for character in plain:
        if quoted:
            quoted = escaped or character != '"'
            escaped = character == "\\" and not escaped
        else:
            quoted = character == '"'
            expected += character in ",:[{"
    assert body_process.marks(text, 0) == expected


def large(kind):
    """Bodies of 3 MB that cannot be meant, and what they are told."""
    size = 3 << 20
    return {
        "fields": (b"{" + b",".join(b'"k%d":1' % n for n in range(size // 12)) + b"}", "values"),
        "tokens": (b'{"prompt":[' + b"1," * (size // 2) + b"1]}", "values"),
        "text": (b'{"prompt":"' + b"a, b: [c] " * (size // 10) + b'"}', "prompt is too long"),
        "escapes": (b'{"prompt":"' + b"\\u00e9" * (size // 6) + b'"}', "prompt is too long"),
        "name": (b'{"prompt":"a","model":"' + b"m" * size + b'"}', "model"),
        "stop": (b'{"prompt":"a","stop":"' + b"s" * size + b'"}', "stop"),
        "bias": (
            b'{"prompt":"a","logit_bias":{'
            + b",".join(b'"%d":"x"' % n for n in range(9000))
            + b"}}",
            "logit_bias",
        ),
    }[kind]


@pytest.fixture(scope="module")
def server(scripted):
    return scripted(ByteTokenizer(), lambda _: {97: 9.0})


@pytest.mark.parametrize("kind", ["fields", "tokens", "text", "escapes", "name", "stop", "bias"])
def test_large_bodies_are_refused_and_hold_up_nobody(server, kind):
    """While four of them come at once, the event loop is never held up for long."""
    body, words = large(kind)

    async def run():
        late_s = []

        async def look():
            while True:
                before_s = time.perf_counter()
                await asyncio.sleep(0.005)
                late_s.append(time.perf_counter() - before_s - 0.005)

        looking = asyncio.create_task(look())
        async with server.client() as client:
            asked = [client.post("/v1/completions", content=body, headers=JSON) for _ in range(4)]
            answers = await asyncio.gather(*asked)
        looking.cancel()
        return answers, sorted(late_s)

    answers, late_s = server.run(run())
    for answer in answers:
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert words in error["message"] and len(error["message"]) < 400
        if kind in ("text", "escapes"):
            assert error["code"] == "context_length_exceeded"
    assert late_s[int(0.99 * len(late_s))] < 0.3  # 0.02 where nothing else runs
    server.idle()


def test_bodies_may_be_packed(server):
    body = json.dumps({"prompt": "x", "max_tokens": 2, "temperature": 0}).encode()
    packed = {**JSON, "Content-Encoding": "gzip"}

    def asked(content, headers):
        return server.ask("POST", "/v1/completions", content=content, headers=headers)

    assert asked(gzip.compress(body), packed).json()["choices"][0]["text"] == "aa"
    large = gzip.compress(b'{"prompt": "' + b"a" * (20 << 20) + b'"}')
    assert len(large) < 1 << 17 and asked(large, packed).status_code == 413
    for content in (body, gzip.compress(body)[:-9], gzip.compress(body) + b"more"):
        answer = asked(content, packed)
        assert answer.status_code == 400 and "unpacked" in answer.json()["error"]["message"]
    answer = asked(body, {**JSON, "Content-Encoding": "br"})
    assert answer.status_code == 415 and "gzip" in answer.headers["accept-encoding"]


class Sent:
    """A request, as far as its body goes."""

    def __init__(self, *pieces):
        self.headers = {"content-type": "application/json"}
        self.pieces = pieces

    async def stream(self):
        for piece in self.pieces:
            yield piece


def test_a_large_body_is_parsed_by_a_process_and_another_where_that_has_ended(monkeypatch):
    def here(*_):
        raise AssertionError("the event loop's interpreter parses")

    monkeypatch.setattr(body_process, "parse", here)
    bodies = Bodies(max_bytes=1 << 20, max_length=10)
    content = json.dumps({"prompt": "\u00e9" * 10_000}).encode()  # as escapes

    def read(*pieces):
        return asyncio.run(bodies.read(CompletionRequest, Sent(*pieces)))  # type: ignore

    assert read(content[:7], content[7:]).prompt == "\u00e9" * 10_000
    (process,) = bodies._apart._all
    with pytest.raises(UsageError, match="no valid JSON"):
        read(content[:-1])
    assert bodies._apart._all == {process}
    process.kill()
    process.wait()
    assert read(content).prompt == "\u00e9" * 10_000
    (other,) = bodies._apart._all
    assert other is not process and other.poll() is None
    bodies.close()
    assert other.poll() is not None


def test_a_body_that_stops_coming_is_not_waited_for(monkeypatch):
    monkeypatch.setattr("jaxsys.serve.http.bodies.PIECE_S", 0.05)

    async def pieces():
        yield b"{"
        await asyncio.sleep(60)

    class Request:
        headers = JSON
        stream = staticmethod(pieces)

    bodies = Bodies(max_bytes=100, max_length=10)
    with pytest.raises(Exception, match="nothing more of the body") as caught:
        asyncio.run(bodies.read(CompletionRequest, Request()))  # type: ignore
    assert caught.value.status_code == 408  # type: ignore
    bodies.close()
