"""Structured output: what the answer's form must be, kept in any batch and on any way through."""

import asyncio
import dataclasses
import json
import re

import llguidance
import numpy as np
import pytest

from jaxsys.model import ByteTokenizer
from jaxsys.serve.deployment import DeploymentConfig
from jaxsys.serve.grammars import Follower, Grammars, of_json_schema
from jaxsys.serve.http.structured import closed, grammar_of

APART = DeploymentConfig(
    prefill=1,
    decode=1,
    max_batch=4,
    max_length=160,
    max_prefill_tokens=32,
    page_size=8,
    page_count=96,
    max_requests=32,
)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["a", "b"]},
    },
    "required": ["name", "size", "kind"],
    "additionalProperties": False,
}
JSON_SHORT = '{"name":"x","size":9,"kind":"a"}'
FORM = {"type": "json_schema", "json_schema": {"name": "thing", "strict": True, "schema": SCHEMA}}


@pytest.fixture(scope="module")
def servers(model, start, quickly_compiled):
    """Prefill and decode apart, and together with so few pages that requests are preempted."""
    together = dataclasses.replace(APART, decode=0, page_count=20)
    return start(model, APART), start(model, together)


def ask(server, *bodies):
    """Chats that are asked at once."""

    async def run():
        async with server.client() as client:
            return await asyncio.gather(
                *[client.post("/v1/chat/completions", json=body) for body in bodies]
            )

    answers = server.run(run())
    server.idle()
    assert [answer.status_code for answer in answers] == [200] * len(bodies), answers[0].text
    return [answer.json()["choices"] for answer in answers]


def chat(**fields):
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 100, "temperature": 1}
    return body | {"seed": 7} | fields


def formed(**fields):
    return chat(response_format=FORM, guided_whitespace_pattern=" ", **fields)


def holds(text):
    thing = json.loads(text)
    assert list(thing) == ["name", "size", "kind"]
    assert isinstance(thing["name"], str) and len(thing["name"]) <= 8
    assert type(thing["size"]) is int and 0 <= thing["size"] <= 99
    assert thing["kind"] in ("a", "b")


def test_a_schema_holds_in_a_mixed_batch_and_leaves_free_requests_as_they_are(servers):
    free = chat(max_tokens=60, ignore_eos=True)
    bodies = [
        formed(n=2),
        free,
        formed(seed=8, top_p=0.9),
    ]
    apart, together = servers
    ((alone,),) = ask(apart, free)
    found = [ask(server, *bodies) for server in servers]
    preempted = sum(one.load.preemptions for one in together.engine.instances)
    assert preempted, "the pages were to run out"
    for choices in found:
        forms = [*choices[0], *choices[2]]
        for choice in forms:
            assert choice["finish_reason"] == "stop"
            holds(choice["message"]["content"])
        assert choices[0][0]["message"] != choices[0][1]["message"]
        assert choices[1][0]["message"] == alone["message"]
    # State is made again from tokens: the way through does not change what is drawn.
    texts = [[one["message"] for choice in choices for one in choice] for choices in found]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "fields, pattern",
    [
        ({"response_format": {"type": "json_object"}, "seed": 3}, r"\s*\{.*"),
        ({"guided_choice": ["red", "reddish", 'bl"ue']}, r'red|reddish|bl"ue'),
        ({"structured_outputs": {"regex": "[a-c]{5}x?"}}, "[a-c]{5}x?"),
        ({"guided_grammar": 'start: "a" inner "b"\ninner: /[0-9]{2}/'}, "a[0-9]{2}b"),
        ({"guided_grammar": 'root ::= "yes" | "no"'}, "yes|no"),
        ({"guided_json": json.dumps({"type": "boolean"})}, "true|false"),
        (
            {
                "structured_outputs": {
                    "json": {"type": "array", "items": {"const": 1}, "minItems": 2, "maxItems": 2},
                    "disable_any_whitespace": True,
                }
            },
            r"\[1,1\]",
        ),
        (
            {"guided_json": {"const": {"a": [1, 2]}}, "guided_whitespace_pattern": ""},
            r'\{"a":\[1,2\]\}',
        ),
        (
            {
                "structured_outputs": {
                    "json": {"const": [1, 2]},
                    "whitespace_pattern": "",
                    "disable_any_whitespace": False,
                }
            },
            r"\[1,2\]",
        ),
    ],
)
def test_forms(servers, fields, pattern):
    ((choice,),) = ask(servers[0], chat(**fields))
    text = choice["message"]["content"]
    assert re.fullmatch(pattern, text, re.DOTALL), text
    if choice["finish_reason"] == "stop" and "response_format" in fields:
        assert isinstance(json.loads(text), dict)


def test_a_completion_streams_its_last_token_too(servers):
    body = {"prompt": "a", "guided_regex": "abc", "stream": True, "ignore_eos": True}
    parts = servers[0].stream("/v1/completions", body)
    assert "".join(part["choices"][0]["text"] for part in parts) == "abc"
    assert parts[-1]["choices"][0]["finish_reason"] == "stop"
    metrics = servers[0].ask("GET", "/metrics").text
    assert re.search(r'jaxsys_requests_total\{.*"stop".*\} [1-9]', metrics)


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"guided_json": {"not": {}}}, "not"),
        ({"guided_json": {"x-guidance": {"lenient": True}, "not": {}}}, "not"),
        ({"guided_json": {"type": "string", "format": "zip"}}, "zip"),
        ({"guided_json": {"type": "frob"}}, "frob"),
        ({"guided_json": "{"}, "no JSON"),
        ({"guided_json": {"$ref": "http://elsewhere/x"}}, "elsewhere"),
        ({"guided_regex": "(?=a)b"}, "look-around"),
        ({"guided_regex": "("}, "("),
        ({"guided_grammar": "start: missing"}, "missing"),
        ({"guided_choice": []}, "choice"),
        ({"guided_choice": "ab"}, "choice"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "exclude"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "exclude"),
        ({"guided_regex": "a", "min_tokens": 2}, "min_tokens"),
        ({"guided_whitespace_pattern": " "}, "whitespace_pattern"),
        ({"guided_json": {}, "disable_any_whitespace": True}, "option of structured_outputs"),
        ({"guided_json": {}, "whitespace_pattern": ""}, "option of structured_outputs"),
        ({"structured_outputs": {"json": {}, "disable_any_whitespace": "no"}}, "true or false"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structural_tag"),
        ({"structured_outputs": []}, "structured_outputs"),
        ({"response_format": {"type": "xml"}}, "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "schema"),
        ({"guided_regex": "a" * 300_000}, "at most"),
        ({"guided_json": {"$ref": "#"}}, "admits no text"),
        ({"guided_regex": r"[^\s\S]"}, "admits no text"),
        ({"guided_grammar": "start: start"}, "admits no text"),
        ({"guided_grammar": 'start: ""'}, "admits no text"),
        ({"guided_choice": [""]}, "none empty"),
    ],
)
def test_what_cannot_be_held_is_refused(servers, fields, says):
    answer = servers[0].post("/v1/chat/completions", chat(**fields))
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]


TOO_LARGE = 2**53 + 1
FLAT = {"type": "object", "properties": {f"a{at}": {"$ref": "#/$defs/a"} for at in range(201)}}


def deep(levels):
    return {"items": deep(levels - 1)} if levels else {}


@pytest.mark.parametrize(
    "schema, says",
    [
        ({"const": TOO_LARGE}, "const has 9007199254740993"),
        ({"enum": ["a", [-TOO_LARGE]]}, "enum has -9007199254740993"),
        ({"properties": {"a": {"type": "integer", "minimum": TOO_LARGE}}}, "minimum"),
        ({"type": "number", "maximum": float(TOO_LARGE)}, "write it as a string"),
        ({"type": "string", "maxLength": TOO_LARGE}, "2**53 - 1"),
        (FLAT | {"$defs": {"a": {"type": "null"}}}, "201 $refs; at most 200"),
        ({"$defs": {f"a{at}": {} for at in range(201)}}, "201 $defs entries"),
        (deep(65), "64 levels"),
    ],
)
def test_schemas_beyond_the_bounds_never_reach_the_library(servers, monkeypatch, schema, says):
    monkeypatch.setattr(llguidance, "LLMatcher", None)  # to call it fails, with another message
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    function = {"name": "a", "parameters": {"type": "object", "properties": {}} | schema}
    tools = [{"type": "function", "function": function}]
    for fields in (
        {"response_format": form},
        {"guided_json": schema},
        {"guided_json": json.dumps(schema)},
        {"guided_grammar": f"start: %json {json.dumps(schema)}"},
        {"tools": tools, "tool_choice": "required"},
    ):
        answer = servers[0].post("/v1/chat/completions", chat(**fields))
        assert answer.status_code == 400, fields
        assert says in answer.json()["error"]["message"]


def test_schemas_within_the_bounds_are_taken():
    for schema in ({"const": 2**53 - 1}, {"enum": [True, "9007199254740993"]}, deep(64)):
        of_json_schema(schema)


def test_reasons_hold_neither_advice_nor_state(servers):
    either = {"oneOf": [{"type": "integer"}, {"type": "number"}]}
    answer = servers[0].post("/v1/chat/completions", chat(guided_json=either))
    message = answer.json()["error"]["message"]
    assert answer.status_code == 400 and "oneOf" in message and "coerce" not in message

    class Lost:
        def consume_tokens(self, tokens):
            return False

        def get_error(self):
            return "Too\ncomplex\n<state>\nParser: {}"

    with pytest.raises(ValueError, match="cannot be followed: Too complex$"):
        Follower(Lost(), 1).follow([1])


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"response_format": FORM}, '{"name": "x", "size": 99, "kind": "a"}'),
        ({"response_format": {"type": "json_object"}}, '{"a": 1}'),
        ({"guided_json": SCHEMA, "guided_whitespace_pattern": r"\s*"}, JSON_SHORT),
        ({"guided_json": {"enum": ["a", "b"]}}, '"a"'),
        ({"guided_choice": ["yes", "no"]}, "no"),
        ({"guided_regex": "[a-z]{3}"}, "abc"),
        ({"guided_grammar": 'start: "a" "b"?'}, "ab"),
    ],
)
def test_a_form_that_is_whole_ends_the_answer(fields, text):
    """Nothing, not even space, may stand behind: no token of it is waited for."""
    tokenizer = ByteTokenizer()
    grammar = grammar_of(fields)
    assert grammar is not None
    follower = Grammars(tokenizer, tokenizer.backend.get_vocab_size()).begin(grammar)
    tokens = tokenizer.encode(text, add_special=False)
    follower.follow(tokens[:-1])
    assert not follower.ended
    follower.follow(tokens)
    assert follower.ended


def test_objects_are_closed_where_that_shuts_nothing_out():
    a = {"type": "object", "properties": {"a": {"type": "object", "properties": {"b": {}}}}}
    assert closed(a)["additionalProperties"] is False
    assert closed(a)["properties"]["a"]["additionalProperties"] is False
    assert closed(a | {"additionalProperties": True})["additionalProperties"] is True
    for left in (
        {"properties": {"allOf": {}}, "allOf": [a]},
        {"properties": {"b": {}}, "anyOf": [a]},
        {"patternProperties": {"^x": {}}, "anyOf": [a]},
        {"enum": [{"properties": 1}]},
        True,
    ):
        assert closed(left) == left
    for named in ({}, {"properties": {"b": {}}}):
        assert closed(named | {"patternProperties": {"^x": {}}})["additionalProperties"] is False
    assert closed({"anyOf": [a]})["anyOf"][0]["additionalProperties"] is False


def test_embeddings_are_the_same_where_prompts_are_read_apart(servers):
    body = {"input": ["a text in two pieces, " * 2, "b"], "pooling": "mean"}
    found = []
    for server in servers:
        data = server.post("/v1/embeddings", body).json()["data"]
        server.idle()
        found.append([one["embedding"] for one in data])
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found[0], axis=1), 1.0, atol=1e-6)
    # An embedding needs no place for an answer.
    fits = APART.max_length
    assert servers[0].post("/v1/embeddings", {"input": [66] * fits}).status_code == 200
    answer = servers[0].post("/v1/embeddings", {"input": [66] * (fits + 1)})
    assert answer.json()["error"]["param"] == "input"
    said = f"input is too long: {fits + 1} tokens; at most {fits} fit"
    assert said in answer.json()["error"]["message"]
    servers[0].idle()
