"""pydantic-ai: agents with text, tools and typed outputs, over chats and over responses."""

# pyright: reportMissingImports=false
from typing import Literal

from examples import MODEL, QUESTION, example, run
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel

SETTINGS = {"max_tokens": 300}


class Trip(BaseModel):
    """A trip to a city."""

    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=9)


@example
def text():
    agent = Agent(OpenAIChatModel(MODEL), model_settings=SETTINGS)
    assert agent.run_sync(QUESTION).output


@example
async def text_stream():
    agent = Agent(OpenAIChatModel(MODEL), model_settings=SETTINGS)
    async with agent.run_stream(QUESTION) as result:
        assert [part async for part in result.stream_text()]


@example
def output_by_tool():
    agent = Agent(OpenAIChatModel(MODEL), output_type=ToolOutput(Trip), model_settings=SETTINGS)
    assert isinstance(agent.run_sync(QUESTION).output, Trip)


@example
def output_by_schema():
    agent = Agent(OpenAIChatModel(MODEL), output_type=NativeOutput(Trip), model_settings=SETTINGS)
    assert isinstance(agent.run_sync(QUESTION).output, Trip)


@example
def tool_history():
    agent = Agent(OpenAIChatModel(MODEL), output_type=Trip, model_settings=SETTINGS)
    first = agent.run_sync(QUESTION)
    second = agent.run_sync("And Italy?", message_history=first.all_messages())
    assert isinstance(second.output, Trip)


@example
def responses():
    agent = Agent(OpenAIResponsesModel(MODEL), output_type=Trip, model_settings=SETTINGS)
    assert isinstance(agent.run_sync(QUESTION).output, Trip)


@example
async def responses_stream():
    agent = Agent(OpenAIResponsesModel(MODEL), model_settings=SETTINGS)
    async with agent.run_stream(QUESTION) as result:
        assert await result.get_output()


run()
