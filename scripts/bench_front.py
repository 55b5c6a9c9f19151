#!/usr/bin/env python
"""How many requests a second go through one front, at 64 simulated instances, and what limits it.

The front is the server's own: engine, exchange, routers, connections, and for the HTTP rows the
application under uvicorn. Instances are simulated in a second process: each has a connection,
speaks the protocol of real ones and gives tokens at a fixed pace without computing any. Clients
send the next request when the last one is answered, from the front's process for the engine rows
and from a third process for the HTTP rows.

    scripts/bench_front.py                          # writes results/front_capacity.json
"""

import argparse
import asyncio
import cProfile
import dataclasses
import io
import json
import multiprocessing
import pstats
import time
from typing import Any

import uvicorn

from jaxsys.model import ByteTokenizer, preset
from jaxsys.results import table, write_result
from jaxsys.serve.clock import WallClock
from jaxsys.serve.energy.governors import Served, make_router
from jaxsys.serve.energy.slo import SharedSlo
from jaxsys.serve.engine import Engine
from jaxsys.serve.http.api import ApiConfig
from jaxsys.serve.iterations import Role, SchedulerConfig
from jaxsys.serve.member import InstanceLoad
from jaxsys.serve.processes.front import bind, build_app
from jaxsys.serve.processes.remote import Switchboard
from jaxsys.serve.processes.secret import CHALLENGE_BYTES, proof
from jaxsys.serve.processes.wire import Frames, pack
from jaxsys.serve.requests import SamplingParameters

ITL_S = 0.01
TOKEN = 65
LOAD = dataclasses.asdict(InstanceLoad())


def entry(name: str, reason: str | None) -> list[Any]:
    """A token's event with all that may go beside it, as `RemoteInstance` reads it."""
    return [name, TOKEN, reason, None, "", False, [0.5, 0.1], 0, 0, None, None, None]


class Simulated(asyncio.Protocol):
    """One instance without a model."""

    def __init__(self, name: str, role: Role, token: str):
        self.name, self.token = name, token
        self.role: Role = role
        self.frames = Frames()
        self.challenge = b""
        self.running: dict[str, int] = {}
        self.wanted: dict[str, int] = {}

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def introduce(self) -> None:
        """Proves that it knows the secret, and says who it is."""
        self.transport.write(proof(self.token, b"switchboard", self.challenge))
        config = SchedulerConfig(
            page_count=4096, page_size=16, max_batch=256, decode_buckets=(1, 256), role=self.role
        )
        known = dataclasses.asdict(config)
        self.send(["hello", self.name, known, "none: simulated", "simulated"])
        asyncio.get_running_loop().call_later(ITL_S, self.tick)

    def data_received(self, data: bytes) -> None:
        missing = CHALLENGE_BYTES - len(self.challenge)
        if missing:
            self.challenge, data = self.challenge + data[:missing], data[missing:]
            if len(self.challenge) == CHALLENGE_BYTES:
                self.introduce()
        for frame in self.frames.feed(data):
            kind = frame[0]
            request: Any = frame[1] if len(frame) > 1 else None
            if kind == "submit":
                self.send(["offer", request["id"], 0])
            elif kind == "grant":
                self.send(["events", [entry(request, None)], ITL_S, LOAD])
                self.send(["delivery", request, None, 0, 0, [TOKEN]])
            elif kind == "offer":
                self.wanted[request["id"]] = request["sampling"]["max_tokens"] - 1
                self.send(["grant", request["id"], 0])
            elif kind == "delivery":
                self.running[request] = self.wanted.pop(request)
                self.send(["receipt", request, True])
            elif kind == "stop":
                self.send(["stopped"])

    def tick(self) -> None:
        """One iteration: a token for everyone."""
        events = []
        for name, left in list(self.running.items()):
            self.running[name] = left - 1
            if left > 1:
                events.append([name, TOKEN])
            else:
                del self.running[name]
                events.append(entry(name, "length"))
        if events or self.role == "prefill":
            batch = LOAD | {"batch": len(events), "kv_tokens": 300 * len(events)}
            self.send(["events", events, ITL_S, batch] if events else ["pulse", batch])
        elif int(time.monotonic() / ITL_S) % 50 == 0:
            self.send(["pulse", LOAD])
        pause_s = ITL_S if self.role == "decode" else 0.5
        asyncio.get_running_loop().call_later(pause_s, self.tick)

    def send(self, frame: list[Any]) -> None:
        """Sends to the front."""
        self.transport.write(pack(frame))


def instances(port: int, token: str, count: int) -> None:
    """The second process: half of the instances prefill, half decode."""

    async def run() -> None:
        loop = asyncio.get_running_loop()
        for index in range(count):
            role = "prefill" if index % 2 else "decode"
            await loop.create_connection(
                lambda index=index, role=role: Simulated(f"{role}-{index // 2}", role, token),
                "127.0.0.1",
                port,
            )
        await asyncio.Event().wait()

    asyncio.run(run())


def clients(port: int, count: int, body: bytes, seconds: float, results: Any) -> None:
    """The third process: HTTP clients, which keep their connections."""

    async def one(until_s: float) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: front\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        ).encode()
        done = 0
        while time.monotonic() < until_s:
            writer.write(head + body)
            status = await reader.readuntil(b"\r\n\r\n")
            assert b" 200 " in status, status
            if b"chunked" in status.lower():
                await reader.readuntil(b"\r\n0\r\n\r\n")
            else:
                length = int(status.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
            done += 1
        writer.close()
        return done

    async def run() -> None:
        began_s = time.monotonic()
        answered = await asyncio.gather(*[one(began_s + seconds) for _ in range(count)])
        results.put((sum(answered), time.monotonic() - began_s))

    asyncio.run(run())


async def measure(
    *, way: str, instance_count: int, route: str, output: int, prompt: int, count: int, s: float
) -> tuple[dict[str, Any], str]:
    """One row, and where the front's time went."""
    slo = SharedSlo()
    router = make_router(route, "h100", Served(model=preset("llama-3-8b")), slo)
    engine = Engine(clock=WallClock(), max_requests=10 * count, decode_router=router)
    await engine.start()
    up: list[Any] = []

    def came_up(instance: Any) -> None:
        up.append(instance)
        engine.add(instance, decodes=instance.config.role == "decode")

    tokenizer = ByteTokenizer()
    app = build_app(engine, tokenizer, ApiConfig(model_name="simulated", max_length=2048), slo)
    board = Switchboard(engine, "secret", on_up=came_up, on_down=lambda _: None)
    spawn = multiprocessing.get_context("spawn")
    port = await board.open("127.0.0.1")
    others = [spawn.Process(target=instances, args=(port, "secret", instance_count), daemon=True)]
    others[0].start()
    while len(up) < instance_count:
        await asyncio.sleep(0.05)
    profile = cProfile.Profile()
    rule = SamplingParameters(max_tokens=output, temperature=0)

    async def client(until_s: float) -> int:
        done = 0
        while time.monotonic() < until_s:
            async for _ in engine.generate([TOKEN] * prompt, rule):
                pass
            done += 1
        return done

    async def load(seconds: float) -> tuple[int, float]:
        """Requests answered, and in how many seconds."""
        if way == "engine":
            began_s = time.monotonic()
            done = await asyncio.gather(*[client(began_s + seconds) for _ in range(count)])
            return sum(done), time.monotonic() - began_s
        body = {"prompt": "A" * prompt, "max_tokens": output, "ignore_eos": True}
        body |= {"temperature": 0, "stream": way == "http stream"}
        results = spawn.Queue()
        process = spawn.Process(
            target=clients,
            args=(http_port, count, json.dumps(body).encode(), seconds, results),
            daemon=True,
        )
        process.start()
        answered = await asyncio.to_thread(results.get)
        process.join()
        return answered

    server = serving = None
    http_port = 0
    if way != "engine":
        listener = bind("127.0.0.1", 0)
        listener.listen(4096)
        http_port = listener.getsockname()[1]
        server = uvicorn.Server(
            uvicorn.Config(app, log_config=None, access_log=False, lifespan="off")
        )
        serving = asyncio.create_task(server.serve(sockets=[listener]))
    await load(2.0)
    cpu_s = time.process_time()
    answered, wall_s = await load(s)
    cpu_s = time.process_time() - cpu_s
    profile.enable()
    await load(s / 2)
    profile.disable()
    if server is not None and serving is not None:
        server.should_exit = True
        await serving
    await engine.drain(1)
    await board.close()
    others[0].kill()
    row = {
        "way": way,
        "instances": instance_count,
        "route": route,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "clients": count,
        "requests_per_s": answered / wall_s,
        "tokens_per_s": answered * output / wall_s,
        # What one core would do if it had nothing else to do: the capacity, whatever shares it.
        "requests_per_front_cpu_s": answered / cpu_s,
        "front_cpu_ms_per_request": 1e3 * cpu_s / answered,
        "front_busy": cpu_s / wall_s,
    }
    stream = io.StringIO()
    pstats.Stats(profile, stream=stream).strip_dirs().sort_stats("tottime").print_stats(14)
    return row, stream.getvalue()


def main() -> None:
    """Measures each row and writes them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--instances", type=int, default=64)
    parser.add_argument("--clients", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--out", default="results/front_capacity.json")
    arguments = parser.parse_args()
    rows, profiles = [], {}
    cases: list[tuple[str, int, str]] = [
        ("engine", 2, "fewest"),
        ("engine", 64, "fewest"),
        ("engine", 2, "energy"),
        ("http", 2, "fewest"),
        ("http", 64, "fewest"),
        ("http stream", 64, "fewest"),
    ]
    for way, output, route in cases:
        row, profile = asyncio.run(
            measure(
                way=way,
                instance_count=arguments.instances,
                route=route,
                output=output,
                prompt=arguments.prompt,
                count=arguments.clients,
                s=arguments.seconds,
            )
        )
        rows.append(row)
        profiles[f"{way}, {output}, {route}"] = profile.splitlines()[4:]
        formats = {name: ".3g" if isinstance(value, float) else "" for name, value in row.items()}
        print(table([row], formats), flush=True)
    config = vars(arguments) | {"itl_s": ITL_S}
    write_result(
        arguments.out,
        benchmark="front_capacity",
        kind="measured",
        config=config,
        rows=rows,
        profiles=profiles,
    )


if __name__ == "__main__":
    main()
