"""The wire as the openai client sees it, over a tiny random model: chats, tools, responses."""

import dataclasses
import json
from typing import Any

import httpx
import jax.numpy as jnp
import numpy as np
import openai
import pydantic
import pytest

from jaxsys.model.decoder import forward
from jaxsys.serve.deployment import DeploymentConfig
from jaxsys.serve.http.responses import NoSuchResponse, OwnTurns, items_of

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Says what is asked.",
            "parameters": {
                "type": "object",
                "properties": {"place": {"enum": ["Rome", "Oslo"]}, "days": {"const": 2}},
                "required": ["place", "days"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("weather", "clock")
]
USER = [{"role": "user", "content": "x"}]
CALL = '<tool_call>\n{"name": "clock", "arguments": {"place": "Rome", "days": 2}}\n</tool_call>'


@pytest.fixture(scope="module")
def server(model, start, quickly_compiled):
    long = dataclasses.replace(model.config, max_positions=2048)
    return start(
        dataclasses.replace(model, config=long),
        DeploymentConfig(
            prefill=1,
            decode=0,
            max_batch=4,
            max_length=2048,
            max_prefill_tokens=512,
            page_size=16,
            page_count=256,
        ),
    )


@pytest.fixture(scope="module")
def client(server):
    transport = httpx.ASGITransport(app=server.app)
    http: Any = httpx.AsyncClient(transport=transport, timeout=60)  # openai 3 names another's type
    return openai.AsyncOpenAI(
        api_key="-",
        base_url="http://server/v1",
        max_retries=0,
        http_client=http,
    )


def ask(server, client, **fields):
    """A chat, whole and as a stream, which must agree."""
    asked = {"model": "tiny", "messages": USER, "max_tokens": 300, "seed": 3, "temperature": 1}
    asked |= fields

    async def run():
        whole = await client.chat.completions.create(**asked)
        async with client.chat.completions.stream(**asked) as stream:
            async for _ in stream:
                pass
            return whole, await stream.get_final_completion()

    whole, streamed = server.run(run())
    server.idle()
    for one, other in zip(whole.choices, streamed.choices, strict=True):
        assert one.finish_reason == other.finish_reason
        assert (one.message.content or "") == (other.message.content or "")
        assert calls(one) == calls(other)
    return whole.choices[0]


def calls(choice):
    found = choice.message.tool_calls or []
    assert all(call.type == "function" and call.id for call in found)
    return [(call.function.name, json.loads(call.function.arguments)) for call in found]


def test_a_call_that_is_required_is_made(server, client):
    choice = ask(server, client, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    ((name, arguments),) = calls(choice)
    assert name in ("weather", "clock") and arguments["place"] in ("Rome", "Oslo")
    named = {"type": "function", "function": {"name": "clock"}}
    ((name, arguments),) = calls(ask(server, client, tools=TOOLS, tool_choice=named))
    assert name == "clock" and arguments["days"] == 2


NAMED = {"type": "function", "function": {"name": "clock"}}
ONE_CALL = [
    ({"tool_choice": NAMED}, "stop"),
    ({"tool_choice": NAMED, "parallel_tool_calls": True}, "stop"),
    ({"tool_choice": "required", "parallel_tool_calls": False}, "tool_calls"),
]


@pytest.mark.parametrize(("fields", "reason"), ONE_CALL)
def test_one_call_ends_with_its_arguments(server, client, fields, reason):
    """Marks behind it are not waited for: a limit that cuts them off takes nothing away."""
    within = len(CALL) - len("}\n</tool_call>") + len("weather") - len("clock")
    for temperature in (0, 1):
        asked = {"tools": TOOLS, "max_tokens": within + 8, "temperature": temperature, **fields}
        choice = ask(server, client, **asked)
        ((_, arguments),) = calls(choice)
        assert choice.finish_reason == reason and arguments["days"] == 2
        usage = server.post("/v1/chat/completions", {"messages": USER, **asked}).json()["usage"]
        # Tokens that were on their way when it ended may be counted.
        assert usage["completion_tokens"] < within + 8
    fields = {**fields, "tool_choice": {"type": "function", "name": "clock"}}
    response = respond(server, client, tools=FLAT, max_output_tokens=within + 2, **fields)
    assert [item.type for item in response.output] == ["function_call"]
    assert response.usage.output_tokens <= within


def test_a_call_that_a_stop_text_breaks_off_is_none(server):
    body = {"messages": USER, "tools": TOOLS, "tool_choice": "required", "max_tokens": 200}
    answer = server.post("/v1/chat/completions", body | {"stop": '"days"', "seed": 7})
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "stop"
    assert '"place"' in call["function"]["arguments"] and "days" not in str(call)


def test_calls_are_found_in_free_answers(server, client):
    form = {"guided_choice": [f"Well.\n{CALL}\n{CALL}"]}
    choice = ask(server, client, tools=TOOLS, extra_body=form, parallel_tool_calls=True, seed=8)
    found = calls(choice)
    assert found and choice.finish_reason == "tool_calls"
    if choice.message.content:
        assert choice.message.content == "Well." and len(found) == 2
    none = ask(server, client, tools=TOOLS, tool_choice="none", extra_body=form)
    assert none.finish_reason == "stop" and none.message.content.startswith("Well.\n<tool_call>")


def test_a_history_of_calls_is_told_to_the_model(server):
    call: dict[str, Any] = {"id": "a", "type": "function"}
    call["function"] = {"name": "clock", "arguments": '{"place": "Rome"}'}
    history = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "nine"}]},
    ]
    body = {"messages": history, "tools": TOOLS}
    tokens = server.post("/tokenize", body).json()["tokens"]
    text = server.post("/detokenize", {"tokens": tokens}).json()["prompt"]
    assert '{"name": "clock", "arguments": {"place": "Rome"}}' in text and "nine" in text
    answer = server.post("/v1/chat/completions", body | {"max_tokens": 4}).json()
    assert answer["usage"]["prompt_tokens"] == len(tokens)


def test_a_class_is_parsed(server, client):
    class Trip(pydantic.BaseModel):
        place: str = pydantic.Field(max_length=6)
        days: int = pydantic.Field(ge=0, le=9)

    async def run():
        asked: Any = {"model": "tiny", "messages": USER, "max_tokens": 300, "seed": 5}
        asked["extra_body"] = {"guided_whitespace_pattern": " "}
        return await client.chat.completions.parse(response_format=Trip, **asked)

    trip = server.run(run()).choices[0].message.parsed
    assert isinstance(trip, Trip) and 0 <= trip.days <= 9


def test_what_is_wrong_with_tools_is_said(server):
    for fields, says in [
        ({"tools": [{"type": "web_search"}]}, "function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "a b"),
        ({"tools": TOOLS, "tool_choice": "perhaps"}, "tool_choice"),
        ({"tool_choice": "required"}, "needs tools"),
        ({"messages": [{"role": "tool"}]}, "content"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}, "function"),
    ]:
        answer = server.post("/v1/chat/completions", {"messages": USER} | fields)
        assert answer.status_code == 400 and says in answer.json()["error"]["message"], answer.text
    bad = [{"type": "function", "function": {"name": "a", "parameters": {"not": {}}}}]
    body = {"messages": USER, "tools": bad, "tool_choice": "required"}
    answer = server.post("/v1/chat/completions", body)
    assert answer.status_code == 400 and "not" in answer.json()["error"]["message"]
    assert server.post("/v1/completions", {"prompt": "a", "tools": TOOLS}).status_code == 400


FLAT = [{"type": "function", "strict": True, **tool["function"]} for tool in TOOLS]
FORM = {
    "type": "json_schema",
    "name": "trip",
    "strict": True,
    "schema": TOOLS[0]["function"]["parameters"],
}


def respond(server, client, **fields):
    """A response, whole and as a stream that the client puts together, which must agree."""
    asked = {"model": "tiny", "input": "x", "max_output_tokens": 300, "extra_body": {"seed": 3}}
    asked |= fields

    async def run():
        whole = await client.responses.create(**asked)
        async with client.responses.stream(**asked) as stream:
            kinds = [event.type async for event in stream]
            return whole, await stream.get_final_response(), kinds

    whole, streamed, kinds = server.run(run())
    server.idle()
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed" and whole.status == streamed.status == "completed"
    assert whole.output_text == streamed.output_text and whole.id != streamed.id
    assert [item.type for item in whole.output] == [item.type for item in streamed.output]
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
    return whole


def test_a_response_and_its_turns(server, client):
    form = {"format": FORM}
    first = respond(server, client, text=form, instructions="Be brief.")
    assert json.loads(first.output_text)["days"] == 2

    async def run():
        kept = await client.responses.retrieve(first.id)
        assert kept.output == first.output
        second = await client.responses.create(
            model="tiny", input="y", previous_response_id=first.id, text=form
        )
        items = (await client.responses.input_items.list(second.id)).data
        assert [item.role for item in items] == ["user", "assistant", "user"]
        again = [{"type": "item_reference", "id": first.output[0].id}]
        third = await client.responses.create(
            model="tiny", input=[*again, {"role": "user", "content": "y"}], text=form, store=False
        )
        await client.responses.delete(first.id)
        for name in (first.id, third.id):
            with pytest.raises(openai.NotFoundError):
                await client.responses.retrieve(name)
        with pytest.raises(openai.NotFoundError) as error:
            await client.responses.create(model="tiny", input="y", previous_response_id=first.id)
        assert error.value.code == "previous_response_not_found"
        # The second turn has the first one's items still.
        assert len((await client.responses.input_items.list(second.id)).data) == 3
        return second.usage.input_tokens

    assert server.run(run()) > first.usage.input_tokens - 30


def test_a_response_calls_and_is_told_what_came_of_it(server, client):
    response = respond(server, client, tools=FLAT, tool_choice="required")
    (call, *_) = response.output
    assert call.type == "function_call" and json.loads(call.arguments)["days"] == 2
    history = [
        {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}]},
        call.model_dump(),
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
    ]
    choice = {"type": "function", "name": "clock"}
    named = respond(server, client, input=history, tools=FLAT, tool_choice=choice)
    assert [item.name for item in named.output] == ["clock"]


def test_a_response_that_is_cut_says_so(server):
    body = {"input": "x", "max_output_tokens": 2, "text": {"format": FORM}}
    response = server.post("/v1/responses", body).json()
    assert response["status"] == response["output"][0]["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    text = server.post("/v1/responses", body | {"stream": True}).text
    lines = [line for line in text.split("\n") if line.startswith("event: ")]
    assert lines[-1] == "event: response.incomplete"


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"tools": [{"type": "web_search"}]}, "web_search"),
        ({"input": []}, "empty"),
        ({"input": [{"type": "computer_call"}]}, "computer_call"),
        ({"input": [{"type": "item_reference", "id": "no"}]}, "not kept"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input_image"),
        ({"input": [{"role": "zzz", "content": "a"}]}, "role"),
        ({"text": {"format": {"type": "xml"}}}, "json_schema"),
        ({"text": {"verbosity": "low"}}, "verbosity"),
        ({"reasoning": {"effort": "high"}}, "reasoning_effort"),
        ({"temperature": 9}, "temperature"),
        ({"best_of": 3}, "best_of"),
    ],
)
def test_what_a_response_cannot_be_is_refused(server, fields, says):
    answer = server.post("/v1/responses", {"input": "x", "max_output_tokens": 2} | fields)
    assert answer.status_code == 400 and says in answer.json()["error"]["message"], answer.text


def test_turns_are_kept_within_bounds():
    turns = OwnTurns(most=3, most_bytes=2000)
    for number in range(5):
        own = items_of(f"question {number}")
        items = turns.conversation(f"r{number - 1}" if number else None, own)
        output = [{"id": f"o{number}", "type": "message", "content": "answer"}]
        turns.keep({"id": f"r{number}", "output": output}, own, items)
    with pytest.raises(NoSuchResponse):
        turns.get("r1")
    assert len(turns.inputs("r4")) == 9 and len(turns._turns) == 3
    turns.keep({"id": "large", "output": [], "text": "x" * 1800}, [], [])
    assert list(turns._turns) == ["large"] and not turns._items
    turns.forget("large")
    assert turns._bytes == 0


def test_embeddings_are_the_final_hidden_states_pooled(server, client, model):
    prompts = [list(b"a longer text"), list(b"b")]
    config, parameters = server.engine.instances[0].executor.config, model.parameters
    wide = config.hidden_size
    # With the identity for a head, logits are what the final norm gives.
    edge = parameters["edge"] | {"head": {"kernel": np.eye(wide, dtype=np.float32)}}
    hidden = [
        np.asarray(forward(config, parameters | {"edge": edge}, jnp.asarray([prompt]))[0])
        for prompt in prompts
    ]

    async def run(**fields):
        found = await client.embeddings.create(model="tiny", input=prompts, **fields)
        assert found.usage.prompt_tokens == 14
        assert [one.index for one in found.data] == [0, 1]
        return [np.asarray(one.embedding) for one in found.data]

    for fields, pooled in [
        ({}, [one.mean(0) for one in hidden]),
        ({"encoding_format": "float"}, [one.mean(0) for one in hidden]),
        ({"extra_body": {"pooling": "last"}}, [one[-1] for one in hidden]),
    ]:
        for vector, expected in zip(server.run(run(**fields)), pooled, strict=True):
            expected = expected / np.linalg.norm(expected)
            np.testing.assert_allclose(vector, expected, atol=2e-5)
    text = server.post("/v1/embeddings", {"input": ["a longer text", "b"]}).json()
    np.testing.assert_allclose(text["data"][1]["embedding"], server.run(run())[1], atol=1e-6)
    assert text["pooling"] == "mean"
    long = server.post("/v1/embeddings", {"input": "x" * 700}).json()  # in two pieces
    cut = server.post("/v1/embeddings", {"input": "x" * 900, "truncate_prompt_tokens": 700})
    assert cut.json()["data"] == long["data"]
    server.idle()
    for fields, says in [
        ({"input": []}, "entries"),
        ({"input": ""}, "the input is empty"),
        ({"input": ["a", ""]}, "the input[1] is empty"),
        ({"input": "a", "dimensions": 3}, "dimensions"),
        ({"input": [[9999]]}, "9999"),
        ({"input": "x" * 2100}, "input is too long"),
        ({"input": [[65] * 2, [65] * 2100]}, "input[1] is too long: 2100 tokens"),
        ({"input": "a", "pooling": "max"}, "pooling"),
    ]:
        answer = server.post("/v1/embeddings", fields)
        assert answer.status_code == 400 and says in answer.json()["error"]["message"], answer.text
