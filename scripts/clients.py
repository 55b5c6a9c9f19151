#!/usr/bin/env python
"""Installs clients of OpenAI's API, each in an environment of its own, and runs their examples.

The server runs here over a small model of random weights, since it is the wire that is tried, with
SmolLM2's tokenizer and template, two layers, and answers that end soon. --model takes another
model, --url a server that runs. What a client does with it stands in
scripts/client_examples/with_NAME.py (or .mjs), which need nothing of jaxsys. Prints a table and
writes results/clients.json; exits with 1 if an example fails.

    scripts/clients.py                        # all of them: some minutes and 8 GB of packages
    scripts/clients.py openai litellm         # those
    scripts/clients.py --newest openai        # the newest release instead of the one tested last
"""

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxsys.model import DecoderConfig, default_model_path, initial_parameters, load
from jaxsys.model.save import save_safetensors
from jaxsys.results import table as shown
from jaxsys.results import write_result

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "scripts" / "client_examples"
CLIENTS: dict[str, tuple[str, ...]] = {
    "openai": ("openai==3.57.0", "pydantic>=2"),
    "litellm": ("litellm==1.110.2",),
    "langchain": ("langchain-openai==1.7.4",),
    "llm": ("llm",),
    "instructor": ("instructor==1.17.0",),
    "pydantic_ai": ("pydantic-ai-slim[openai]==2.68.0",),
    "openai_agents": ("openai-agents==0.24.0",),
    "vercel_ai": (
        "ai@7.0.173",
        "@ai-sdk/openai@4.0.118",
        "@ai-sdk/openai-compatible@3.0.92",
        "zod",
    ),
    "lm_eval": ("lm-eval[api]==0.4.13",),
    "guidellm": ("guidellm==0.8.1",),
    "aiperf": ("aiperf==0.13.0",),
}
"""Packages of each client, as they were tested last; those of vercel_ai are npm's."""
START_S = 600
CLIENT_S = 900


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/clients.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("clients", nargs="*", metavar="CLIENT", help=f"of: {', '.join(CLIENTS)} (default: all)")
    add("--model", type=Path, help="folder of a model to serve")
    add("--url", help="of a server that runs, such as http://127.0.0.1:8000")
    add("--newest", action="store_true", help="the newest releases")
    add("--environments", type=Path, default=ROOT / ".venv-clients", help="folder for them")
    add("--only-install", action="store_true", help="run nothing")
    add("--out", type=Path, default=Path("results"), help="folder for the JSON")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.clients) - set(CLIENTS))
    if unknown:
        parser.error(f"{unknown[0]!r} is no client; use {', '.join(CLIENTS)}")
    names = arguments.clients or list(CLIENTS)
    rows: list[dict[str, Any]] = []
    installed = []
    for name in names:
        try:
            installed.append((name, install(name, arguments.environments, arguments.newest)))
        except (OSError, subprocess.CalledProcessError) as error:
            rows.append(_row(name, "install", False, 0.0, _last_line(error)))
            print(f"{name}: not installed: {rows[-1]['why']}", flush=True)
    if arguments.only_install:
        return int(bool(rows))
    with contextlib.ExitStack() as stack:
        model = arguments.model or small_model(arguments.environments / "small")
        url = arguments.url or stack.enter_context(served(model))
        for name, command in installed:
            rows += run(name, command, url, model)
    versions = {name: version_of(name, arguments.environments) for name, _ in installed}
    failed = [row for row in rows if not row["ok"]]
    path = write_result(
        arguments.out / "clients.json",
        benchmark="clients",
        kind="measured",
        config={"clients": versions},
        rows=rows,
        figures={"examples": len(rows), "failed": len(failed)},
    )
    print(shown(rows))
    print(f"{len(rows) - len(failed)} of {len(rows)} examples passed; written to {path}")
    return int(bool(failed))


def install(name: str, folder: Path, newest: bool) -> list[str]:
    """Makes a client's environment, where it is not there; how to run its examples in it."""
    home = folder / name
    packages = [spec.split("==")[0] if newest else spec for spec in CLIENTS[name]]
    mark = home / "installed.json"
    script = next(EXAMPLES.glob(f"with_{name}.*"))
    fresh = not mark.exists() or json.loads(mark.read_text()) != packages
    if script.suffix == ".mjs":
        node = shutil.which("node")
        if node is None:
            raise OSError("node is not installed; install Node.js 20 or later")
        if fresh:
            home.mkdir(parents=True, exist_ok=True)
            if newest:
                packages = [spec[0] + spec[1:].partition("@")[0] for spec in packages]
            _checked(["npm", "install", "--silent", "--prefix", str(home), *packages])
        # Node looks for packages beside the script.
        shutil.copy(script, home / script.name)
        command = [node, str(home / script.name)]
    else:
        python = home / "bin" / "python"
        if fresh:
            venv.create(home, with_pip=True, clear=True)
            _checked([str(python), "-m", "pip", "install", "-q", *packages])
        command = [str(python), str(script)]
    mark.write_text(json.dumps(packages))
    return command


def version_of(name: str, folder: Path) -> str:
    """What is installed of a client's first package."""
    home, package = folder / name, CLIENTS[name][0].split("==")[0].split("[")[0]
    if (home / "node_modules").exists():
        path = home / "node_modules" / package.rsplit("@", 1)[0] / "package.json"
        return json.loads(path.read_text())["version"]
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    command = [str(home / "bin" / "python"), "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def small_model(folder: Path) -> Path:
    """A folder with a model that says anything, and ends after some 20 tokens, never at once.

    Embeddings share a direction that the end's logit is along; the new line that stands before an
    answer has it the other way round.
    """
    if (folder / "tokenizer.json").exists():
        return folder
    loaded = load(default_model_path())
    tokenizer = loaded.tokenizer
    assert tokenizer is not None
    config = DecoderConfig(
        vocab_size=loaded.config.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_positions=8192,
    )
    random = np.random.default_rng(0)
    table = 1 + random.standard_normal((config.vocab_size, 64), np.float32)
    table[tokenizer.encode("\n", add_special=False)] -= 2
    head = 0.3 * random.standard_normal((64, config.vocab_size), np.float32)
    head[:, list(tokenizer.eos_ids)] = 0
    head[:, tokenizer.eos_ids[0]] = 0.25
    parameters = initial_parameters(config, seed=0)
    edge = dict(parameters["edge"])
    edge |= {"embed": {"table": table}, "head": {"kernel": head}}
    save_safetensors(folder, config, {**parameters, "edge": edge}, tokenizer=tokenizer)
    return folder


@contextlib.contextmanager
def served(model: Path) -> Iterator[str]:
    """A server over a model; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--model", str(model), "--model-name", "served", "--decode", "0"]
    options += ["--max-length", "4096", "--pages", "1024", "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, "-m", "jaxsys.cli", "serve", *options]
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(url, server)
            print(f"serving at {url}", flush=True)
            yield url
        finally:
            server.terminate()
            server.wait(60)


def _wait(url: str, server: subprocess.Popen) -> None:
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with {server.returncode} while it started")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return
        time.sleep(1)
    raise SystemExit(f"the server did not start within {START_S} s")


def run(name: str, command: Sequence[str], url: str, model: Path) -> list[dict[str, Any]]:
    """Runs a client's examples; a row each. Load generators count with the tokenizer of `model`."""
    environment = os.environ | {
        "JAXSYS_URL": url,
        "JAXSYS_MODEL_FOLDER": str(model.absolute()),
        "OPENAI_API_KEY": "none",
        "OPENAI_BASE_URL": f"{url}/v1",
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "PATH": f"{Path(command[0]).parent}{os.pathsep}{os.environ['PATH']}",
    }
    environment.pop("PYTHONPATH", None)
    rows = []
    with tempfile.TemporaryDirectory() as place, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, env=environment, cwd=place, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        alarm = threading.Timer(CLIENT_S, process.kill)
        alarm.start()
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith('{"example"'):
                found = json.loads(line)
                row = _row(name, found["example"], found["ok"], found["seconds"], found["why"])
                rows.append(row)
                print(f"{name} {row['example']}: {'ok' if row['ok'] else row['why']}", flush=True)
        code = process.wait()
        late = not alarm.is_alive()
        alarm.cancel()
        errors.seek(0)
        said = errors.read().strip().splitlines()
    if code or not rows:
        why = f"took over {CLIENT_S} s" if late else (said or ["nothing was said"])[-1]
        rows.append(_row(name, "all", False, 0.0, why))
        print(f"{name}: {rows[-1]['why']}", flush=True)
    return rows


def _row(client: str, example: str, ok: bool, seconds: float, why: str) -> dict[str, Any]:
    return {"client": client, "example": example, "ok": ok, "seconds": seconds, "why": why[:200]}


def _checked(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _last_line(error: Exception) -> str:
    text = getattr(error, "stderr", None) or str(error)
    return (text.strip().splitlines() or [""])[-1]


if __name__ == "__main__":
    raise SystemExit(main())
