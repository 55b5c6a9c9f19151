#!/usr/bin/env python
"""How fast pages of the cache change hands, between processes and between devices of one.

Between processes: two of this machine, each with a `PageServer`; one publishes pages in the shape
of a model, the other pulls them, compares them with what they must be and times it. On GPUs the
second process takes the last one, which may be the first; on CPU use a small shape.

Within a process: a prefill and a decode instance on two devices. While one request decodes, prompts
come one after another, each read in pieces; what counts is the time from a prompt's first token to
its second, which holds the hand-over, and how long the request that decodes is kept waiting.

    scripts/bench_pages.py --model llama-3-8b       # on a GPU; writes results/page_transfer.json
    scripts/bench_pages.py --model smollm2-135m --tokens 64 256 1024
    scripts/bench_pages.py --within                 # two GPUs, or CPU; results/hand_over.json
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsys.model import LoadedModel, preset
from jaxsys.results import table, write_result
from jaxsys.serve.deployment import DeploymentConfig, build_engine, choose_devices, compile_ahead
from jaxsys.serve.engine import Engine
from jaxsys.serve.handover import Ticket
from jaxsys.serve.paged_model import Contents
from jaxsys.serve.processes.page_transfer import PageServer
from jaxsys.serve.requests import SamplingParameters
from studies.serving import model_of

PAGE = 64


def contents(model: str, tokens: int, dtype: Any, seed: int) -> Contents:
    """Pages filled with what both sides can compute."""
    config = preset(model)
    shape = (2 * config.num_layers, -(-tokens // PAGE), PAGE, config.num_kv_heads, config.head_dim)
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def publish() -> None:
    """The other process: publishes what it is asked for on stdin, one JSON a line."""
    server = PageServer(jax.devices()[0], "127.0.0.1")
    for line in sys.stdin:
        wanted = json.loads(line)
        pages = jax.block_until_ready(
            contents(wanted["model"], wanted["tokens"], wanted["dtype"], wanted["seed"])
        )
        ticket = server.publish(wanted["seed"], pages)
        print(json.dumps([ticket.address, ticket.number, ticket.width]), flush=True)


async def hand_over(engine: Engine, tokens: int, repeats: int) -> dict[str, float]:
    """Milliseconds from first to second token of prompts, and between tokens beside them."""
    random = np.random.default_rng(tokens)

    async def serve(length: int, max_tokens: int, times_s: list[float]) -> None:
        prompt = random.integers(0, 1000, length).tolist()
        sampling = SamplingParameters(max_tokens=max_tokens, temperature=0)
        async for event in engine.generate(prompt, sampling):
            times_s.append(event.time_s)

    await serve(tokens, 3, [])  # whatever is made once
    seen_s: list[float] = []
    beside = asyncio.ensure_future(serve(16, 2000, seen_s))
    await asyncio.sleep(0.5)
    seen_s.clear()
    gaps_s = []
    for _ in range(repeats):
        times_s: list[float] = []
        await serve(tokens, 2, times_s)
        gaps_s.append(times_s[1] - times_s[0])
    beside.cancel()
    itl_s = np.diff(seen_s)
    return {
        "tokens": tokens,
        "first_to_second_ms": 1e3 * statistics.median(gaps_s),
        "itl_beside_ms": 1e3 * float(np.median(itl_s)),
        "itl_beside_max_ms": 1e3 * float(itl_s.max()),
    }


def within(arguments: argparse.Namespace) -> None:
    """The hand-over between two devices of this process."""
    devices = choose_devices(2)
    cpu = devices[0].platform == "cpu"
    dtype = "float32" if cpu else "bfloat16"
    name = "default" if cpu else arguments.model
    config, parameters = model_of(name, dtype)
    model = LoadedModel(
        config=config, parameters=parameters, tokenizer=None, chat_template=None, source=name
    )
    longest = max(arguments.tokens)
    settings = DeploymentConfig(
        prefill=1,
        decode=1,
        max_length=min(config.max_positions, longest + 2048),
        max_batch=4,
        max_prefill_tokens=arguments.piece,
        page_size=PAGE,
        page_count=4 * longest // PAGE + 40,
        prefix_caching=False,
    )
    rows = []

    async def run() -> None:
        engine = build_engine(model, settings, devices=devices)
        compile_ahead(engine.instances, everything=True)
        await engine.start()
        for tokens in arguments.tokens:
            found = await hand_over(engine, tokens, arguments.repeats)
            rows.append(found | {"pieces": -(-tokens // arguments.piece)})
            print(table(rows[-1:], {name: ".4g" for name in rows[-1]}), flush=True)
        await engine.drain(10)

    asyncio.run(run())
    shape = {"model": name, "dtype": dtype, "page_size": PAGE, "piece": arguments.piece}
    shape |= {"device": devices[0].device_kind, "repeats": arguments.repeats}
    path = arguments.out or "results/hand_over.json"
    write_result(path, benchmark="hand_over", kind="measured", config=shape, rows=rows)


def main() -> None:
    """Moves pages, compares, times, writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 512, 1024, 4096, 8192])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--within", action="store_true", help="between devices of this process")
    parser.add_argument("--piece", type=int, default=512, help="prompt tokens an iteration reads")
    parser.add_argument("--out", help="(default: results/page_transfer.json or hand_over.json)")
    parser.add_argument("--publish", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    # Both processes may share one GPU, so neither may take it all.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.4")
    if arguments.publish:
        publish()
        return
    if arguments.within:
        within(arguments)
        return
    device = jax.devices()[-1]
    dtype = "float32" if device.platform == "cpu" else "bfloat16"
    command = [sys.executable, __file__, "--publish"]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdin is not None and other.stdout is not None
    server = PageServer(device, "127.0.0.1")
    rows = []
    for tokens in arguments.tokens:
        times_s: list[float] = []
        size = 0
        for seed in range(arguments.repeats):
            asked = {"model": arguments.model, "tokens": tokens, "dtype": dtype, "seed": seed}
            other.stdin.write(json.dumps(asked) + "\n")
            other.stdin.flush()
            ticket = Ticket(*json.loads(other.stdout.readline()))
            with jax.default_device(device):
                expected = contents(arguments.model, tokens, jnp.dtype(dtype), seed)
            sharding = jax.sharding.SingleDeviceSharding(device)
            like = jax.ShapeDtypeStruct(expected.shape, expected.dtype, sharding=sharding)
            arrived, found = threading.Event(), []

            def then(result: Any, arrived: Any = arrived, found: Any = found) -> None:
                found.append(result)
                arrived.set()

            began_s = time.perf_counter()
            server.fetch(ticket, like, then)
            arrived.wait()
            times_s.append(time.perf_counter() - began_s)
            if isinstance(found[0], Exception):
                raise found[0]
            size = expected.nbytes
            assert bool((found[0] == expected).all()), f"{tokens} tokens arrived changed"
        pull_s = statistics.median(times_s)
        rows.append(
            {
                "tokens": tokens,
                "mib": size / 2**20,
                "pull_ms": 1e3 * pull_s,
                "first_pull_ms": 1e3 * times_s[0],
                "gb_per_s": size / pull_s / 1e9,
            }
        )
        print(table(rows[-1:], {name: ".4g" for name in rows[-1]}), flush=True)
    other.stdin.close()
    other.wait()
    config = {name: vars(arguments)[name] for name in ("model", "repeats")}
    config |= {"dtype": dtype, "page_size": PAGE, "device": device.device_kind}
    config["devices"] = "two processes, each its own" if len(jax.devices()) > 1 else "shared"
    write_result(
        arguments.out or "results/page_transfer.json",
        benchmark="page_transfer",
        kind="measured",
        config=config,
        rows=rows,
    )


if __name__ == "__main__":
    main()
