#!/usr/bin/env python
"""Mixed requests of good and bad clients over HTTP, after which nothing may be left behind.

A server over a tiny random model runs on a thread of its own, with few pages and a short queue, so
that requests wait, are preempted and are refused. Clients complete, chat and stream with all kinds
of parameters, leave at random moments, read slowly, send too much, half of it, or no UTF-8; make
the chat template loop; strangers call where pages are handed over. After each round every page,
slot, task, thread and file must be back, and no answer may be a 5xx. At the end, the slow tests of
clocks are run: however an instance ends, a made-up driver gets its clock back, 20 times of 20.

    scripts/soak_serve.py                                   # 10,000 requests
    scripts/soak_serve.py --minutes 10 --disaggregated      # writes results/soak_disaggregated.json
"""

import argparse
import asyncio
import collections
import contextlib
import functools
import gzip
import json
import os
import queue
import random
import subprocess
import sys
import tempfile
import threading
import time
import unittest.mock
import xml.etree.ElementTree
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import openai

from jaxsys.model import ByteTokenizer, LoadedModel, initial_parameters, preset
from jaxsys.results import table, write_result
from jaxsys.serve.deployment import DeploymentConfig, build_engine, choose_devices, compile_ahead
from jaxsys.serve.energy.slo import SharedSlo, Slo
from jaxsys.serve.http.api import ApiConfig
from jaxsys.serve.http.listening import HttpServer
from jaxsys.serve.http.templates import PROCESSES, Templates
from jaxsys.serve.processes.front import bind, build_app
from jaxsys.serve.processes.page_transfer import PageServer

ROUND = 500
"""Requests after which everything must be back."""
CLIENTS = 24
MAX_BODY_BYTES = 1 << 16
MAX_LENGTH = 192
POOL = ("pool", "template", "bodies")
"""Threads of the server that come when they are first needed, and stay."""
LOOPS = (
    "{% if loops %}{% for a in range(9999) %}{% for b in range(9999) %}{{ b }}{% endfor %}"
    "{% endfor %}{% endif %}"
)
TEMPLATE_S = 2.0
"""A template may take so long here; a looping one takes for ever."""
ROOT = Path(__file__).parents[1]
CLOCKS = "tests/serve/test_clock_given_back.py"

Random = random.Random
Client = Callable[["Clients", Random], Awaitable[str]]


class Server:
    """The application under uvicorn on a thread."""

    def __init__(self, *, disaggregated: bool):
        self.config = DeploymentConfig(
            prefill=1,
            decode=2 if disaggregated else 0,
            max_batch=8,
            max_length=MAX_LENGTH,
            max_prefill_tokens=32,
            page_size=8,
            page_count=64,
            max_requests=40,
        )
        devices = choose_devices(len(self.config.roles))  # before anything starts JAX
        shape = preset("tiny")
        tokenizer = ByteTokenizer()
        assert tokenizer.chat_template is not None
        tokenizer.chat_template = LOOPS + tokenizer.chat_template
        model = LoadedModel(
            config=shape,
            parameters=jax.tree.map(lambda leaf: leaf * 4, initial_parameters(shape, seed=1)),
            tokenizer=tokenizer,
            chat_template=tokenizer.chat_template,
            source="tiny",
        )
        self.engine: Any = build_engine(model, self.config, devices=devices)
        compile_ahead(self.engine.instances, everything=True)
        api = ApiConfig(model_name="tiny", max_length=MAX_LENGTH, max_body_bytes=MAX_BODY_BYTES)
        short = functools.partial(Templates, limit_s=TEMPLATE_S)
        with unittest.mock.patch("jaxsys.serve.http.api.Templates", short):
            self.app = build_app(self.engine, tokenizer, api, SharedSlo(Slo()))
        self.pages, self.peer = (
            PageServer(devices[0], "127.0.0.1", timeout_s=20, secret="of the soak") for _ in "ab"
        )
        self.listener = bind("127.0.0.1", 0)
        self.listener.listen(128)
        self.port: int = self.listener.getsockname()[1]
        self.loop = asyncio.new_event_loop()
        self.loop.set_default_executor(ThreadPoolExecutor(4, POOL[0]))
        self._http = HttpServer(self.app)
        self._thread = threading.Thread(target=self._run, name="server")
        self._thread.start()

    def _run(self) -> None:
        async def serve() -> None:
            await self.engine.start()
            await self._http.serve(sockets=[self.listener])
            await self.engine.drain(5)
            self.app.state.close()

        self.loop.run_until_complete(serve())

    def hands_over(self) -> None:
        """Raises RuntimeError unless pages still go to whoever knows the secret."""
        contents = jnp.arange(48.0).reshape(2, 4, 3, 2, 1)
        like = jax.ShapeDtypeStruct(contents.shape, contents.dtype, sharding=contents.sharding)
        results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.peer.fetch(self.pages.publish("soak", contents), like, results.put)
        found = results.get(timeout=30)
        self.pages.release("soak", pulled=True)
        if not isinstance(found, jax.Array) or not np.array_equal(found, contents):
            raise RuntimeError(f"pages did not come: {found!r}")

    def stop(self) -> None:
        """Drains; instances and the thread end."""
        self.pages.close()
        self.peer.close()
        self._http.should_exit = True
        self._thread.join()
        self.loop.close()

    def tasks(self) -> int:
        """Tasks on the server's loop."""

        async def count() -> int:
            return len(asyncio.all_tasks()) - 1  # this one

        return asyncio.run_coroutine_threadsafe(count(), self.loop).result(10)

    def left_behind(self) -> list[str]:
        """What requests hold that have ended."""
        engine, found = self.engine, []
        if self.pages.published:
            found.append(f"pages of {self.pages.published} requests")
        if engine.unfinished or len(engine.exchange):
            found.append(f"{engine.unfinished} requests, {len(engine.exchange)} passages")
        for one in engine.instances:
            scheduler = one.scheduler
            if scheduler.requests or one.requests or one.in_flight:
                found.append(f"{one.name} counts {one.in_flight} and has {list(one.requests)}")
            if scheduler.allocator.held or len(scheduler._free_slots) != self.config.max_batch:
                found.append(f"{one.name} holds {scheduler.allocator.held} pages, or slots")
        return found


class Clients:
    """What clients share."""

    def __init__(self, server: Server):
        self.port = port = server.port
        self.pages = server.pages.address
        address = f"http://127.0.0.1:{port}"
        limits = httpx.Limits(max_connections=2 * CLIENTS)
        self.http = httpx.AsyncClient(base_url=address, timeout=120, limits=limits)
        self.openai = openai.AsyncOpenAI(
            base_url=address + "/v1", api_key="none", timeout=120, max_retries=0
        )

    async def close(self) -> None:
        await self.http.aclose()
        await self.openai.close()


def words(rng: Random, most: int = 90) -> str:
    """A prompt; many begin alike, so that prefixes are shared."""
    start = "the same beginning of a prompt, "[: rng.choice((0, 8, 32))]
    return start + "".join(rng.choices("abc défg 日本\n\U0001f642", k=rng.randint(1, most // 4)))


def parameters(rng: Random) -> dict[str, Any]:
    """Sampling of all kinds."""
    given: dict[str, Any] = {"max_tokens": rng.randint(1, 60)}
    extra: dict[str, Any] = {}
    if rng.random() < 0.5:
        given |= {"temperature": rng.choice((0, 0.7, 2)), "seed": rng.randrange(1 << 31)}
    if rng.random() < 0.3:
        given |= {"top_p": rng.choice((0.1, 0.9, 1.0)), "stop": ["ab", "日"]}
    if rng.random() < 0.2:
        given |= {"presence_penalty": 1.5, "frequency_penalty": -1.0, "logit_bias": {"65": 5}}
    if rng.random() < 0.2:
        extra |= {"top_k": rng.randint(0, 300), "min_p": 0.05, "repetition_penalty": 1.3}
    if rng.random() < 0.3:
        extra["ignore_eos"] = True
    return given | {"extra_body": extra}


async def completes(all: Clients, rng: Random) -> str:
    """One answer, or several at once."""
    given = parameters(rng)
    if rng.random() < 0.2:
        given["n"] = rng.randint(2, 4)
    if rng.random() < 0.2:
        given["logprobs"] = rng.randint(0, 5)
    answer = await all.openai.completions.create(model="tiny", prompt=words(rng), **given)
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= given["max_tokens"] * given.get("n", 1)
    assert all_ended(answer.choices)
    return "complete"


async def chats(all: Clients, rng: Random) -> str:
    """A stream to its end."""
    messages: Any = [{"role": "user", "content": words(rng)}]
    given = parameters(rng)
    stream = await all.openai.chat.completions.create(
        model="tiny", messages=messages, stream=True, **given
    )
    last: Any = None
    async for chunk in stream:
        last = chunk
    assert all_ended(last.choices)
    return "streamed"


def all_ended(choices: Any) -> bool:
    """Whether each says why it ended."""
    return all(choice.finish_reason in ("stop", "length") for choice in choices)


async def leaves(all: Clients, rng: Random) -> str:
    """Takes a few tokens of a stream and goes."""
    body = {"prompt": words(rng), "max_tokens": 60, "stream": True, "ignore_eos": True}
    async with all.http.stream("POST", "/v1/completions", json=body) as answer:
        if refused(answer):
            return "429"
        left = rng.randint(0, 20)
        async for _ in answer.aiter_lines():
            left -= 1
            if left < 0:
                break
    return "left"


async def loses_patience(all: Clients, rng: Random) -> str:
    """Goes before the answer to a request that is not streamed."""
    body = {"prompt": words(rng), "n": rng.randint(1, 3), "max_tokens": 60, "ignore_eos": True}
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(rng.expovariate(10)):
            if refused(await all.http.post("/v1/completions", json=body)):
                return "429"
    return "gone"


async def reads_slowly(all: Clients, rng: Random) -> str:
    """A small window, a few bytes at a time; some go before the end."""
    body = {"prompt": words(rng), "max_tokens": 60, "stream": True, "logprobs": 5}
    reader, writer = await asyncio.open_connection("127.0.0.1", all.port, limit=1024)
    try:
        writer.write(raw(json.dumps(body).encode()))
        for _ in range(rng.randint(5, 40)):
            await asyncio.sleep(rng.random() * 0.05)
            if not await reader.read(200):
                break
    finally:
        writer.transport.abort()
    return "read slowly"


async def sends_half(all: Clients, rng: Random) -> str:
    """A body that never ends."""
    _, writer = await asyncio.open_connection("127.0.0.1", all.port)
    writer.write(raw(json.dumps({"prompt": words(rng)}).encode())[: -rng.randint(1, 10)])
    await writer.drain()
    await asyncio.sleep(rng.random() * 0.05)
    writer.transport.abort()
    return "sent half"


def raw(body: bytes) -> bytes:
    """A request's bytes."""
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body


async def sends_nonsense(all: Clients, rng: Random) -> str:
    """What must be refused, and is."""
    bodies: list[tuple[bytes, int]] = [
        (b'{"prompt": "' + b"x" * MAX_LENGTH + b'"}', 400),
        (b'{"prompt": "' + b"x" * MAX_BODY_BYTES + b'"}', 413),
        (b'{"prompt": "\xff\xfe\x80"}', 400),
        (b'{"prompt": "\\ud800", "max_tokens": 1}', 400),
        (b'{"prompt": ', 400),
        (b"[" * 30_000, 400),
        (b'{"prompt": [70000]}', 400),
        (b'{"prompt": "a", "max_tokens": 1e400}', 400),
        (b'{"prompt": "a", "temperature": NaN}', 400),
        (b'{"prompt": "a", "n": 100000}', 400),
        (b'{"prompt": "a", "top_p": -1}', 400),
        (b'{"prompt": "a", "logit_bias": {"-3": 1}}', 400),
        (b'{"prompt": "a", "model": "another"}', 404),
        (b'{"prompt": "a", "max_tokens": -1}', 400),
        (b"{" + b",".join(b'"k%d": 1' % key for key in range(4000)) + b"}", 400),
    ]
    body, status = rng.choice(bodies)
    answer = await all.http.post(
        "/v1/completions", content=body, headers={"Content-Type": "application/json"}
    )
    if answer.status_code == 429:
        return "429"
    if answer.status_code != status:
        raise RuntimeError(f"{body[:60]} was answered {answer.status_code}: {answer.text[:200]}")
    return f"{status} as due"


def refused(answer: httpx.Response) -> bool:
    """Whether the server has too much to do; raises where it is at fault."""
    if answer.status_code not in (200, 429):
        raise RuntimeError(f"answered {answer.status_code}")
    return answer.status_code == 429


async def echoes(all: Clients, rng: Random) -> str:
    """A prompt with how likely each of its tokens is, from a body that is packed."""
    given = {"prompt": words(rng), "max_tokens": 1, "echo": True, "logprobs": rng.randint(0, 3)}
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    body = gzip.compress(json.dumps(given).encode())
    answer = await all.http.post("/v1/completions", content=body, headers=headers)
    if refused(answer):
        return "429"
    choice = answer.json()["choices"][0]
    if "".join(choice["logprobs"]["tokens"]) != choice["text"]:
        raise RuntimeError(f"tokens do not join to {choice['text']!r}")
    return "echoed"


async def is_silent(all: Clients, rng: Random) -> str:
    """Connections that say nothing, or never end their head, while somebody asks for health."""
    opened = [await asyncio.open_connection("127.0.0.1", all.port) for _ in range(5)]
    try:
        opened[0][1].write(b"GET /health HTTP/1.1\r\nHost:")
        if (await all.http.get("/health")).status_code != 200:
            raise RuntimeError("not healthy beside silent connections")
        await asyncio.sleep(rng.random() * 0.2)
    finally:
        for _, writer in opened:
            writer.transport.abort()
    return "silent"


async def loops(all: Clients, rng: Random) -> str:
    """A chat whose template never ends."""
    given = {"messages": [{"role": "user", "content": words(rng)}], "max_tokens": 1}
    body = given | {"chat_template_kwargs": {"loops": True}}
    answer = await all.http.post("/v1/chat/completions", json=body)
    if answer.status_code == 429:
        return "429"
    if answer.status_code != 400 or "took over" not in answer.text:
        raise RuntimeError(f"a looping template: {answer.status_code} {answer.text[:200]}")
    return "template ended"


async def is_a_stranger(all: Clients, rng: Random) -> str:
    """Says something where pages are handed over, without the secret."""
    host, port = all.pages.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        with contextlib.suppress(OSError):  # it may have been turned away before it spoke
            writer.write(rng.choice((b"good morning, is anybody there?", b"x" * 100, b"")))
            writer.write_eof()
            while await reader.read(1 << 16):
                pass
    finally:
        writer.close()
    return "stranger turned away"


async def asks_itself(all: Clients, rng: Random) -> str:
    """A text to tokens and back."""
    text = words(rng)
    found = await all.http.post("/tokenize", json={"prompt": text})
    back = await all.http.post("/detokenize", json={"tokens": found.json()["tokens"]})
    if back.json()["prompt"] != text:
        raise RuntimeError(f"{text!r} came back as {back.text[:200]}")
    return "tokenized"


KINDS: list[tuple[Client, int]] = [
    (completes, 30),
    (chats, 25),
    (leaves, 12),
    (loses_patience, 12),
    (reads_slowly, 6),
    (sends_half, 5),
    (sends_nonsense, 10),
    (echoes, 6),
    (is_silent, 3),
    (asks_itself, 4),
    (loops, 1),
    (is_a_stranger, 3),
]


async def one(all: Clients, rng: Random) -> str:
    """One request of a random kind; returns what became of it."""
    client = rng.choices([kind for kind, _ in KINDS], [weight for _, weight in KINDS])[0]
    try:
        async with asyncio.timeout(180):
            return await client(all, rng)
    except openai.RateLimitError as error:
        assert int(error.response.headers["Retry-After"]) >= 1
        return "429"


async def play(server: Server, rng: Random) -> collections.Counter[str]:
    """One round; returns how often what came of it."""
    all = Clients(server)
    free = asyncio.Semaphore(CLIENTS)
    found: collections.Counter[str] = collections.Counter()

    async def limited() -> None:
        async with free:
            await asyncio.sleep(rng.expovariate(50))
            found[await one(all, rng)] += 1

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(ROUND):
                group.create_task(limited())
    finally:
        await all.close()
    return found


def check_nothing_is_left(server: Server, tasks: int, threads: set[str], files: int) -> None:
    """Waits for the server to come to rest.

    Raises:
        RuntimeError: if it has more than it began with.
    """
    deadline_s = time.monotonic() + 20
    while True:
        found = server.left_behind()
        now = thread_names()
        if server.tasks() > tasks:
            found.append(f"{server.tasks() - tasks} tasks")
        if now - threads:
            found.append(f"threads {sorted(now - threads)}")
        if len(os.listdir("/proc/self/fd")) > files + 2 * PROCESSES:  # pipes to those
            found.append("open files")
        if not found:
            break
        if time.monotonic() > deadline_s:
            raise RuntimeError("left behind: " + "; ".join(found))
        time.sleep(0.05)
    for instance in server.engine.instances:
        instance.scheduler.check()
    server.hands_over()


def clocks_given_back() -> dict[str, str]:
    """Runs the slow tests of clocks; how an instance ends -> "20 of 20", or what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "slow",
            CLOCKS,
            f"--junitxml={report}",
        ]
        subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.DEVNULL)
        cases = xml.etree.ElementTree.parse(report).iter("testcase")
        found = {}
        for case in cases:
            name = case.get("name", "").partition("[")[2].rstrip("]")
            wrong = [part.get("message", "") for part in case if part.tag != "properties"]
            found[name] = "; ".join(wrong)[:300] or "20 of 20"
    return found


def thread_names() -> set[str]:
    """Threads of this process beside the pool's."""
    names = {thread.name for thread in threading.enumerate()}
    return {name for name in names if not name.startswith(POOL)}


def resident_mib() -> float:
    """Memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> int:
    """Plays rounds until there were enough."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    much = parser.add_mutually_exclusive_group()
    much.add_argument("--requests", type=int, default=10_000, help="(default %(default)s)")
    much.add_argument("--minutes", type=float, help="instead of a number of requests")
    parser.add_argument(
        "--disaggregated", action="store_true", help="one prefill and two decode instances"
    )
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    parser.add_argument("--out", help="(default results/soak_colocated.json or _disaggregated)")
    arguments = parser.parse_args()
    form = "disaggregated" if arguments.disaggregated else "colocated"
    server = Server(disaggregated=arguments.disaggregated)
    rng = Random(arguments.seed)
    rows: list[dict[str, Any]] = []
    try:
        asyncio.run(play(server, rng))  # whatever is made once is made now
        threads = thread_names()
        tasks, files = server.tasks(), len(os.listdir("/proc/self/fd"))
        requests, began_s = 0, time.monotonic()
        while (
            requests < arguments.requests
            if arguments.minutes is None
            else time.monotonic() - began_s < 60 * arguments.minutes
        ):
            found = asyncio.run(play(server, rng))
            check_nothing_is_left(server, tasks, threads, files)
            requests += found.total()
            rows.append(
                {
                    "requests": requests,
                    "seconds": round(time.monotonic() - began_s, 1),
                    "resident_mib": round(resident_mib()),
                    "preemptions": sum(one.load.preemptions for one in server.engine.instances),
                    **dict(sorted(found.items())),
                }
            )
            print(rows[-1], flush=True)
    finally:
        server.stop()
    ended = {"server", *(instance.name for instance in server.engine.instances)}
    left = [thread.name for thread in threading.enumerate() if thread.name in ended]
    assert not left, f"threads {left} outlive the server"
    config = {"form": form, "seed": arguments.seed, "clients": CLIENTS, "model": "tiny"}
    clocks = clocks_given_back()
    rows[-1] |= {f"clock: {name}": how for name, how in clocks.items()}
    path = write_result(
        arguments.out or f"results/soak_{form}.json",
        benchmark=f"soak_{form}",
        kind="measured",
        config=config,
        rows=rows,
    )
    print(table(rows[-1:]))
    print(f"nothing was left behind; written to {path}", file=sys.stderr)
    kept = [name for name, how in clocks.items() if how != "20 of 20"]
    if kept or not clocks:
        print(f"clocks were not given back: {', '.join(kept) or 'no test ran'}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
