"""instructor: a class from every mode that OpenAI's API has."""

# pyright: reportMissingImports=false
import instructor
from examples import MODEL, QUESTION, example, run
from openai import OpenAI
from pydantic import BaseModel, Field

USER = [{"role": "user", "content": QUESTION + " Answer as JSON with city and days."}]


class Trip(BaseModel):
    """A trip to a city."""

    city: str = Field(max_length=20)
    days: int = Field(ge=1, le=9)


def filled(mode):
    client = instructor.from_openai(OpenAI(), mode=mode)
    asked = {"model": MODEL, "response_model": Trip, "messages": USER, "max_retries": 3}
    if mode is instructor.Mode.RESPONSES_TOOLS:
        asked["max_output_tokens"] = 300
    else:
        asked["max_tokens"] = 300
    assert isinstance(client.chat.completions.create(**asked), Trip)


@example
def tools():
    filled(instructor.Mode.TOOLS)


@example
def tools_strict():
    filled(instructor.Mode.TOOLS_STRICT)


@example
def json_schema():
    filled(instructor.Mode.JSON_SCHEMA)


@example
def responses_tools():
    filled(instructor.Mode.RESPONSES_TOOLS)


@example
def parallel_tools():
    from collections.abc import Iterable

    client = instructor.from_openai(OpenAI(), mode=instructor.Mode.TOOLS)
    found = client.chat.completions.create(
        model=MODEL, response_model=Iterable[Trip], messages=USER, max_tokens=600
    )
    assert all(isinstance(one, Trip) for one in found)


@example
def partial_stream():
    client = instructor.from_openai(OpenAI(), mode=instructor.Mode.TOOLS)
    parts = list(
        client.chat.completions.create_partial(
            model=MODEL, response_model=Trip, messages=USER, max_tokens=300
        )
    )
    assert parts[-1].days >= 1


run()
