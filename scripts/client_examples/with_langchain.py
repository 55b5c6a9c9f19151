"""langchain-openai: chats, streams, tools, structured output both ways, embeddings."""

# pyright: reportMissingImports=false
from examples import MODEL, QUESTION, example, run
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

chat_model = ChatOpenAI(model=MODEL, max_tokens=300)


class Trip(BaseModel):
    """A trip to a city."""

    city: str = Field(max_length=20)
    days: int = Field(ge=1, le=9)


@example
def chat():
    answer = chat_model.invoke(QUESTION)
    assert answer.content and answer.usage_metadata["output_tokens"]


@example
def stream():
    assert "".join(part.content for part in chat_model.stream(QUESTION))


@example
def tools():
    bound = chat_model.bind_tools([Trip], tool_choice="required")
    message = bound.invoke(QUESTION)
    call = message.tool_calls[0]
    assert call["name"] == "Trip" and call["args"]["city"] is not None
    history = [HumanMessage(QUESTION), message]
    history += [ToolMessage("sunny", tool_call_id=one["id"]) for one in message.tool_calls]
    assert chat_model.bind_tools([Trip]).invoke(history) is not None
    whole = None
    for part in bound.stream(QUESTION):
        whole = part if whole is None else whole + part
    assert whole is not None and whole.tool_calls[0]["args"]["days"] >= 1


@example
def structured_by_schema():
    assert isinstance(chat_model.with_structured_output(Trip).invoke(QUESTION), Trip)


@example
def structured_by_function():
    form = chat_model.with_structured_output(Trip, method="function_calling")
    assert isinstance(form.invoke(QUESTION), Trip)


@example
def responses():
    turns = ChatOpenAI(model=MODEL, max_tokens=200, use_responses_api=True)
    assert turns.invoke(QUESTION).content
    assert list(turns.stream(QUESTION))


@example
def embeddings():
    # Texts, since token ids would be those of another tokenizer.
    made = OpenAIEmbeddings(model=MODEL, check_embedding_ctx_length=False)
    assert len(made.embed_documents(["a cat", "a dog"])) == 2


run()
