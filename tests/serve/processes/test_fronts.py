"""`jaxsys serve --fronts 2`: whichever front is reached, and what becomes of one that is killed."""

import concurrent.futures
import contextlib
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from jaxsys.cli import main
from jaxsys.errors import UsageError
from jaxsys.model.save import save_safetensors
from jaxsys.serve.deployment import DeploymentConfig
from jaxsys.serve.processes.front import FrontSpec
from jaxsys.serve.processes.fronts import Fronts
from jaxsys.serve.processes.worker import WorkerSpec

MOST = 6
LONG = {"prompt": "once upon a time", "max_tokens": 150, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    save_safetensors(path, model.config, model.parameters, tokenizer=model.tokenizer)
    return path


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--fronts 2: several fronts need instances that are processes"),
        (["--cluster", "auto"], "--fronts 2 --cluster auto: several fronts need"),
        (["--cluster", "10.0.0.1:6379"], "add --cluster local, or leave --fronts out"),
    ],
)
def test_fronts_need_instances_that_are_processes_here(folder, capsys, options, message):
    assert main(["serve", "--model", str(folder), "--fronts", "2", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_router_that_remembers_for_itself_is_refused(folder):
    worker = WorkerSpec(
        name="",
        role="both",
        model=str(folder),
        deployment=DeploymentConfig(),
        front_host="",
        front_port=0,
        token="",
    )
    spec = FrontSpec(model_name="tiny", route="my-own", worker=worker)
    launcher: Any = None
    with pytest.raises(UsageError, match="--fronts 3 with --route my-own: what that router"):
        Fronts(spec, launcher, count=3, drain_s=1, reached_at="127.0.0.1")
    # A front that is started again is given the same, and lists the model as the others do.
    again = pickle.loads(pickle.dumps(spec))
    assert again.api().created_s == spec.created_s > 0


# --- a server with two of them ----------------------------------------------------------------


class Server:
    """A running server, its processes, and a connection to each front."""

    def __init__(self, command):
        self.process: Any = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        for line in self.process.stderr:
            self.lines.append(line)
            found = re.search(r"serving on (\S+(?: \S+)?)/v1", line)
            if found:
                break
        else:
            pytest.fail("".join(self.lines))
        self.address = found.group(1)
        self.reader = threading.Thread(
            target=lambda: self.lines.extend(self.process.stderr), daemon=True
        )
        self.reader.start()

    def children(self, kind):
        """Process numbers of its fronts or workers, in the order of their start."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        found = []
        for one in path.read_text().split():
            with contextlib.suppress(OSError):
                if kind in Path(f"/proc/{one}/cmdline").read_text():
                    found.append(int(one))
        return sorted(found)

    @property
    def fronts(self):
        return self.children("front_process")

    @contextlib.contextmanager
    def only(self, front):
        """New connections reach this one."""
        others = [one for one in self.fronts if one != front]
        for one in others:
            os.kill(one, signal.SIGSTOP)
        try:
            yield
        finally:
            for one in others:
                os.kill(one, signal.SIGCONT)

    @contextlib.contextmanager
    def client(self, front):
        """A client whose one connection is this front's."""
        limits = httpx.Limits(max_connections=1, keepalive_expiry=60)
        with httpx.Client(base_url=self.address, timeout=120, limits=limits) as client:
            with self.only(front):
                self.until(lambda: client.get("/version").status_code == 200, 20)
            yield client

    @contextlib.contextmanager
    def held(self):
        """No token of an answer comes but the first."""
        decoder = self.children("worker")[-1]
        os.kill(decoder, signal.SIGSTOP)
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(decoder, signal.SIGCONT)

    def metrics(self, client=None):
        text = (
            (client or httpx)
            .get("/metrics" if client else self.address + "/metrics", timeout=30)
            .text
        )
        found = {}
        for one in text.splitlines():
            if not one.startswith("#"):
                name, _, value = one.rpartition(" ")
                found[name] = float(value)
        return found

    def until(self, condition, timeout_s=60):
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline_s, "it did not come about: " + "".join(self.lines)
            time.sleep(0.02)

    def settled(self):
        """Waits until no request is anywhere, and all pages are free."""

        def quiet():
            found = self.metrics()
            held = [value for name, value in found.items() if name.startswith("jaxsys_kv_pages_u")]
            batch = [value for name, value in found.items() if name.startswith("jaxsys_batch{")]
            return not found["jaxsys_requests_unfinished"] and not any(held + batch)

        self.until(quiet)

    def end(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def start(folder, compiled):
    started = []

    def make(*options):
        command = [sys.executable, "-m", "jaxsys", "serve", "--model", str(folder), "--port", "0"]
        command += ["--cluster", "local", "--fronts", "2", "--max-length", "200"]
        command += ["--max-batch", "4", "--max-prefill-tokens", "16", "--page-size", "4"]
        command += ["--compilation-cache", str(compiled), "--gpu", "none", *options]
        started.append(Server(command))
        return started[-1]

    yield make
    for server in started:
        server.end()


@pytest.fixture(scope="module")
def server(start):
    return start("--max-requests", str(MOST), "--allow-lora-updates", "--max-loras", "2")


@pytest.fixture
def both(server):
    """A client of each front."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(server.client(front)) for front in server.fronts]


def text(client, **fields):
    answer = client.post("/v1/completions", json=LONG | {"max_tokens": 12} | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def streamed(client, **fields):
    """The text of a stream, and a call that begins to read it."""
    with client.stream("POST", "/v1/completions", json=LONG | {"stream": True} | fields) as answer:
        assert answer.status_code == 200
        parts, line = [], ""
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                parts.append(httpx.Response(200, text=line[6:]).json()["choices"][0]["text"])
        assert line == "" or line == "data: [DONE]"
        return "".join(parts)


@pytest.mark.slow
def test_turns_limits_and_counts_are_those_of_one_server(server, both):
    one, two = both
    assert text(one) == text(two) == text(one)
    # /v1/responses: made here, gone on from there.
    first = one.post("/v1/responses", json={"input": "hello", "max_output_tokens": 4}).json()
    name = first["id"]
    assert two.get(f"/v1/responses/{name}").json()["output"] == first["output"]
    asked = {"input": "more", "max_output_tokens": 4, "previous_response_id": name}
    second = two.post("/v1/responses", json=asked).json()
    items = one.get(f"/v1/responses/{second['id']}/input_items").json()["data"]
    assert [item["role"] for item in items] == ["user", "assistant", "user"]
    assert two.delete(f"/v1/responses/{name}").status_code == 200
    assert one.get(f"/v1/responses/{name}").status_code == 404
    # Counts: the same at both, and of both.
    server.settled()
    found = [server.metrics(client) for client in both]
    done = [
        sum(v for k, v in one.items() if k.startswith("jaxsys_requests_total")) for one in found
    ]
    assert done == [5, 5]
    assert found[0]["jaxsys_ttft_seconds_count"] == 5
    shown = two.get("/dashboard/data").json()["total"]
    assert shown["first_tokens"] == 5 == one.get("/dashboard/data").json()["total"]["first_tokens"]
    # Room: so many in all, wherever they are.
    with concurrent.futures.ThreadPoolExecutor(MOST) as threads, contextlib.ExitStack() as stack:
        many = [stack.enter_context(server.client(server.fronts[n % 2])) for n in range(MOST)]
        with server.held():
            running = [threads.submit(streamed, client) for client in many]
            server.until(lambda: one.get("/health").json()["unfinished"] == MOST)
            refused = [client.post("/v1/completions", json=LONG) for client in both]
        assert [one.status_code for one in refused] == [429, 429]
        assert f"{MOST} requests are being served" in refused[0].text
        assert all(int(one.headers["retry-after"]) > 0 for one in refused)
        assert len({future.result() for future in running}) == 1
    server.settled()
    assert server.metrics(one)['jaxsys_requests_refused_total{status="429"}'] == 2


@pytest.mark.slow
def test_an_adapter_loaded_at_one_front_is_known_at_the_other(
    server, both, model, write_adapter, tmp_path
):
    one, two = both
    write_adapter(
        str(tmp_path / "a"), model.config, model.parameters, rank=2, targets=("query",), seed=1
    )
    wrong = {"lora_name": "a", "lora_path": str(tmp_path)}
    answer = two.post("/v1/load_lora_adapter", json=wrong)
    assert answer.status_code == 400 and "adapter_config.json" in answer.text
    asked = {"lora_name": "a", "lora_path": str(tmp_path / "a")}
    assert one.post("/v1/load_lora_adapter", json=asked).status_code == 200
    again = two.post("/v1/load_lora_adapter", json=asked)
    assert again.status_code == 400 and "is loaded already" in again.text
    adapted = [text(client, model="a") for client in both]
    assert adapted[0] == adapted[1] != text(one)
    assert [m["id"] for m in two.get("/v1/models").json()["data"]] == ["tiny", "a"]
    # What decodes with it ends with it, at whichever front its name goes.
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        whole = text(one, model="a", max_tokens=150)
        with server.held():
            running = threads.submit(streamed, one, model="a")
            server.until(lambda: two.get("/health").json()["unfinished"])
            unloading = two.post("/v1/unload_lora_adapter", json={"lora_name": "a"})
            assert unloading.status_code == 200
        assert running.result() == whole
    for client in both:
        gone = client.post("/v1/completions", json=LONG | {"model": "a"})
        assert gone.status_code == 404 and gone.json()["error"]["code"] == "model_not_found"
    for name in ("b", "c"):  # there is room for both
        answer = two.post("/v1/load_lora_adapter", json=asked | {"lora_name": name})
        assert answer.status_code == 200, answer.text
    assert text(one, model="c") == adapted[0]
    for name in ("b", "c"):
        assert one.post("/v1/unload_lora_adapter", json={"lora_name": name}).status_code == 200


@pytest.mark.slow
def test_a_killed_front_takes_its_own_requests_only(server, both):
    """Instances free its pages, another takes its place, and nothing that was counted is lost."""
    whole = text(both[1], max_tokens=150)
    victim, other = server.fronts
    before, listed = server.metrics(), both[1].get("/v1/models").json()
    done = 'jaxsys_requests_total{finish_reason="length"}'
    with concurrent.futures.ThreadPoolExecutor(4) as threads, contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(server.client(front)) for front in (victim, victim, other, other)
        ]
        with server.held():  # while pages are handed over
            running = [threads.submit(streamed, client) for client in clients]
            server.until(lambda: both[1].get("/health").json()["unfinished"] == 4)
            os.kill(victim, signal.SIGKILL)
            for lost in running[:2]:
                with pytest.raises(httpx.HTTPError):
                    lost.result()
            server.until(lambda: both[1].get("/health").json()["unfinished"] == 2)
        assert [kept.result() for kept in running[2:]] == [whole, whole]
        assert text(both[1], max_tokens=150) == whole
    server.until(lambda: len(server.fronts) == 2 and victim not in server.fronts)
    server.settled()
    assert other in server.fronts
    (fresh,) = [front for front in server.fronts if front != other]
    with server.client(fresh) as client:
        server.until(lambda: client.get("/health").status_code == 200)
        assert text(client, max_tokens=150) == whole
        assert client.get("/v1/models").json() == listed  # of the deployment, not of a front
        after = server.metrics(client)
    assert after[done] == before[done] + 4
    assert after["jaxsys_requests_unfinished"] == 0
    assert (after["jaxsys_fronts"], after["jaxsys_front_losses_total"]) == (2, 1)
    # And while tokens come, of which the others miss none.
    over = threading.Event()

    def again_and_again(client):
        found = []
        while not over.is_set():
            found.append(streamed(client))
        return found

    with concurrent.futures.ThreadPoolExecutor(4) as threads, contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(server.client(front)) for front in (fresh, fresh, other, other)
        ]
        running = [threads.submit(again_and_again, client) for client in clients]
        time.sleep(1.0)
        os.kill(fresh, signal.SIGKILL)
        time.sleep(1.0)
        over.set()
        for lost in running[:2]:
            with pytest.raises(httpx.HTTPError):
                lost.result()
        for kept in running[2:]:
            found = kept.result()
            assert len(found) > 2 and set(found) == {whole}
    server.until(lambda: len(server.fronts) == 2 and fresh not in server.fronts)
    server.settled()
    said = "".join(server.lines)
    assert "lost a front" in said and "SIGKILL" in said and "started another front" in said


@pytest.mark.slow
def test_a_killed_instance_loses_nothing_at_any_front(server, both):
    whole = text(both[0], max_tokens=150)
    with concurrent.futures.ThreadPoolExecutor(4) as threads, contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(server.client(front)) for front in server.fronts for _ in "ab"
        ]
        with server.held():
            running = [threads.submit(streamed, client) for client in clients]
            server.until(lambda: both[1].get("/health").json()["unfinished"] == 4)
            os.kill(server.children("worker")[-1], signal.SIGKILL)
        assert {future.result() for future in running} == {whole}
    server.until(lambda: all(c.get("/health").json()["status"] == "ok" for c in both))
    server.settled()
    assert [text(client, max_tokens=150) for client in both] == [whole, whole]


@pytest.mark.slow
def test_a_front_that_is_told_to_end_finishes_what_it_has(server, both):
    whole = text(both[1], max_tokens=150)
    victim = server.fronts[0]
    with concurrent.futures.ThreadPoolExecutor(1) as threads, server.client(victim) as client:
        with server.held():
            running = threads.submit(streamed, client)
            server.until(lambda: both[1].get("/health").json()["unfinished"])
            os.kill(victim, signal.SIGTERM)
        assert running.result() == whole
    server.until(lambda: len(server.fronts) == 2 and victim not in server.fronts)
    server.settled()


@pytest.mark.slow
def test_sigterm_lets_every_front_finish(server, both):
    """Last: the server is gone then, and all of its processes."""
    whole = text(both[0], max_tokens=150)
    processes = [*server.fronts, *server.children("worker")]
    with (
        concurrent.futures.ThreadPoolExecutor(2) as threads,
        server.client(server.fronts[0]) as client,
    ):
        with server.held():
            running = [threads.submit(streamed, client) for client in both]
            server.until(lambda: client.get("/health").json()["unfinished"] == 2)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
        assert [future.result() for future in running] == [whole, whole]
    assert server.process.wait(60) == 0
    server.reader.join(10)
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.address + "/health")
    assert not any(Path(f"/proc/{one}").exists() for one in processes)
    assert "Traceback" not in "".join(server.lines), "".join(server.lines)


@pytest.mark.slow
def test_nothing_is_left_of_a_server_whose_first_process_is_killed(start, tmp_path):
    server = start("--prefill", "1", "--decode", "0", "--host", f"unix:{tmp_path}/socket")
    transport = httpx.HTTPTransport(uds=f"{tmp_path}/socket")
    with httpx.Client(transport=transport, base_url="http://server", timeout=60) as client:
        assert client.get("/health").status_code == 200
        processes = [*server.fronts, *server.children("worker")]
        assert len(processes) == 3
        server.process.kill()
        server.process.wait()
        deadline_s = time.monotonic() + 40
        while any(Path(f"/proc/{one}").exists() for one in processes):
            assert time.monotonic() < deadline_s
            time.sleep(0.1)


@pytest.mark.slow
def test_what_the_answers_of_all_fronts_and_idle_time_took_adds_up_to_the_instances(start):
    server = start("--gpu", "h100", "--policy", "ecofreq")
    with concurrent.futures.ThreadPoolExecutor(8) as threads, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.client(server.fronts[n % 2])) for n in range(8)]

        def usage(number):
            fields = {"prompt": f"request {number} " * (1 + number), "max_tokens": 10 + 9 * number}
            answer = clients[number].post("/v1/completions", json=LONG | fields)
            assert answer.status_code == 200, answer.text
            return answer.json()["usage"]

        said = list(threads.map(usage, range(8)))
        server.settled()
        found = [server.metrics(client) for client in clients[:2]]
    assert all(one["energy_kind"] == "modelled" and one["energy_j"] > 0 for one in said)
    total_j = sum(one["energy_j"] for one in said)
    for one in found:  # the same at both fronts
        took, idle = (
            sum(value for name, value in one.items() if name.startswith(f"jaxsys_{what}_joules_t"))
            for what in ("energy", "idle_energy")
        )
        # Exact, but for steps whose requests had all ended, and what fronts hear a second later.
        assert total_j == pytest.approx(took - idle, rel=0.02)
        assert one["jaxsys_request_energy_joules_sum"] == pytest.approx(total_j, rel=1e-3)
        assert one["jaxsys_request_energy_joules_count"] == 8
    # Each role's share over the same tokens.
    tokens = sum(one["completion_tokens"] for one in said)
    for role in ("prefill", "decode"):
        share_j = sum(
            one["joules_per_output_token_by_role"][role] * one["completion_tokens"] for one in said
        )
        assert share_j > 0
        per_token = f'jaxsys_joules_per_output_token{{kind="modelled",role="{role}"}}'
        assert found[0][per_token] * tokens >= share_j * 0.98  # that one counts idle time too
