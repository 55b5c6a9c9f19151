"""litellm: chats, streams, tools, embeddings, responses."""

# pyright: reportMissingImports=false
import json

import litellm
from examples import BASE, CITY_SCHEMA, MODEL, QUESTION, example, run

AT = {"model": f"openai/{MODEL}", "api_base": BASE, "api_key": "none"}
USER = [{"role": "user", "content": QUESTION}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": CITY_SCHEMA}}


@example
def chat():
    answer = litellm.completion(**AT, messages=USER, max_tokens=20)
    assert answer.choices[0].message.content


@example
def stream():
    parts = list(litellm.completion(**AT, messages=USER, max_tokens=20, stream=True))
    assert "".join(part.choices[0].delta.content or "" for part in parts)
    assert parts[-1].choices[0].finish_reason


@example
def tools():
    asked = {"messages": USER, "max_tokens": 300, "tools": [TOOL], "tool_choice": "required"}
    call = litellm.completion(**AT, **asked).choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments)["city"]
    parts = list(litellm.completion(**AT, **asked, stream=True))
    whole = litellm.stream_chunk_builder(parts, messages=USER)
    assert json.loads(whole.choices[0].message.tool_calls[0].function.arguments)["city"]


@example
def structured():
    form = {"type": "json_schema", "json_schema": {"name": "trip", "schema": CITY_SCHEMA}}
    answer = litellm.completion(**AT, messages=USER, max_tokens=200, response_format=form)
    assert json.loads(answer.choices[0].message.content)["city"]


@example
def embeddings():
    found = litellm.embedding(**AT, input=["a cat", "a dog"])
    assert len(found.data) == 2


@example
def responses():
    answer = litellm.responses(**AT, input=QUESTION, max_output_tokens=100)
    assert answer.output[0].content[0].text


@example
def too_long():
    try:
        litellm.completion(**AT, messages=[{"role": "user", "content": "a b " * 5000}])
    except litellm.ContextWindowExceededError:
        return
    raise AssertionError("a prompt that does not fit was served")


run()
