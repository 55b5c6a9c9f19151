"""`jaxsys serve` as a process: the openai client against it, SIGTERM, and what it refuses."""

import contextlib
import dataclasses
import re
import signal
import socket
import subprocess
import sys
import threading
from typing import Any

import httpx
import jax
import openai
import pytest

from jaxsys.cli import main
from jaxsys.model import ByteTokenizer, initial_parameters, load, preset
from jaxsys.model.save import save_safetensors

START = """
import sys
from jaxsys.cli import main
sys.exit(main())
"""
DEAD_DEVICE = """
import jax
from jaxsys.serve.executor import JaxExecutor

def fail(*_):
    raise jax.errors.JaxRuntimeError("INTERNAL: the device is gone")

JaxExecutor.collect = JaxExecutor.rebuild = fail
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = dataclasses.replace(preset("tiny"), num_layers=1)
    path = tmp_path_factory.mktemp("model") / "tiny-bytes"
    parameters = jax.tree.map(lambda leaf: leaf * 4, initial_parameters(config, seed=1))
    save_safetensors(path, config, parameters, tokenizer=ByteTokenizer())
    return path


@pytest.fixture
def server(folder, tmp_path, request, compiled):
    """A running server and its address; a parameter is a program that makes it worse."""
    keys = tmp_path / "keys"
    keys.write_text("sesame\n")
    command = [sys.executable, "-c", getattr(request, "param", "") + START, "serve"]
    command += ["--model", str(folder), "--port", "0", "--max-length", "200", "--max-batch", "1"]
    command += ["--max-prefill-tokens", "16"]  # few steps to compile
    command += ["--log", "json", "--api-key-file", str(keys)]
    command += ["--compilation-cache", str(compiled)]
    process: Any = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    lines: list[str] = []
    found = None
    for line in process.stderr:
        lines.append(line)
        found = re.search(r"serving on (http://\S+/v1)", line)
        if found:
            break
    else:
        pytest.fail("".join(lines))
    reader = threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True)
    reader.start()
    yield process, found.group(1), lines, reader
    process.kill()
    process.wait()


SLOW_START = """
import time
from jaxsys.serve import cli

cli.compile_ahead = lambda *_, begin, done: (begin(7), done(), time.sleep(300))
"""


@pytest.mark.parametrize(
    ("cluster", "number"),
    [
        ([], signal.SIGTERM),
        (["--cluster", "local", "--prefill", "1", "--decode", "0"], signal.SIGINT),
    ],
)
def test_a_server_that_is_starting_says_so_and_ends_at_once(folder, tmp_path, cluster, number):
    command = [sys.executable, "-c", SLOW_START + START, "serve", "--model", str(folder)]
    command += ["--port", "0", "--compilation-cache", str(tmp_path), *cluster]
    with (
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(process.kill)
        assert process.stderr is not None
        lines = iter(process.stderr)
        found = next(match for line in lines if (match := re.search(r"on (http://\S+) ", line)))
        health = httpx.get(found.group(1) + "/health")
        assert health.status_code == 503 and int(health.headers["retry-after"]) > 0
        said = health.json()
        assert said["status"] == "starting" and said["total"] == (1 if cluster else 7)
        early = httpx.post(found.group(1) + "/v1/completions", json={"prompt": "a"})
        assert early.status_code == 503 and early.json()["error"]["code"] == "starting"
        process.send_signal(number)
        assert process.wait(20) == 128 + number
        assert "serving on" not in process.stderr.read()


def test_the_openai_client_and_a_graceful_end(server):
    process, address, lines, reader = server
    client: Any = openai.OpenAI(base_url=address, api_key="sesame", timeout=120, max_retries=0)
    model = client.models.list().data[0].id
    assert model == "tiny-bytes"
    messages = [{"role": "user", "content": "hello"}]
    extra = {"ignore_eos": True}
    answer = client.chat.completions.create(
        model=model, messages=messages, max_tokens=8, temperature=0, extra_body=extra
    )
    assert answer.usage.completion_tokens == 8
    usage = answer.usage
    assert usage.energy_j > 0 and usage.energy_method.startswith("modelled")
    assert usage.energy_kind == "modelled"
    assert usage.joules_per_output_token == pytest.approx(usage.energy_j / 8, rel=1e-3)
    by_role = usage.joules_per_output_token_by_role
    assert sum(by_role.values()) == pytest.approx(usage.joules_per_output_token, rel=1e-3)
    assert min(by_role.values()) > 0
    with pytest.raises(openai.BadRequestError, match="at most 200 fit"):
        client.completions.create(model=model, prompt="a" * 300)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=address, api_key="x", max_retries=0).models.list()
    stream = client.chat.completions.create(
        model=model,
        messages=messages,
        max_tokens=120,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=extra,
    )
    usage: Any = None
    for number, chunk in enumerate(stream):
        if number == 2:
            process.send_signal(signal.SIGTERM)  # the stream must still come to its end
        usage = chunk.usage or usage
    assert usage.completion_tokens == 120
    stream.close()
    client.close()
    assert process.wait(60) == 0
    reader.join(10)
    log = "".join(lines)
    assert '"message": "request"' in log and '"finish_reason": "length"' in log
    assert "Traceback" not in log


@pytest.mark.parametrize("server", [DEAD_DEVICE], indirect=True)
def test_a_dead_device_ends_the_server_with_a_reason(server):
    process, address, lines, reader = server
    client: Any = openai.OpenAI(base_url=address, api_key="sesame", timeout=60, max_retries=0)
    with pytest.raises(openai.InternalServerError, match="the device is gone") as caught:
        client.completions.create(model="tiny-bytes", prompt="a")
    assert caught.value.status_code == 503
    client.close()
    with contextlib.suppress(httpx.TransportError):  # it may have ended already
        assert httpx.get(address.removesuffix("v1") + "health").status_code == 503
    assert process.wait(60) == 1
    reader.join(10)
    assert "INTERNAL: the device is gone" in lines[-1]


@pytest.mark.slow
def test_fuzzing_by_the_description_finds_no_server_error(server):
    """schemathesis against every endpoint: no 5xx, no undocumented status or form of answer."""
    process, address, lines, _ = server
    checks = ("not_a_server_error", "status_code_conformance", "response_schema_conformance")
    command = [sys.executable, "-m", "schemathesis.cli", "run"]
    command += [address.removesuffix("/v1") + "/openapi.json", "--checks", ",".join(checks)]
    command += ["--header", "Authorization: Bearer sesame", "--max-examples", "80"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert process.poll() is None and "Traceback" not in "".join(lines)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "/nowhere/model"], "/nowhere/model does not exist"),
        (["--model", "tiny"], "tiny is a preset, sizes without weights"),
        (["--port", "99999"], "--port 99999 must be from 0"),
        (["--host", "no.such.host.invalid"], "is no address of this machine"),
        (["--prefill", "0"], "--prefill 0 must be from 1 to 1024"),
        (["--page-size", "0"], "--page-size 0 must be at least 1"),
        (["--pages", "1"], "--pages 1 x 16 tokens a page hold 16 tokens, below --max-length"),
        (["--pages", "2", "--max-length", "256"], "; use --pages 16 or more, or lower"),
        (["--pages", "1", "--page-size", "32"], "--pages 1 x --page-size 32 tokens hold 32"),
        (["--max-requests", "0"], "--max-requests 0 must be at least 1"),
        (["--cluster", "lokal"], "--cluster lokal is neither local nor auto, nor an address"),
        (["--cluster", "lokal"], "(did you mean 'local'?)"),
        (["--drain", "-5"], "--drain -5.0 must be 0 or more seconds"),
        (["--drain", "nan"], "--drain nan must be 0 or more seconds"),
        (["--max-batch", "0"], "--max-batch 0 must be at least 1"),
        (["--ttft-ms", "-1"], "--ttft-ms -1 must be from 1 to 300000 milliseconds; see"),
        (["--itl-ms", "0.06"], "1 to 60000 milliseconds; 0.06 seconds are --itl-ms 60; see"),
        (["--itl-ms", "500000"], "--itl-ms 500000 must be from 1 to 60000 milliseconds; see"),
        (["--ttft-ms", "x"], "--ttft-ms x must be from 1 to 300000 milliseconds; see"),
        (["--ttft-slo", "0.6"], "--ttft-slo 0.6 must be in milliseconds: give --ttft-ms 600; see"),
        (["--api-key-file", "/nowhere/keys"], "/nowhere/keys cannot be read: No such file"),
        (["--lora", "a"], "--lora 'a' must be NAME=FOLDER"),
        (["--lora", "a=/x", "--lora", "a=/y"], "--lora gives 'a' twice"),
        (["--lora", "tiny-bytes=/x"], "'tiny-bytes' is the model's own"),
        (["--lora", "a=/nowhere"], "/nowhere has no adapter_config.json"),
        (["--max-loras", "2"], "--max-loras 2 needs --lora or --allow-lora-updates"),
        (["--lora", "a=/x", "--lora", "b=/y", "--max-loras", "1"], "--max-loras 1 is below the 2"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(arguments, words, folder, capsys, tmp_path):
    given = ["serve", "--model", str(folder), "--port", "0"]
    assert main([*given, "--compilation-cache", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_taken_port_is_named(folder, capsys, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        given = ["serve", "--model", str(folder), "--port", str(port)]
        assert main([*given, "--compilation-cache", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1:{port}" in error and error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("cluster", [[], ["--cluster", "local"]])
def test_adapters_from_the_start_and_on_demand(folder, write_adapter, tmp_path, cluster):
    loaded = load(folder)
    for seed, name in enumerate("ab"):
        write_adapter(
            tmp_path / name, loaded.config, loaded.parameters, rank=2, targets=("query",), seed=seed
        )
    command = [sys.executable, "-c", START, "serve", "--model", str(folder), "--port", "0"]
    command += ["--decode", "0", "--max-length", "64", "--max-batch", "2"]
    command += ["--max-prefill-tokens", "32", "--lora", f"a={tmp_path}/a", "--allow-lora-updates"]
    command += ["--compilation-cache", str(folder.parent / "compiled"), *cluster]
    process: Any = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        lines: list[str] = []
        found = None
        for line in process.stderr:
            lines.append(line)
            found = re.search(r"serving on (http://\S+/v1)", line)
            if found:
                break
        assert found is not None, "".join(lines)
        threading.Thread(target=process.stderr.read, daemon=True).start()
        client = openai.OpenAI(base_url=found.group(1), api_key="none")
        body = {"lora_name": "b", "lora_path": str(tmp_path / "b")}
        assert httpx.post(f"{found.group(1)}/load_lora_adapter", json=body).status_code == 200
        assert [one.id for one in client.models.list()] == ["tiny-bytes", "a", "b"]
        texts = [
            client.completions.create(model=name, prompt="hello", max_tokens=8, temperature=0)
            for name in ("tiny-bytes", "a", "b")
        ]
        assert len({one.choices[0].text for one in texts}) == 3
        assert httpx.post(f"{found.group(1)}/unload_lora_adapter", json=body).status_code == 200
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="b", prompt="hello")
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
