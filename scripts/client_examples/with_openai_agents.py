"""openai-agents: agents over responses and over chats, with tools and typed outputs."""

# pyright: reportMissingImports=false
from typing import Literal

import openai
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    Runner,
    function_tool,
    set_default_openai_client,
    set_tracing_disabled,
)
from examples import MODEL, QUESTION, example, run
from pydantic import BaseModel, Field

CLIENT = openai.AsyncOpenAI()
set_default_openai_client(CLIENT)
set_tracing_disabled(True)
CHAT = OpenAIChatCompletionsModel(MODEL, CLIENT)
CALLED = []


class Trip(BaseModel):
    """A trip to a city."""

    city: str = Field(max_length=20)
    days: int = Field(ge=1, le=9)


@function_tool
def weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather of a city."""
    CALLED.append(city)
    return "sunny"


def agent(model, **fields):
    fields.setdefault("model_settings", ModelSettings(max_tokens=400))
    return Agent(name="guide", instructions="Be brief.", model=model, **fields)


@example
async def responses_text():
    assert (await Runner.run(agent(MODEL), QUESTION)).final_output


@example
async def responses_typed():
    result = await Runner.run(agent(MODEL, output_type=Trip), QUESTION)
    assert isinstance(result.final_output, Trip)


@example
async def responses_tool():
    CALLED.clear()
    settings = ModelSettings(tool_choice="required", max_tokens=400)
    result = await Runner.run(agent(MODEL, tools=[weather], model_settings=settings), QUESTION)
    assert CALLED and result.final_output


@example
async def responses_stream():
    result = Runner.run_streamed(agent(MODEL), QUESTION)
    assert [event async for event in result.stream_events()] and result.final_output


@example
async def chat_tool():
    CALLED.clear()
    settings = ModelSettings(tool_choice="required", max_tokens=400)
    result = await Runner.run(agent(CHAT, tools=[weather], model_settings=settings), QUESTION)
    assert CALLED and result.final_output


@example
async def chat_stream():
    result = Runner.run_streamed(agent(CHAT, output_type=Trip), QUESTION)
    assert [event async for event in result.stream_events()]
    assert isinstance(result.final_output, Trip)


run()
