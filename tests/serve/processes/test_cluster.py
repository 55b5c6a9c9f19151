"""Serving on a local Ray: instances, one killed under load, more, fewer, and the end."""

import concurrent.futures
import dataclasses
import os
import signal
import subprocess
import sys
import time

import httpx
import jax
import pytest

from jaxsys.cli import main
from jaxsys.errors import RunError, UsageError
from jaxsys.model import ByteTokenizer, initial_parameters, preset
from jaxsys.model.save import save_safetensors
from jaxsys.serve.deployment import DeploymentConfig
from jaxsys.serve.processes.front import FrontSpec
from jaxsys.serve.processes.worker import WorkerSpec

ray = pytest.importorskip("ray", reason="the extra `cluster` is not installed")
from jaxsys.serve.processes import cluster  # noqa: E402

CONFIG = dataclasses.replace(preset("tiny"), num_layers=1)


@pytest.fixture(scope="module")
def spec(tmp_path_factory, compiled):
    path = tmp_path_factory.mktemp("model") / "tiny"
    parameters = jax.tree.map(lambda leaf: leaf * 4, initial_parameters(CONFIG, seed=1))
    save_safetensors(path, CONFIG, parameters, tokenizer=ByteTokenizer())
    worker = WorkerSpec(
        name="",
        role="both",
        model=str(path),
        deployment=DeploymentConfig(
            prefill=1,
            decode=1,
            max_batch=4,
            max_length=96,
            max_prefill_tokens=16,
            page_size=4,
            page_count=40,
        ),
        compilation_cache=str(compiled),
        front_host="",
        front_port=0,
        token="",
    )
    return FrontSpec(port=0, model_name="tiny", worker=worker)


@pytest.fixture(scope="module")
def started():
    # Not one that may run here: a test must not share it.
    ray.init(address="local", include_dashboard=False, namespace=cluster.NAMESPACE)
    yield
    ray.shutdown()


def ask(address, index):
    """One greedy completion's text, for odd numbers as a stream."""
    body = {
        "prompt": f"{'the same beginning' * (index % 2)} {index}",
        "max_tokens": 60,
        "temperature": 0,
        "ignore_eos": True,
        "stream": index % 2 == 1,
    }
    answer = httpx.post(address + "/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    if not body["stream"]:
        return answer.json()["choices"][0]["text"]
    lines = [line[6:] for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]", answer.text
    return "".join(httpx.Response(200, text=one).json()["choices"][0]["text"] for one in lines[:-1])


def until(condition, timeout_s=120.0):
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come about"
        time.sleep(0.01)


def test_instances_through_death_scaling_and_the_end(started, spec):
    served = cluster.ServerOnCluster(spec)
    address = f"http://{served.host}:{served.port}"
    with concurrent.futures.ThreadPoolExecutor(16) as pool:

        def load():
            return [pool.submit(ask, address, index) for index in range(16)]

        expected = [one.result() for one in load()]
        before = {one["name"]: one for one in served.describe()}
        assert sorted(before) == ["decode-0", "prefill-0"]
        # Pages went over, and a router that only looks at requests used both sides.
        assert all(one["iterations"] > 0 for one in before.values())

        running = load()
        until(lambda: sum(one["in_flight"] for one in served.describe()) > 2)
        os.kill(int(before["decode-0"]["process"].rpartition(":")[2]), signal.SIGKILL)
        assert [one.result() for one in running] == expected
        until(lambda: "decode-1" in {one["name"] for one in served.describe()})
        assert len(served.describe()) == 2
        assert httpx.get(address + "/health").json()["status"] == "ok"

        served.scale(prefill=1, decode=2)
        running = load()
        until(lambda: sum(one["in_flight"] > 0 for one in served.describe()) > 1)
        served.scale(prefill=1, decode=1)
        assert [one.result() for one in running] == expected
        assert len(served.describe()) == 2
        until(lambda: all(one["pages_held"] == 0 for one in served.describe()), 10)
        assert all(one["in_flight"] == 0 for one in served.describe())
        text = httpx.get(address + "/metrics").text
        for one in served.describe():
            assert f'jaxsys_energy_joules_total{{instance="{one["name"]}"}}' in text

        running = load()

        def arrived():
            unfinished = httpx.get(address + "/health").json()["unfinished"]
            return unfinished + sum(one.done() for one in running) >= len(running)

        until(arrived)
        served.stop(drain_s=30)  # what is open comes to its end
        assert [one.result() for one in running] == expected
    with pytest.raises(httpx.ConnectError):
        httpx.get(address + "/health")


@pytest.mark.slow
def test_what_cannot_start_is_said(started, spec):
    wrong = dataclasses.replace(spec, port=99999)
    with pytest.raises(UsageError, match="port=99999 must be from 0"):
        cluster.ServerOnCluster(wrong)
    deployment = dataclasses.replace(spec.worker.deployment, max_length=9000, page_count=None)
    wrong = dataclasses.replace(
        spec, worker=dataclasses.replace(spec.worker, deployment=deployment)
    )
    with pytest.raises(RunError, match="did not come up.*exceeds the model's 256 positions"):
        cluster.ServerOnCluster(wrong)


@pytest.mark.slow
def test_the_command_starts_a_ray_and_ends_with_it(spec, tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, "-m", "jaxsys.cli", "serve", "--model", spec.worker.model]
    command += ["--cluster", "auto", "--port", "0", "--max-length", "96", "--max-batch", "4"]
    command += ["--compilation-cache", spec.worker.compilation_cache]
    with log.open("w") as stream:
        process = subprocess.Popen(command, stderr=stream)
    until(lambda: process.poll() is not None or "serving on" in log.read_text())
    address = log.read_text().partition("serving on ")[2].partition("/v1")[0]
    assert ask(address, 0)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0, log.read_text()


def test_a_cluster_that_is_not_there_is_named(spec, capsys):
    given = ["serve", "--model", spec.worker.model, "--port", "0"]
    assert main([*given, "--cluster", "127.0.0.1:1"]) == 1
    assert "no Ray cluster answers at 127.0.0.1:1" in capsys.readouterr().err
    assert main([*given, "--cluster", "nowhere"]) == 2
    assert (
        "--cluster nowhere is neither local nor auto, nor an address such as"
        in capsys.readouterr().err
    )
