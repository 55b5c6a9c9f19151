"""What operators set: files and environment, sockets, TLS, paths; and the files they start from."""

import asyncio
import contextlib
import json
import re
import shutil
import ssl
import subprocess
import threading
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from jaxsys.errors import UsageError
from jaxsys.serve.http.listening import HttpServer
from jaxsys.serve.http.metrics import Metrics
from jaxsys.serve.http.starting import Gateway, StartProgress
from jaxsys.serve.instance import InstanceLoad, TokenEvent
from jaxsys.serve.options import parser, root_path, tls_files
from jaxsys.serve.processes.front import bind, name_of
from jaxsys.serve.requests import Request, SamplingParameters
from jaxsys.serve.settings import with_settings

DEPLOY = Path(__file__).parents[2] / "docs" / "deploy"


def test_what_is_typed_goes_before_the_environment_and_that_before_the_file(tmp_path):
    path = tmp_path / "serve.toml"
    path.write_text('port = 1\nhost = "a"\nitl-ms = 500\ncors = ["https://a", "https://b"]\n')
    options = parser("serve")
    environment = {"JAXSYS_SERVE_PORT": "2", "JAXSYS_SERVE_HOST": "b", "OTHER": "x"}
    environment |= {"JAXSYS_SERVE_KEY_FOR_ALL": "true"}
    argv = ["--settings", str(path), "--port", "3"]
    found = options.parse_args(with_settings(options, argv, environment))
    assert (found.port, found.host, found.itl_ms) == (3, "b", 500)
    assert found.key_for_all and found.cors == ["https://a", "https://b"]
    assert with_settings(options, ["--port", "3"], {}) == ["--port", "3"]


def test_targets_in_seconds_of_an_older_file_are_refused_with_what_to_write(tmp_path):
    path = tmp_path / "serve.toml"
    path.write_text("itl-slo = 0.05\n")
    options = parser("serve")
    with pytest.raises(
        UsageError, match="--itl-slo 0.05 must be in milliseconds: give --itl-ms 50"
    ):
        options.parse_args(with_settings(options, ["--settings", str(path)], {}))


@pytest.mark.parametrize(
    "text, environment, says",
    [
        ("ports = 1", {}, "ports"),
        ("port = [1, 2]", {}, "list"),
        ("port = 1\n[model]\na = 1", {}, "table"),
        ("port =", {}, "TOML"),
        ('key-for-all = "perhaps"', {}, "true or false"),
        ("", {"JAXSYS_SERVE_PROT": "1"}, "JAXSYS_SERVE_PROT"),
        ("", {"JAXSYS_SERVE_HELP": "1"}, "JAXSYS_SERVE_HELP"),
    ],
)
def test_settings_that_no_option_has_are_refused(tmp_path, text, environment, says):
    path = tmp_path / "serve.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=says):
        with_settings(parser("serve"), ["--settings", str(path)], environment)
    with pytest.raises(UsageError, match="cannot be read"):
        with_settings(parser("serve"), ["--settings", str(tmp_path / "none")], {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "must hold an object of options"),
        ('{"serve": 3, "jaxsys": "0.1.0"}', "must hold an object of options"),
        ('{"serve": {"magic": 3}}', "magic is no option"),
        ('{"instances": []}', "instances is no option"),
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path, text, message):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        with_settings(parser("serve"), ["--settings", str(path)], {})


@contextlib.contextmanager
def serving(listener, app, **options):
    listener.listen(16)
    server = HttpServer(app, **options)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()


def test_a_unix_socket_is_served_and_one_left_behind_replaced(tmp_path):
    path = tmp_path / "s"
    for _ in range(2):  # the second finds what the first has left
        listener = bind(f"unix:{path}", 0)
        assert name_of(listener) == (f"unix:{path}", 0)
        with serving(listener, Gateway(StartProgress())):
            transport = httpx.HTTPTransport(uds=str(path))
            with httpx.Client(transport=transport, base_url="http://localhost") as client:
                assert client.get("/health").json()["status"] == "starting"
            with pytest.raises(UsageError, match="another server"):
                bind(f"unix:{path}", 0)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="in use"):
        bind(f"unix:{tmp_path / 'file'}", 0)
    assert (tmp_path / "file").read_text() == "x"


def test_a_root_path_may_be_left_or_taken_off():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": scope["path"].encode()})

    gateway = Gateway(StartProgress(), "/llm")
    gateway.app = app

    async def asked(path):
        transport = httpx.ASGITransport(app=gateway)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return (await client.get(path)).text

    for path, seen in [
        ("/llm/v1/models", "/v1/models"),
        ("/v1/models", "/v1/models"),
        ("/llm", "/"),
        ("/llmx/v1", "/llmx/v1"),
    ]:
        assert asyncio.run(asked(path)) == seen
    for path in ("llm", "/llm/", "/a b"):
        with pytest.raises(UsageError):
            root_path(path)
    assert root_path("/a/b") == "/a/b"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_https(tmp_path):
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-keyout", str(key), "-out", str(certificate), "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(command, check=True, capture_output=True)
    tls = tls_files(certificate, key)
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    trusted = ssl.create_default_context(cafile=str(certificate))
    with (
        serving(listener, Gateway(StartProgress()), tls=tls),
        httpx.Client(verify=trusted) as client,
    ):
        answer = client.get(f"https://localhost:{port}/health")
        assert answer.json()["status"] == "starting"
    assert tls_files(None, None) is None
    for pair in ((certificate, None), (None, key), (key, certificate), (tmp_path / "no", key)):
        with pytest.raises(UsageError, match="--tls"):
            tls_files(*pair)


def test_every_figure_of_the_dashboard_file_is_one_of_the_servers():
    load = InstanceLoad(energy_j=1.0, idle_energy_j=0.5, energy_at_max_j=2.0, power_w=3.0)
    member: Any = SimpleNamespace(name="a", clock_mhz=900, page_count=9, energy_method="measured")
    member.load = load
    engine: Any = SimpleNamespace(
        adapters=SimpleNamespace(most=0),
        apart=False,
        entries=[member],
        decoders=[],
        instances=[member],
        unfinished=1,
    )
    metrics = Metrics(engine, "m")
    one = Request(0, sampling=SamplingParameters(), arrival_s=0.0, prompt_length=5)
    metrics.on_token(one, TokenEvent(one, 7, None, "stop", 0.1))
    metrics.refused.labels("400").inc()
    there = set(re.findall(r"^(jaxsys_\w+)", metrics.text().decode(), re.MULTILINE))
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"jaxsys_\w+", target["expr"])
    }
    assert len(asked) > 20 and asked <= there, asked - there


def test_the_files_that_operators_start_from_name_options_that_there_are():
    options = parser("serve")
    manifest = (DEPLOY / "kubernetes.yaml").read_text()
    block = manifest.partition("serve.toml: |\n")[2].partition("---")[0]
    settings = tomllib.loads("\n".join(line.strip() for line in block.splitlines()))
    assert settings["decode"] == 0
    typed = [f"--{name}={value}" for name, value in settings.items()]
    assert options.parse_args(typed).model_name == "llama"
    found = dict(re.findall(r"(JAXSYS_SERVE_\w+)=(\S+)", (DEPLOY / "Dockerfile").read_text()))
    assert options.parse_args(with_settings(options, [], found)).host == "0.0.0.0"
    unit = (DEPLOY / "jaxsys.service").read_text()
    command = re.search(r"^ExecStart=\S+/jaxsys serve (.*)$", unit, re.MULTILINE)
    assert command is not None
    assert options.parse_args(command[1].split()).log == "json"
