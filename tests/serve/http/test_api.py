"""The HTTP face over a tiny random model of bytes: answers, streams, refusals, departures."""

import asyncio
import contextlib
import dataclasses
import json
import time

import httpx
import jax
import jax.numpy as jnp
import pydantic
import pytest

from jaxsys.serve.deployment import DeploymentConfig
from jaxsys.serve.http.protocol import CompletionRequest

JSON = {"Content-Type": "application/json"}


SMALL = DeploymentConfig(
    prefill=1,
    decode=1,
    max_batch=4,
    max_length=128,
    max_prefill_tokens=32,
    page_size=8,
    page_count=64,
    max_requests=12,
)


@pytest.fixture(scope="module")
def server(model, start):
    return start(model, SMALL)


def events(response):
    """The data of a stream of server-sent events."""
    lines = [line[6:] for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_an_assistant_may_have_said_nothing(server):
    messages = [{"role": "assistant", "content": None}, {"role": "user", "content": "a"}]
    body = {"messages": messages, "max_tokens": 2, "temperature": 1}
    assert server.post("/v1/chat/completions", body).status_code == 200


def test_a_long_list_of_faults_is_refused_at_the_first():
    start_s = time.process_time()
    with pytest.raises(pydantic.ValidationError):
        CompletionRequest.model_validate({"prompt": [[1], "a"] * 300_000})
    assert time.process_time() - start_s < 1.0  # 6 s with all faults named


def test_a_completion_and_its_stream_agree(server):
    body = {"prompt": "hello", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    whole = server.post("/v1/completions", body).json()
    assert whole["object"] == "text_completion" and whole["model"] == "tiny"
    assert whole["usage"]["prompt_tokens"] == 5 and whole["usage"]["completion_tokens"] == 12
    assert whole["choices"][0]["finish_reason"] == "length"
    stream = server.post(
        "/v1/completions", body | {"stream": True, "stream_options": {"include_usage": True}}
    )
    assert stream.headers["content-type"].startswith("text/event-stream")
    *parts, last = events(stream)
    assert "".join(part["choices"][0]["text"] for part in parts) == whole["choices"][0]["text"]
    assert parts[-1]["choices"][0]["finish_reason"] == "length"
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 12
    server.idle()


def test_streams_that_begin_were_admitted(server):
    """Thirty at once where twelve are taken: each is refused with 429 or comes to its end."""
    body = {"prompt": "a", "max_tokens": 3, "stream": True, "ignore_eos": True}

    async def burst():
        async with server.client() as client:
            asked = [client.post("/v1/completions", json=body) for _ in range(30)]
            return await asyncio.gather(*asked)

    answers = server.run(burst())
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer in answers:
        if answer.status_code == 200:
            assert events(answer)[-1]["choices"][0]["finish_reason"] == "length"
    server.idle()


def test_chat_streams_a_role_first(server):
    body = {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        ],
        "max_completion_tokens": 5,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = server.post("/v1/chat/completions", body).json()["choices"][0]
    assert whole["message"]["role"] == "assistant"
    entry = whole["logprobs"]["content"][0]
    assert len(entry["top_logprobs"]) == 2 and entry["logprob"] <= 0
    assert entry["token"] == entry["top_logprobs"][0]["token"]
    parts = events(server.post("/v1/chat/completions", body | {"stream": True}))
    assert parts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
    assert text == whole["message"]["content"]


def test_several_choices_and_prompts(server):
    body = {"prompt": ["ab", "cd"], "n": 2, "max_tokens": 4, "seed": 3, "ignore_eos": True}
    answer = server.post("/v1/completions", body).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 4
    assert answer["usage"]["completion_tokens"] == 16
    again = server.post("/v1/completions", body).json()
    assert [c["text"] for c in again["choices"]] == [c["text"] for c in answer["choices"]]
    assert len({choice["text"] for choice in answer["choices"]}) > 1
    streamed = events(server.post("/v1/completions", body | {"stream": True}))
    texts = [""] * 4
    for part in streamed:
        texts[part["choices"][0]["index"]] += part["choices"][0]["text"]
    assert texts == [choice["text"] for choice in answer["choices"]]
    server.idle()


def test_each_choice_draws_from_a_stream_of_its_own(server):
    """Choice 0 is what one choice alone is; choice k is not that of the seed k further on."""
    body = {"prompt": "ab", "max_tokens": 8, "seed": 3, "ignore_eos": True}

    def texts(**more):
        choices = server.post("/v1/completions", body | more).json()["choices"]
        return [choice["text"] for choice in choices]

    several = texts(n=4)
    assert several[0] == texts()[0] and len(set(several)) == 4
    others = [texts(seed=3 + k)[0] for k in range(1, 4)]
    assert not set(several[1:]) & set(others)
    server.idle()


def test_stop_strings_end_the_text_before_them(server):
    body = {"prompt": "hello", "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    text = server.post("/v1/completions", body).json()["choices"][0]["text"]
    stop = text[6:9]
    choice = server.post("/v1/completions", body | {"stop": [stop]}).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == text[: text.index(stop)]
    server.idle()


def test_a_repeated_prompt_is_found_in_the_cache(server):
    body = {"prompt": "x" * 40, "max_tokens": 2}
    server.post("/v1/completions", body)
    usage = server.post("/v1/completions", body).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 39


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("completions", {"prompt": "a" * 200}, 400, "at most 128 fit"),
        ("completions", {"prompt": "a", "max_tokens": 128}, 400, "max_tokens to 127"),
        ("completions", {"prompt": ""}, 400, "prompt is empty"),
        ("completions", {"prompt": []}, 400, "empty list"),
        ("completions", {"prompt": [1, 70000]}, 400, "token id 70000 is none of"),
        ("completions", {"prompt": [True, 5]}, 400, "prompt must be a text, a list of texts, "),
        ("completions", {"prompt": [[1, False]]}, 400, "prompt"),
        ("completions", {"prompt": ["a"] * 20}, 400, "20 choices are asked for at once; at most"),
        ("completions", {"prompt": "a", "n": 13}, 400, "13 choices are asked for at once; at most"),
        ("completions", {"prompt": "a\ud800"}, 400, "no valid Unicode"),
        ("completions", {}, 400, "prompt is required"),
        ("completions", {"prompt": "a", "temperature": 9}, 400, "temperature=9"),
        ("completions", {"prompt": "a", "top_p": 0}, 400, "top_p=0"),
        ("completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens=0"),
        ("completions", {"prompt": "a", "max_tokens": "4"}, 400, "max_tokens='4' must be a whole"),
        ("completions", {"prompt": "a", "stream": "true"}, 400, "stream='true' must be true or"),
        ("completions", {"prompt": "a", "max_tokens": 10**30}, 400, "max_tokens"),
        ("completions", {"prompt": "a", "n": 10**9}, 400, "n=1000000000"),
        ("completions", {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias key 'x'"),
        ("completions", {"prompt": "a", "logit_bias": {"900": 1}}, 400, "token 900 is none"),
        ("completions", {"prompt": "a", "stop": [""]}, 400, "empty string"),
        (
            "completions",
            {"prompt": "a", "stream_options": {"include_usage": 3}},
            400,
            "stream_options.include_usage=3 must be true or false",
        ),
        ("completions", {"prompt": "a", "stop": 5}, 400, "stop=5 must be a text or a list of at"),
        ("completions", {"prompt": "a", "stop": list("abcde")}, 400, "stop must be a text or a"),
        ("completions", {"prompt": "a", "model": "gpt"}, 404, "'gpt' is not served; use 'tiny'"),
        ("completions", {"prompt": "a", "seed": 2**70}, 400, "seed"),
        ("chat/completions", {"messages": []}, 400, "messages must be a list of at least one"),
        (
            "chat/completions",
            {"messages": [{"role": "zzz", "content": "a"}]},
            400,
            "messages.0.role='zzz' must be system, developer, user, assistant or tool",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2},
            400,
            "logprobs",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": None}]},
            400,
            "messages.0.content=None must be a text or a list of parts",
        ),
        ("chat/completions", {"messages": [{"role": "user"}]}, 400, "messages.0.content=None"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "image_url",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "tools": [{}]},
            400,
            "tools.0.type is required",
        ),
        ("completions", {"prompt": "a", "tools": [{}]}, 400, "tools is not implemented"),
    ],
)
def test_what_cannot_be_answered_is_refused(server, path, body, status, words):
    content = json.dumps(body).encode()
    answer = server.ask("POST", f"/v1/{path}", content=content, headers=JSON)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert words in error["message"] and error["type"]
    server.idle()


NOT_HELD = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}
FORM = {"type": "json_schema"}
ODD = {"role": "user", "content": [{"type": "image_url"}]}
ODDLY_NAMED = {"type": "function", "function": {"name": "a b"}}
HI = {"messages": [{"role": "user", "content": "a"}]}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("completions", {"prompt": "a", "stop": [""]}, "stop"),
        ("completions", {"prompt": "a", "seed": 2**70}, "seed"),
        ("completions", {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
        ("completions", {"prompt": "a", "logit_bias": {"900": 1}}, "logit_bias"),
        ("completions", {"prompt": "a", "max_tokens": 2, "min_tokens": 3}, "min_tokens"),
        ("completions", {"prompt": "a", "temprature": 1}, "temprature"),
        ("completions", {"prompt": "a", "stream_options": {}}, "stream_options"),
        ("chat/completions", HI | {"tool_choice": "required"}, "tool_choice"),
        ("chat/completions", HI | {"tool_choice": {"type": "x"}}, "tool_choice"),
        ("chat/completions", HI | {"top_logprobs": 2}, "top_logprobs"),
        ("chat/completions", HI | {"stream_options": {"include_usage": True}}, "stream_options"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": [9999]}, "prompt"),
        ("completions", {"prompt": "a", "stop_token_ids": [9999]}, "stop_token_ids"),
        ("completions", {"prompt": "a", "guided_regex": "("}, "guided_regex"),
        ("completions", {"prompt": "a", "structured_outputs": {"x": 1}}, "structured_outputs"),
        (
            "completions",
            {"prompt": "a", "structured_outputs": {"regex": "("}},
            "structured_outputs",
        ),
        ("chat/completions", HI | {"response_format": {"type": "xml"}}, "response_format"),
        ("chat/completions", HI | {"response_format": NOT_HELD}, "response_format"),
        ("chat/completions", HI | {"reasoning_effort": "high"}, "reasoning_effort"),
        ("chat/completions", HI | {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ("chat/completions", {"messages": [ODD]}, "messages"),
        ("chat/completions", HI | {"tools": [ODDLY_NAMED]}, "tools"),
        ("responses", {"input": []}, "input"),
        ("responses", {"input": [{"type": "frob"}]}, "input"),
        ("responses", {"input": [{"type": "item_reference", "id": "gone"}]}, "input"),
        ("responses", {"input": [{"role": "wizard", "content": "a"}]}, "input"),
        ("responses", {"input": "a", "truncation": "auto"}, "truncation"),
        ("responses", {"input": "a", "include": ["x"]}, "include"),
        ("responses", {"input": "a", "background": True}, "background"),
        ("responses", {"input": "a", "text": {"format": {"type": "xml"}}}, "text.format"),
        (
            "responses",
            {"input": "a", "text": {"format": NOT_HELD["json_schema"] | FORM}},
            "text.format",
        ),
        ("responses", {"input": "a", "text": {"verbosity": "low"}}, "text.verbosity"),
        ("responses", {"input": "a", "tools": [{"type": "web_search"}]}, "tools"),
        ("responses", {"input": "a", "tool_choice": "required"}, "tool_choice"),
        ("responses", {"input": "a", "reasoning": {"effort": "high"}}, "reasoning.effort"),
        ("responses", {"input": "a", "previous_response_id": "no"}, "previous_response_id"),
        ("embeddings", {"input": []}, "input"),
        ("embeddings", {"input": ["a", ""]}, "input"),
        ("embeddings", {"input": "a", "dimensions": 3}, "dimensions"),
        ("embeddings", {"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ],
)
def test_a_refusal_names_the_field_at_fault(server, path, body, param):
    answer = server.ask("POST", f"/v1/{path}", json=body)
    assert answer.status_code == (404 if param == "previous_response_id" else 400), answer.text
    assert answer.json()["error"]["param"] == param
    server.idle()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "no valid JSON"),
        (b'{"prompt": "\xff\xfe"}', ""),
        (b"[1, 2]", "body"),
        (b"", "required"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature=nan must be a number from 0 to 2"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature"),
        (b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", ""),
    ],
)
def test_malformed_bodies_are_refused(server, content, words):
    answer = server.ask("POST", "/v1/completions", content=content, headers=JSON)
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]["message"]


def test_a_body_sent_as_no_json_says_which_header_to_send(server):
    answer = server.ask("POST", "/v1/completions", content=b'{"prompt": "a"}')
    assert answer.status_code == 400
    assert "send the header Content-Type: application/json" in answer.json()["error"]["message"]


def test_fields_that_are_not_known_are_named_in_the_log(server, caplog):
    caplog.set_level("INFO", logger="jaxsys.serve.http.protocol")
    body = {"messages": [{"role": "developer", "content": "a"}], "max_tokens": 2}
    more = {"user": "me", "flavour": "sweet"}
    assert server.post("/v1/chat/completions", body | more).status_code == 200
    assert [record.fields for record in caplog.records] == ["'flavour'"]  # type: ignore


def test_fields_that_are_nearly_known_are_refused(server):
    for wrong, meant in (("temprature", "temperature"), ("max_token", "max_tokens")):
        answer = server.post("/v1/completions", {"prompt": "a", "max_tokens": 2, wrong: 1})
        assert answer.status_code == 400
        message = answer.json()["error"]["message"]
        assert message == f"{wrong} is not known; did you mean {meant}?"


def test_unknown_paths_and_methods(server):
    assert server.ask("GET", "/v1/nothing").json()["error"]["type"] == "not_found_error"
    answer = server.ask("GET", "/v1/completions")
    assert answer.status_code == 405 and answer.headers["allow"] == "POST"


def test_models_health_and_metrics(server):
    assert server.ask("GET", "/v1/models").json()["data"][0]["id"] == "tiny"
    assert server.ask("GET", "/health").json()["status"] == "ok"
    server.post("/v1/completions", {"prompt": "abc", "max_tokens": 3, "ignore_eos": True})
    text = server.ask("GET", "/metrics").text
    for name in ("jaxsys_ttft_seconds_count", "jaxsys_itl_seconds_sum", "jaxsys_kv_pages_used"):
        assert name in text
    assert 'jaxsys_energy_method_info{instance="prefill-0",method="none' in text


def test_a_client_that_leaves_ends_its_requests(server):
    """Stream or not, the request is gone from the engine soon after its task was cancelled."""

    async def leave(stream):
        async with server.client() as client:
            body = {"prompt": "hello", "max_tokens": 100, "ignore_eos": True, "stream": stream}
            task = asyncio.create_task(client.post("/v1/completions", json=body))
            while not server.engine.unfinished:
                await asyncio.sleep(0.001)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    for stream in (False, True):
        server.run(leave(stream))
        server.idle()


def test_too_many_requests_get_429(server):
    async def crowd():
        async with server.client() as client:
            body = {"prompt": "hello", "max_tokens": 60, "ignore_eos": True}
            return await asyncio.gather(
                *[client.post("/v1/completions", json=body) for _ in range(20)]
            )

    answers = server.run(crowd())
    statuses = [answer.status_code for answer in answers]
    assert statuses.count(200) == 12 and statuses.count(429) == 8
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert "at most 12 are taken" in refused.json()["error"]["message"]
    server.idle()


def test_keys_and_sizes(model, start):
    server = start(
        model,
        DeploymentConfig(prefill=1, decode=0, max_batch=2, max_length=64, page_size=8),
        api_keys=frozenset(["right"]),
        max_body_bytes=1000,
    )
    body = {"prompt": "a", "max_tokens": 1}
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "right"}):
        answer = server.post("/v1/completions", body, headers=header)
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    known = {"Authorization": "Bearer right"}
    assert server.post("/v1/completions", body, headers=known).status_code == 200
    assert server.ask("GET", "/health").status_code == 200
    large = server.post("/v1/completions", body | {"prompt": "a" * 2000}, headers=known)
    assert large.status_code == 413 and "1000 bytes" in large.json()["error"]["message"]

    async def pieces():
        for _ in range(30):
            yield b"x" * 100

    chunked = server.ask("POST", "/v1/completions", content=pieces(), headers=known)
    assert chunked.status_code == 413


def test_outputs_that_are_not_finite_end_the_request(model, start):
    spoilt = jax.tree.map(lambda leaf: leaf * jnp.nan, model.parameters)
    server = start(
        dataclasses.replace(model, parameters=spoilt),
        DeploymentConfig(prefill=1, decode=0, max_batch=2, max_length=64, page_size=8),
    )
    words = "the model's outputs are not finite"
    body = {"prompt": "a", "max_tokens": 2}
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 500
    assert (
        answer.json()["error"] | {"message": words, "type": "server_error"}
        == (answer.json()["error"])
    )
    stream = server.post("/v1/completions", body | {"stream": True})
    assert words in stream.text and "[DONE]" not in stream.text
    server.idle()


def test_a_fault_of_the_server_is_said_as_one(server, monkeypatch):
    def fail(*_):
        raise KeyError("a secret")

    monkeypatch.setattr(server.engine, "check", fail)

    async def run():
        transport = httpx.ASGITransport(app=server.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.post("/v1/completions", json={"prompt": "a"})

    answer = server.run(run())
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error" and "secret" not in answer.text


def test_draining_refuses_and_finishes(model, start):
    server = start(
        model, DeploymentConfig(prefill=1, decode=1, max_batch=2, max_length=64, page_size=8)
    )

    async def run():
        async with server.client() as client:
            body = {"prompt": "hello", "max_tokens": 40, "ignore_eos": True}
            task = asyncio.create_task(client.post("/v1/completions", json=body))
            while not server.engine.unfinished:
                await asyncio.sleep(0.001)
            drain = asyncio.create_task(server.engine.drain(30))
            await asyncio.sleep(0.01)
            late = await client.post("/v1/completions", json=body)
            health = await client.get("/health")
            return await task, late, health, await drain

    answer, late, health, ended = server.run(run())
    assert answer.status_code == 200 and ended == 0
    assert answer.json()["usage"]["completion_tokens"] == 40
    assert late.status_code == 503 and "shutting down" in late.json()["error"]["message"]
    assert health.status_code == 503
