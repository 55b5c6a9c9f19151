"""openai: chats, completions, parsed classes, tools, responses, embeddings."""

# pyright: reportMissingImports=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportOptionalIterable=false
import json

import openai
import pydantic
from examples import CITY_SCHEMA, MODEL, QUESTION, example, run
from openai import OpenAI

client = OpenAI()
USER = [{"role": "user", "content": QUESTION}]
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Weather of a city.", "parameters": CITY_SCHEMA},
}
FLAT = {"type": "function", **TOOL["function"], "strict": True}


class Trip(pydantic.BaseModel):
    """A class to be filled."""

    city: str = pydantic.Field(max_length=20)
    days: int = pydantic.Field(ge=1, le=9)


@example
def models():
    assert [one.id for one in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


@example
def chat():
    answer = client.chat.completions.create(model=MODEL, messages=USER, max_tokens=20)
    assert answer.choices[0].message.content and answer.usage.completion_tokens


@example
def chat_stream():
    options = {"include_usage": True}
    parts = list(
        client.chat.completions.create(
            model=MODEL, messages=USER, max_tokens=20, stream=True, stream_options=options, n=2
        )
    )
    assert parts[-1].usage.completion_tokens and not parts[-1].choices
    assert {choice.index for part in parts for choice in part.choices} == {0, 1}


@example
def completion():
    answer = client.completions.create(model=MODEL, prompt=["One, two,", "A"], max_tokens=8)
    assert len(answer.choices) == 2
    parts = client.completions.create(model=MODEL, prompt="One, two,", max_tokens=8, stream=True)
    assert "".join(part.choices[0].text for part in parts)


@example
def completion_echo():
    answer = client.completions.create(
        model=MODEL, prompt="One, two", max_tokens=1, echo=True, logprobs=1, temperature=0
    )
    found = answer.choices[0].logprobs
    assert found.token_logprobs is not None and found.token_logprobs[0] is None
    assert "".join(found.tokens) == answer.choices[0].text


@example
def parse():
    answer = client.chat.completions.parse(
        model=MODEL, messages=USER, max_tokens=200, response_format=Trip
    )
    assert isinstance(answer.choices[0].message.parsed, Trip)


@example
def parse_stream():
    asked = {"model": MODEL, "messages": USER, "max_tokens": 200, "response_format": Trip}
    with client.chat.completions.stream(**asked) as stream:
        for _ in stream:
            pass
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Trip)


@example
def tools():
    asked = {"model": MODEL, "messages": USER, "max_tokens": 300, "tools": [TOOL]}
    answer = client.chat.completions.create(**asked, tool_choice="required")
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls"
    call = message.tool_calls[0]
    assert call.function.name == "weather" and json.loads(call.function.arguments)["city"]
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    answer = client.chat.completions.create(
        **asked | {"messages": [*USER, message, result], "max_tokens": 20}, tool_choice="auto"
    )
    assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls")


@example
def tools_stream():
    named = {"type": "function", "function": {"name": "weather"}}
    asked = {"model": MODEL, "messages": USER, "max_tokens": 300, "tools": [TOOL]}
    with client.chat.completions.stream(**asked, tool_choice=named) as stream:
        for _ in stream:
            pass
        (call,) = stream.get_final_completion().choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["days"] >= 1


@example
def responses():
    first = client.responses.create(model=MODEL, input=QUESTION, max_output_tokens=200)
    assert first.output_text
    second = client.responses.create(
        model=MODEL, input="And of Italy?", previous_response_id=first.id, max_output_tokens=8
    )
    assert second.usage.input_tokens > first.usage.input_tokens


@example
def responses_parse_and_stream():
    answer = client.responses.parse(model=MODEL, input=QUESTION, text_format=Trip)
    assert isinstance(answer.output_parsed, Trip)
    with client.responses.stream(model=MODEL, input=QUESTION, text_format=Trip) as stream:
        kinds = [event.type for event in stream]
        assert isinstance(stream.get_final_response().output_parsed, Trip)
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"


@example
def responses_tools():
    asked = {"model": MODEL, "input": QUESTION, "tools": [FLAT], "tool_choice": "required"}
    call = client.responses.create(**asked, parallel_tool_calls=False).output[-1]
    assert call.type == "function_call" and json.loads(call.arguments)["city"]
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    history = [{"role": "user", "content": QUESTION}, call, output]
    answer = client.responses.create(model=MODEL, input=history, max_output_tokens=16)
    assert answer.output_text


@example
def embeddings():
    found = client.embeddings.create(model=MODEL, input=["a cat", "a dog"])
    assert len(found.data) == 2 and len(found.data[0].embedding) > 8


@example
def errors():
    try:
        client.chat.completions.create(model="other", messages=USER)
    except openai.NotFoundError as error:
        assert error.code == "model_not_found"
    else:
        raise AssertionError("another model was served")
    try:
        client.completions.create(model=MODEL, prompt=[1] * 5000)
    except openai.BadRequestError as error:
        assert error.code == "context_length_exceeded"
    else:
        raise AssertionError("a prompt that does not fit was served")


run()
