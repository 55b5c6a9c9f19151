#!/usr/bin/env python
"""How many requests a second go through fronts, at 64 simulated instances, and what limits them.

The fronts are the server's own: engine, exchange, routers, connections, HTTP. Instances are
simulated in another process: each has its connections, speaks the protocol of real ones and gives
tokens at a fixed pace without computing any. Clients send the next request when the last one is
answered, from this process for the rows of the engine alone and from another one for HTTP.

Of every process of the server the CPU time is read, and of some repeats the least counts: other
on the machine takes its caches away, and only adds. With several fronts, "on cores of their own" is
what they would do if each had a core and nothing else were the limit: their number over the CPU
time of a request at a front. The process that looks after them is told beside it.

    scripts/bench_front.py                          # writes results/front_capacity.json
    scripts/bench_front.py --fronts 1 2 4 --only http "http stream"
"""

import argparse
import asyncio
import cProfile
import dataclasses
import io
import json
import multiprocessing
import os
import pstats
import tempfile
import time
from collections.abc import Awaitable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from jaxsys.model import ByteTokenizer, initial_parameters, preset
from jaxsys.model.save import save_safetensors
from jaxsys.results import table, write_result
from jaxsys.serve.clock import WallClock
from jaxsys.serve.deployment import DeploymentConfig
from jaxsys.serve.energy.governors import Served, make_router
from jaxsys.serve.energy.slo import SharedSlo
from jaxsys.serve.engine import Engine
from jaxsys.serve.http.api import ApiConfig
from jaxsys.serve.http.listening import BACKLOG, HttpServer
from jaxsys.serve.iterations import Role, SchedulerConfig
from jaxsys.serve.member import InstanceLoad
from jaxsys.serve.processes.front import FrontSpec, bind, build_app
from jaxsys.serve.processes.fronts import Fronts
from jaxsys.serve.processes.remote import Switchboard
from jaxsys.serve.processes.secret import CHALLENGE_BYTES, proof
from jaxsys.serve.processes.wire import Frames, load_values, pack
from jaxsys.serve.processes.worker import WorkerSpec
from jaxsys.serve.requests import SamplingParameters

ITL_S = 0.01
LOAD_S = 0.05
"""How often fronts without tokens are told a load, as real instances do."""
TOKEN = 65
LOAD = InstanceLoad()


def entry(name: str, reason: str | None) -> list[Any]:
    """A token's event with all that may go beside it, as `RemoteInstance` reads it."""
    return [name, TOKEN, reason, None, "", False, [0.5, 0.1], 0, 0, None, None, None]


class Simulated:
    """One instance without a model."""

    def __init__(self, name: str, role: Role, token: str):
        self.name, self.token = name, token
        self.role: Role = role
        self.main: Line | None = None
        self.lines: list[Line] = []
        self.running: dict[str, tuple[int, Line]] = {}
        self.wanted: dict[str, int] = {}
        self.place: int | None = None

    async def connect(self, port: int) -> None:
        """Its first line, to whoever has launched it."""
        loop = asyncio.get_running_loop()
        _, self.main = await loop.create_connection(lambda: Line(self), "127.0.0.1", port)

    async def to_fronts(self, place: int, addresses: list[list[Any]]) -> None:
        """A line to each of several fronts."""
        self.place = place
        loop = asyncio.get_running_loop()
        for host, port in addresses:
            await loop.create_connection(lambda: Line(self), host, port)

    def take(self, frame: list[Any], line: "Line") -> None:
        """Does what a front says."""
        kind = frame[0]
        request: Any = frame[1] if len(frame) > 1 else None
        if kind == "submit":
            line.send(["offer", request["id"], 0])
        elif kind == "grant":
            line.send(["events", [entry(request, None)], [ITL_S], load_values(LOAD)])
            line.send(["delivery", request, None, 0, 0, [TOKEN]])
        elif kind == "offer":
            self.wanted[request["id"]] = request["sampling"]["max_tokens"] - 1
            line.send(["grant", request["id"], 0])
        elif kind == "delivery":
            self.running[request] = self.wanted.pop(request), line
            line.send(["receipt", request, True])
        elif kind == "fronts":
            task = asyncio.ensure_future(self.to_fronts(*frame[1:]))
            task.add_done_callback(lambda _: None)
        elif kind == "stop":
            line.send(["stopped"])

    def begin(self) -> None:
        """Its iterations."""
        asyncio.get_running_loop().call_later(ITL_S, self.tick)

    def tick(self) -> None:
        """One iteration: a token for everyone."""
        events: dict[Line, list[Any]] = {}
        for name, (left, line) in list(self.running.items()):
            self.running[name] = left - 1, line
            if left > 1:
                events.setdefault(line, []).append([name, TOKEN])
            else:
                del self.running[name]
                events.setdefault(line, []).append(entry(name, "length"))
        batch = sum(map(len, events.values()))
        load = load_values(dataclasses.replace(LOAD, batch=batch, kv_tokens=300 * batch))
        now_s = time.monotonic()
        for line in self.lines:
            mine = events.get(line)
            alone = len(self.lines) == 1
            if mine:
                line.send(["events", mine, [ITL_S] if alone else [], load])
                line.told_s = now_s
            elif now_s - line.told_s > (1.0 if line is self.main or not batch else LOAD_S):
                line.send(["pulse", [], load])
                line.told_s = now_s
        asyncio.get_running_loop().call_later(ITL_S if self.role == "decode" else 0.05, self.tick)


class Line(asyncio.Protocol):
    """A connection of one."""

    def __init__(self, instance: Simulated):
        self.instance = instance
        self.frames = Frames()
        self.challenge = b""
        self.told_s = 0.0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def introduce(self) -> None:
        """Proves that it knows the secret, and says who it is."""
        one = self.instance
        self.transport.write(proof(one.token, b"switchboard", self.challenge))
        config = SchedulerConfig(
            page_count=4096,
            page_size=16,
            max_batch=256,
            max_length=2048,
            decode_buckets=(1, 256),
            role=one.role,  # type: ignore[arg-type]
        )
        known = dataclasses.asdict(config)
        self.send(["hello", one.name, known, "none: simulated", "simulated", one.place])
        one.lines.append(self)

    def data_received(self, data: bytes) -> None:
        missing = CHALLENGE_BYTES - len(self.challenge)
        if missing:
            self.challenge, data = self.challenge + data[:missing], data[missing:]
            if len(self.challenge) == CHALLENGE_BYTES:
                self.introduce()
        for frame in self.frames.feed(data):
            self.instance.take(frame, self)

    def send(self, frame: list[Any]) -> None:
        """Sends to the front."""
        self.transport.write(pack(frame))


def instances(orders: Connection) -> None:
    """The process of the instances: each order is a name, a role, a port and a secret."""

    async def run() -> None:
        while True:
            order = await asyncio.to_thread(orders.recv)
            name, role, port, token = order
            one = Simulated(name, role, token)
            await one.connect(port)
            one.begin()

    asyncio.run(run())


class Launcher:
    """Launches simulated instances, all in one process."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.orders, theirs = spawn.Pipe()
        self.process = spawn.Process(target=instances, args=(theirs,), daemon=True)
        self.process.start()

    def launch(self, spec: WorkerSpec) -> "Launcher":
        """Has one more of them."""
        self.orders.send((spec.name, spec.role, spec.front_port, spec.token))
        return self

    def death(self) -> str | None:
        """Never: they are killed."""
        return None if self.process.is_alive() else "it ended"

    def kill(self) -> None:
        """Ends all of them."""
        self.process.kill()


def clients(port: int, count: int, body: bytes, seconds: float, results: Any) -> None:
    """The process of the HTTP clients, which keep their connections."""

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


def body_of(way: str, prompt: int, output: int) -> bytes:
    """What clients send."""
    body = {"prompt": "A" * prompt, "max_tokens": output, "ignore_eos": True}
    body |= {"temperature": 0, "stream": way == "http stream"}
    return json.dumps(body).encode()


async def http_load(port: int, count: int, body: bytes, seconds: float) -> tuple[int, float]:
    """Requests answered, and in how many seconds."""
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    process = spawn.Process(target=clients, args=(port, count, body, seconds, results), daemon=True)
    process.start()
    answered = await asyncio.to_thread(results.get)
    process.join()
    return answered


def cpu_s(process: int) -> float:
    """CPU time of a process and its threads so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(
    *,
    way: str,
    instance_count: int,
    route: str,
    output: int,
    prompt: int,
    count: int,
    s: float,
    repeats: int,
) -> tuple[dict[str, Any], str]:
    """One row of one front in this process, and where its time went."""
    slo = SharedSlo()
    router = make_router(route, "h100", Served(model=preset("llama-3-8b")), slo)
    engine = Engine(clock=WallClock(), max_requests=10 * count, decode_router=router)
    await engine.start()
    up: list[Any] = []

    def came_up(instance: Any) -> None:
        up.append(instance)
        engine.add(instance, decodes=instance.config.role == "decode")

    app = build_app(
        engine, ByteTokenizer(), ApiConfig(model_name="simulated", max_length=2048), slo
    )
    board = Switchboard(engine, "secret", on_up=came_up, on_down=lambda _: None)
    port = await board.open("127.0.0.1")
    launcher = Launcher()
    for index in range(instance_count):
        role = "prefill" if index % 2 else "decode"
        launcher.orders.send((f"{role}-{index // 2}", role, port, "secret"))
    while len(up) < instance_count:
        await asyncio.sleep(0.05)
    profile = cProfile.Profile(time.thread_time)  # whatever else runs on this machine
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
        return await http_load(http_port, count, body_of(way, prompt, output), seconds)

    server = serving = None
    http_port = 0
    if way != "engine":
        listener = bind("127.0.0.1", 0)
        listener.listen(BACKLOG)
        http_port = listener.getsockname()[1]
        server = HttpServer(app)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
    await load(2.0)
    least: tuple[float, int, float, float] | None = None
    for _ in range(repeats):
        before_s = time.process_time()
        answered, wall_s = await load(s)
        taken_s = time.process_time() - before_s
        found = taken_s / answered, answered, wall_s, taken_s
        least = found if least is None else min(least, found)
    assert least is not None
    _, answered, wall_s, taken_s = least
    profile.enable()
    await load(s / 2)
    profile.disable()
    if server is not None and serving is not None:
        server.should_exit = True
        await serving
    await engine.drain(1)
    await board.close()
    launcher.kill()
    row = row_of(way, route, 1, instance_count, prompt, output, count, answered, wall_s)
    row |= per_cpu(answered, [taken_s], 0.0) | {"front_busy": taken_s / wall_s}
    stream = io.StringIO()
    pstats.Stats(profile, stream=stream).strip_dirs().sort_stats("tottime").print_stats(40)
    return row, stream.getvalue()


async def measure_fronts(
    *,
    way: str,
    fronts: int,
    instance_count: int,
    output: int,
    prompt: int,
    count: int,
    s: float,
    repeats: int,
) -> dict[str, Any]:
    """One row of several fronts, each a process as `jaxsys serve --fronts` has them."""
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(preset("tiny"), num_layers=1)
        path = Path(folder) / "tiny"
        save_safetensors(
            path, config, initial_parameters(config, seed=1), tokenizer=ByteTokenizer()
        )
        half = instance_count // 2
        deployment = DeploymentConfig(prefill=half, decode=half, max_requests=10 * count)
        worker = WorkerSpec(
            name="",
            role="both",
            model=str(path),
            deployment=deployment,
            front_host="",
            front_port=0,
            token="",
        )
        spec = FrontSpec(port=0, model_name="simulated", worker=worker)
        launcher = Launcher()
        server = Fronts(spec, launcher, count=fronts, drain_s=1.0, reached_at="127.0.0.1")
        _, port = await server.start()
        processes = [one.process.pid for one in server.fronts if one.process is not None]
        body = body_of(way, prompt, output)
        await http_load(port, count, body, 2.0)
        idle_s = await cpu_of(processes, asyncio.sleep(s / 2))
        least: tuple[float, int, float, list[float]] | None = None
        for _ in range(repeats):
            taken_s = await cpu_of(
                processes, load := asyncio.ensure_future(http_load(port, count, body, s))
            )
            answered, wall_s = load.result()
            found = sum(taken_s[1:]) / answered, answered, wall_s, taken_s
            least = found if least is None else min(least, found)
        assert least is not None
        _, answered, wall_s, taken_s = least
        await server.stop(1.0)
        launcher.kill()
    row = row_of(way, "fewest", fronts, instance_count, prompt, output, count, answered, wall_s)
    row |= per_cpu(answered, taken_s[1:], taken_s[0])
    # What they take with nothing to do: loads that instances tell, and what is counted.
    return row | {"idle_cpu_pct_of_each_front": 100 * sum(idle_s[1:]) / fronts / (s / 2)}


async def cpu_of(processes: list[int], work: Awaitable[Any]) -> list[float]:
    """CPU seconds of this process, and of each of others, while something is done."""
    before_s = [time.process_time(), *map(cpu_s, processes)]
    await work
    after_s = [time.process_time(), *map(cpu_s, processes)]
    return [after - before for after, before in zip(after_s, before_s, strict=True)]


def row_of(
    way: str,
    route: str,
    fronts: int,
    instance_count: int,
    prompt: int,
    output: int,
    count: int,
    answered: int,
    wall_s: float,
) -> dict[str, Any]:
    """What was asked, and how many answers came."""
    return {
        "way": way,
        "fronts": fronts,
        "instances": instance_count,
        "route": route,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "clients": count,
        "requests_per_s": answered / wall_s,
        "tokens_per_s": answered * output / wall_s,
    }


def per_cpu(answered: int, fronts_s: list[float], own_s: float) -> dict[str, Any]:
    """What one core would do if it had nothing else to do: the capacity, whatever shares it.

    Args:
        own_s: CPU time of the process that looks after the fronts.
    """
    each_s = sum(fronts_s) / answered
    return {
        "requests_per_front_cpu_s": 1 / each_s,
        "front_cpu_ms_per_request": 1e3 * each_s,
        "supervisor_cpu_ms_per_request": 1e3 * own_s / answered,
        "requests_per_s_on_cores_of_their_own": len(fronts_s) / each_s,
        "front_shares_pct": [round(100 * one / sum(fronts_s), 1) for one in fronts_s],
    }


CASES: tuple[tuple[str, int, str], ...] = (
    ("engine", 2, "fewest"),
    ("engine", 64, "fewest"),
    ("engine", 2, "energy"),
    ("http", 2, "fewest"),
    ("http", 64, "fewest"),
    ("http stream", 64, "fewest"),
)


def main() -> None:
    """Measures each row and writes them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--instances", type=int, default=64)
    parser.add_argument("--clients", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--repeats", type=int, default=3, help="the one of least CPU counts")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--fronts", type=int, nargs="*", default=[2, 4], help="processes each")
    parser.add_argument("--only", nargs="*", help="ways: engine, http, http stream")
    parser.add_argument("--alone", action="store_true", help="one front in this process only")
    parser.add_argument("--note", help="kept with the result")
    parser.add_argument("--out", default="results/front_capacity.json")
    arguments = parser.parse_args()
    rows, profiles = [], {}
    common = {
        "instance_count": arguments.instances,
        "prompt": arguments.prompt,
        "count": arguments.clients,
        "s": arguments.seconds,
        "repeats": arguments.repeats,
    }

    def show(row: dict[str, Any]) -> None:
        rows.append(row)
        formats = {name: ".3g" if isinstance(value, float) else "" for name, value in row.items()}
        print(table([row], formats), flush=True)

    for way, output, route in CASES:
        if arguments.only and way not in arguments.only:
            continue
        row, profile = asyncio.run(measure(way=way, output=output, route=route, **common))
        show(row)
        profiles[f"{way}, {output}, {route}"] = profile.splitlines()[4:]
        if way == "engine" or arguments.alone:
            continue
        for fronts in arguments.fronts:
            show(asyncio.run(measure_fronts(way=way, fronts=fronts, output=output, **common)))
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
