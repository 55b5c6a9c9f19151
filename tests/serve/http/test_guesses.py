"""A server that guesses tokens says what it says without, and counts what it does."""

import asyncio
import json
from typing import Any

import pytest

from jaxsys.serve.deployment import DeploymentConfig

CONFIG = DeploymentConfig(
    prefill=1,
    decode=1,
    max_batch=4,
    max_length=160,
    max_prefill_tokens=32,
    page_size=8,
    page_count=96,
    max_requests=32,
    speculate="ngram",
    num_speculative_tokens=3,
)
SCHEMA = {
    "type": "object",
    "properties": {
        "names": {"type": "array", "items": {"enum": ["abab", "abba"]}, "minItems": 4},
        "kind": {"enum": ["abababab"]},
    },
    "required": ["names", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server(model, start, quickly_compiled) -> Any:
    return start(model, CONFIG)


def ask_both(server, *bodies):
    """The answers without guesses and with, asked at once each time."""

    async def run(guesses):
        decoder = server.engine.decoders[0]
        decoder.scheduler.speculation.wanted = lambda running, bucket: guesses and bool(running)
        async with server.client() as client:
            return await asyncio.gather(
                *[client.post("/v1/completions", json=body) for body in bodies]
            )

    found = []
    for guesses in (False, True):
        answers = server.run(run(guesses))
        server.idle()
        assert [answer.status_code for answer in answers] == [200] * len(bodies), answers[0].text
        found.append(answers)
    return found


def completion(prompt="abcabcabcabc", **fields):
    return {"prompt": prompt, "max_tokens": 30, "temperature": 0, "ignore_eos": True} | fields


def drafts(server):
    return server.engine.decoders[0].scheduler.speculation.drafts


def test_every_end_is_the_same(server):
    before = drafts(server)
    plain, _ = ask_both(server, completion())
    text = plain[0].json()["choices"][0]["text"]
    bodies = [
        completion(),
        completion(stop=text[9:11]),
        completion(stop=text[9:11], include_stop_str_in_output=True),
        completion(max_tokens=7),
        completion(logprobs=3, max_tokens=12),
        completion("xyxyxyxyxy", temperature=0.8, seed=4, top_p=0.9, presence_penalty=0.5),
        completion("mnmnmnmn", n=2, temperature=1, seed=9),
    ]
    for one, other in zip(*ask_both(server, *bodies), strict=True):
        one, other = one.json(), other.json()
        assert one["usage"]["completion_tokens"] == other["usage"]["completion_tokens"]
        for before_it, after_it in zip(one["choices"], other["choices"], strict=True):
            assert before_it["text"] == after_it["text"]
            assert before_it["finish_reason"] == after_it["finish_reason"]
            scores, again = before_it["logprobs"], after_it["logprobs"]
            assert (scores is None) == (again is None)
            if scores is not None:
                assert scores["tokens"] == again["tokens"]
                assert scores["text_offset"] == again["text_offset"]
                assert scores["token_logprobs"] == pytest.approx(again["token_logprobs"], abs=1e-4)
    assert drafts(server) > before


def test_streams_hold_every_token_once(server):
    def events(answer):
        lines = [line for line in answer.text.splitlines() if line.startswith("data: {")]
        return [json.loads(line.removeprefix("data: ")) for line in lines]

    body = completion(stream=True, stream_options={"include_usage": True})
    plain, guessed = (events(found[0]) for found in ask_both(server, body))
    texts = ["".join(c["text"] for one in s for c in one["choices"]) for s in (plain, guessed)]
    assert texts[0] == texts[1]
    assert plain[-1]["usage"] == guessed[-1]["usage"]


def test_grammars_hold(server):
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}
    bodies = [
        completion(
            response_format=form,
            guided_whitespace_pattern=" ",
            max_tokens=120,
            temperature=1,
            seed=3,
            ignore_eos=False,
        ),
        completion(),
    ]
    before = drafts(server)
    plain, guessed = ask_both(server, *bodies)
    for one, other in zip(plain, guessed, strict=True):
        assert one.json()["choices"] == other.json()["choices"]
    thing = json.loads(guessed[0].json()["choices"][0]["text"])
    assert thing["kind"] == "abababab" and set(thing["names"]) <= {"abab", "abba"}
    assert drafts(server) > before


def test_what_became_of_guesses_is_told_by_vllms_names(server):
    ask_both(server, completion())
    text = server.ask("GET", "/metrics").text
    found = {
        line.split("{")[0].removeprefix("vllm:spec_decode_num_"): float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith("vllm:spec_decode_num_") and "per_pos" not in line
    }
    speculation = server.engine.decoders[0].scheduler.speculation
    assert found["drafts_total"] == speculation.drafts > 0
    assert found["draft_tokens_total"] == speculation.draft_tokens
    assert found["accepted_tokens_total"] == speculation.accepted_tokens > 0
    assert 'spec_decode_num_accepted_tokens_per_pos_total{model_name="",position="0"}' in text


def test_sessions_are_named_by_header_or_body(server):
    named = []
    submit = server.engine.submit

    def note(*given, session=None, **named_too):
        named.append(session)
        return submit(*given, session=session, **named_too)

    server.engine.submit = note
    try:
        body = completion(max_tokens=1)
        server.post("/v1/completions", body | {"prompt_cache_key": "a"})
        server.post("/v1/completions", body | {"session_id": "b", "prompt_cache_key": "a"})
        server.post("/v1/completions", body, headers={"X-Session-ID": "c"})
        server.post("/v1/completions", body | {"user": "d"})
    finally:
        server.engine.submit = submit
    assert named == ["a", "b", "c", None]
