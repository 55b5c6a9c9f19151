#!/usr/bin/env python
"""How soon `/health` is answered while eight bodies of 8 MB arrive, again and again.

A server over a tiny random model, as `jaxsys serve` starts it, is sent bodies that cannot be meant:
half a million unknown fields, token ids, text, escapes, brackets. Eight clients send one each, wait
for the refusal and send it again, while another process asks for health every 20 ms.

    scripts/bench_health.py --seconds 20     # a row a kind of body, into results/health.json
"""

import argparse
import collections
import dataclasses
import http.client
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from jaxsys.results import table, write_result

CLIENTS = 8
BODY_BYTES = 8_000_000
UNKNOWN_FIELDS = 500_000
EVERY_S = 0.02
LIMIT_MS = 100.0


def bodies() -> dict[str, bytes]:
    """Kind -> a body of about 8 MB that is to be refused."""
    fields = b",".join(b'"k%07d":1234' % number for number in range(UNKNOWN_FIELDS))
    return {
        "unknown fields": b"{" + fields + b"}",
        "token ids": b'{"prompt":[' + b"1," * (BODY_BYTES // 2) + b"1]}",
        "text": b'{"prompt":"' + b"a, b: [c] " * (BODY_BYTES // 10) + b'"}',
        "escapes": b'{"prompt":"' + b"\\u00e9" * (BODY_BYTES // 6) + b'"}',
        "brackets": b'{"prompt":' + b"[" * BODY_BYTES,
    }


def send(port: int, kind: str, ready: Any, enough: Any, statuses: Any) -> None:
    """Eight clients send a body until it is enough; puts how often which status came back."""
    found: collections.Counter[int] = collections.Counter()
    body = bodies()[kind]
    ready.set()

    def client() -> None:
        while not enough.is_set():
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            try:
                headers = {"Content-Type": "application/json"}
                connection.request("POST", "/v1/completions", body=body, headers=headers)
                answer = connection.getresponse()
                answer.read()
                found[answer.status] += 1
            except OSError:
                found[0] += 1
            finally:
                connection.close()

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses.put(dict(found))


def asked(port: int, seconds: float) -> list[float]:
    """Milliseconds until health was answered, of each time it was asked for."""
    found, until_s = [], time.monotonic() + seconds
    while time.monotonic() < until_s:
        began_s = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/health")
        status = connection.getresponse().status
        connection.close()
        if status != 200:
            raise RuntimeError(f"/health answered {status}")
        took_s = time.monotonic() - began_s
        found.append(1e3 * took_s)
        time.sleep(max(0.0, EVERY_S - took_s))
    return found


def figures(kind: str, latencies_ms: list[float], statuses: dict[int, int]) -> dict[str, Any]:
    """A row."""
    p50, p99 = (float(np.percentile(latencies_ms, q)) for q in (50, 99))
    return {
        "bodies": kind,
        "clients": CLIENTS if statuses else 0,
        "refused": sum(statuses.values()),
        "statuses": ", ".join(f"{status}: {count}" for status, count in sorted(statuses.items())),
        "asked": len(latencies_ms),
        "p50_ms": round(p50, 2),
        "p99_ms": round(p99, 2),
        "max_ms": round(max(latencies_ms), 2),
    }


def write_model(folder: Path) -> None:
    """A tiny random model's files; JAX is not for the process that sends."""
    import jax

    from jaxsys.model import ByteTokenizer, initial_parameters, preset
    from jaxsys.model.save import save_safetensors

    jax.config.update("jax_platforms", "cpu")
    config = dataclasses.replace(preset("tiny"), num_layers=1)
    save_safetensors(folder, config, initial_parameters(config, seed=1), tokenizer=ByteTokenizer())


def main() -> int:
    """Measures each kind of body."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="a kind (default %(default)s)")
    parser.add_argument("--bodies", nargs="+", choices=list(bodies()), help="kinds (default all)")
    parser.add_argument("--out", default="results/health.json")
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="health-"))
    write_model(work / "tiny")
    command = [sys.executable, "-m", "jaxsys.cli", "serve", "--model", str(work / "tiny")]
    command += ["--port", "0", "--max-length", "200", "--max-batch", "2"]
    command += ["--max-prefill-tokens", "64", "--compilation-cache", str(work / "compiled")]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    rows = []
    try:
        found = None
        for line in server.stderr:
            found = re.search(r"serving on http://[^:]+:(\d+)/v1", line)
            if found:
                break
        if found is None:
            raise RuntimeError("the server did not come up")
        port = int(found[1])
        rest = threading.Thread(target=server.stderr.read, daemon=True)
        rest.start()
        rows.append(figures("none", asked(port, arguments.seconds / 4), {}))
        context = multiprocessing.get_context("spawn")
        for kind in arguments.bodies or bodies():
            ready, enough, statuses = context.Event(), context.Event(), context.Queue()
            sending = context.Process(target=send, args=(port, kind, ready, enough, statuses))
            sending.start()
            ready.wait(60)
            time.sleep(1)
            latencies_ms = asked(port, arguments.seconds)
            enough.set()
            rows.append(figures(kind, latencies_ms, statuses.get(timeout=200)))
            sending.join()
            print(rows[-1], flush=True)
    finally:
        server.terminate()
        server.wait(60)
    path = write_result(
        arguments.out,
        benchmark="health",
        kind="measured",
        config={
            "clients": CLIENTS,
            "body_bytes": BODY_BYTES,
            "unknown_fields": UNKNOWN_FIELDS,
            "seconds": arguments.seconds,
            "cores": os.cpu_count(),
            "limit_ms": LIMIT_MS,
        },
        rows=rows,
    )
    print(table(rows))
    worst = max(row["p99_ms"] for row in rows)
    print(f"p99 at worst {worst:.1f} ms; written to {path}", file=sys.stderr)
    return int(worst >= LIMIT_MS)


if __name__ == "__main__":
    sys.exit(main())
