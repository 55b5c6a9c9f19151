"""Calls of tools: each family's form is read, whatever the cuts, and written when it must be."""

import dataclasses
import json
from typing import Any

import llguidance
import pytest
import tokenizers

from jaxsys.errors import UsageError
from jaxsys.model import ByteTokenizer
from jaxsys.serve.grammars import Grammars, of_json_schema
from jaxsys.serve.http.templates import history_forms
from jaxsys.serve.http.tool_bodies import ToolBody, tool_use
from jaxsys.serve.http.tools import FORMATS, Marks, Said, Tool, Writing, format_of, told

WEATHER = Tool(
    name="weather",
    parameters={
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer"}},
        "required": ["city"],
        "additionalProperties": False,
        "$defs": {"city": {"type": "string", "maxLength": 12}},
    },
    source={},
)
CLOCK = Tool(name="clock", parameters={"type": "object", "properties": {}}, source={})
TEMPLATES = {
    "hermes": "tools <tool_call>",
    "llama3": "tools <|python_tag|>",
    "mistral": "tools [TOOL_CALLS][ARGS]",
    "nemo": "tools [TOOL_CALLS]",
    "harmony": "tools <|channel|><|message|>",
    "deepseek": "tools <｜tool▁call▁begin｜>",
    "deepseek-v3": "tools <｜tool▁call▁begin｜> ```json",
}
ROME, OSLO = '{"city": "Rome {\\"}", "days": 2}', '{"city": "Oslo"}'
WRITTEN = {
    "hermes": f'Let me look.\n<tool_call>\n{{"name": "weather", "arguments": {ROME}}}\n'
    f'</tool_call>\n<tool_call>\n{{"name": "weather", "arguments": {OSLO}}}\n</tool_call>',
    "llama3": f'{{"name": "weather", "parameters": {ROME}}}; '
    f'{{"name": "weather", "parameters": {OSLO}}}',
    "mistral": f"Let me look.[TOOL_CALLS]weather[ARGS]{ROME}[TOOL_CALLS]weather[CALL_ID]"
    f"abcdefghi[ARGS]{OSLO}",
    "nemo": f'[TOOL_CALLS][{{"name": "weather", "arguments": {ROME}, "id": "abcdefghi"}}, '
    f'{{"name": "weather", "arguments": {OSLO}, "id": "abcdefghj"}}]',
    "harmony": "<|channel|>analysis<|message|>Which city?<|end|><|start|>assistant<|channel|>"
    f"commentary to=functions.weather <|constrain|>json<|message|>{ROME}<|call|>"
    f"<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{OSLO}",
    "deepseek": "Let me look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
    f"{ROME}<｜tool▁call▁end｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{OSLO}<｜tool▁call▁end｜>"
    "<｜tool▁calls▁end｜>",
    "deepseek-v3": "Let me look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>"
    f"weather\n```json\n{ROME}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function"
    f"<｜tool▁sep｜>weather\n```json\n{OSLO}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
}


def read(family, text, size, thinking: Any = "no", tools=(WEATHER, CLOCK)):
    """An answer that comes in pieces of `size` characters; checks how the parts arrive."""
    reader = format_of(TEMPLATES[family]).reader(tools, thinking)
    whole, begun = Said(), []
    for at in range(0, len(text), size):
        part = reader.push(text[at : at + size])
        for call in part.calls:
            assert (call.name is not None) == (call.index not in begun)
            if call.name is not None:
                assert call.index == len(begun)
                begun.append(call.index)
        whole.add(part)
    whole.add(reader.close())
    return whole


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("family", WRITTEN)
def test_calls_are_read(family, size):
    said = read(family, WRITTEN[family], size)
    assert [(call.index, call.name, call.arguments) for call in said.calls] == [
        (0, "weather", ROME),
        (1, "weather", OSLO),
    ]
    assert said.content == ("Let me look." if "Let me look." in WRITTEN[family] else "")
    assert said.reasoning == ("Which city?" if family == "harmony" else "")


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize("family", WRITTEN)
@pytest.mark.parametrize(
    "text", ["Two <b> words [1] {2}. ", '{"a": [1, 2]} is JSON', "<tool", "[", "", '{"name": 1}']
)
def test_what_is_no_call_stays_as_it_is(family, text, size):
    said = read(family, text, size)
    assert said.content == text and not said.calls and not said.reasoning


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_reasoning_stands_apart(size):
    text = "<think>\nIs it 3 < 4?\n</think>\n\nYes.\n"
    said = read("hermes", text, size, "may")
    assert (said.reasoning, said.content) == ("Is it 3 < 4?", "Yes.\n")
    said = read("hermes", text.removeprefix("<think>\n"), size, "open")
    assert (said.reasoning, said.content) == ("Is it 3 < 4?", "Yes.\n")
    final = "<|channel|>final<|message|>Yes.\n"
    said = read(
        "harmony", "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant" + final, size
    )
    assert (said.reasoning, said.content) == ("Hm", "Yes.\n")


def test_calls_in_another_order_and_broken_ones():
    odd = '<tool_call>{"arguments": {"a": 1}, "name": "clock"}</tool_call>'
    for size in (1, 1000):
        (call,) = read("hermes", odd, size).calls
        assert (call.name, json.loads(call.arguments)) == ("clock", {"a": 1})
        broken = "<tool_call>{name: clock}</tool_call>"
        assert read("hermes", broken, size).content == broken
    # A length ends the answer within the arguments: what there is was passed on.
    (call,) = read("hermes", WRITTEN["hermes"][:70], 2).calls
    assert ROME.startswith(call.arguments) and call.arguments
    unknown = '{"name": "other", "parameters": {}}'
    assert read("llama3", unknown, 2).content == unknown


@pytest.mark.parametrize("family", WRITTEN)
def test_a_call_that_breaks_off_is_not_whole(family):
    text = call_of(family, OSLO)
    for cut in (text, text[: text.index("Os")]):
        reader = FORMATS[format_of(TEMPLATES[family]).name].reader([WEATHER], "no")
        for character in cut:
            reader.push(character)
        reader.close()
        assert reader.whole == (cut == text)


@pytest.mark.parametrize("family", WRITTEN)
def test_a_call_that_must_be_made_and_breaks_off_is_no_text(family):
    """Wherever it does: half a mark, a name, the rest of an object."""
    text = call_of(family, OSLO)
    for end in range(len(text) + 1):
        reader = FORMATS[format_of(TEMPLATES[family]).name].reader([WEATHER], "no")
        reader.must_call = True
        said = [reader.push(character).content for character in text[:end]]
        assert "".join([*said, reader.close().content]).strip() == "", text[:end]


def test_special_tokens_that_say_nothing_are_dropped():
    reader = FORMATS["hermes"].reader([WEATHER], "no")
    assert not reader.push("<|im_end|>", special=True)
    assert reader.push("<|im_end|>").content == "<|im_end|>"


def test_thinking_goes_by_the_prompt():
    form, template = FORMATS["hermes"], "x <think> y"
    assert form.thinking("no such word", "<think>") == "no"
    assert form.thinking(template, "a<think>b</think>c\nassistant\n") == "may"
    assert form.thinking(template, "assistant\n<think>\n") == "open"
    assert form.thinking(template, "assistant\n<think>\n\n</think>\n\n") == "no"


def vocabulary(family):
    """Bytes, and the marks of a family as tokens."""
    tokenizer = ByteTokenizer()
    marks = format_of(TEMPLATES[family]).reader([], "no").marks
    special = family not in ("hermes",)
    for mark in (*marks, "<think>", "</think>"):
        tokenizer.backend.add_tokens(
            [tokenizers.AddedToken(mark, special=special, normalized=False)]
        )
    return tokenizer


def admits(tokenizer, grammar, text):
    """Whether a grammar admits a text, all of it."""
    tokens = tokenizers.Tokenizer.encode(tokenizer.backend, text).ids
    count = tokenizer.backend.get_vocab_size()
    built = llguidance.LLTokenizer(tokenizer.backend.to_str(), n_vocab=count, eos_token=256)
    matcher = llguidance.LLMatcher(built, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def call_of(family, arguments):
    """One call as a family writes it."""
    return {
        "hermes": f'<tool_call>\n{{"name": "weather", "arguments": {arguments}}}\n</tool_call>',
        "llama3": f'{{"name": "weather", "parameters": {arguments}}}',
        "mistral": f"[TOOL_CALLS]weather[ARGS]{arguments}",
        "nemo": f'[TOOL_CALLS][{{"name": "weather", "arguments": {arguments}, "id": "abcdefghi"}}]',
        "harmony": "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
        + arguments,
        "deepseek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
        f"{arguments}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "deepseek-v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n"
        f"```json\n{arguments}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    }[family]


@pytest.mark.parametrize("family", WRITTEN)
def test_calls_that_must_be_are_written_in_the_familys_form(family):
    form, tokenizer = format_of(TEMPLATES[family]), vocabulary(family)
    template = TEMPLATES[family]

    def grammar(thinking: Any = "no", **fields):
        writing = Writing(**{"tools": [WEATHER, CLOCK], "many": True, "needed": True} | fields)
        made = form.grammar(Marks(tokenizer), writing, thinking, template)
        assert made is not None
        Grammars(tokenizer, tokenizer.backend.get_vocab_size()).prepare(made)
        return made

    good = call_of(family, OSLO)
    assert admits(tokenizer, grammar(), good)
    assert not admits(tokenizer, grammar(), call_of(family, '{"city": 3}'))
    assert not admits(tokenizer, grammar(), call_of(family, OSLO).replace("weather", "other"))
    assert not admits(tokenizer, grammar(), "Hello")
    assert read(family, good, 1).calls[0].arguments == OSLO
    for many, behind in ((False, ""), (True, "\n\n")):  # blanks cannot run on behind a call
        follower = Grammars(tokenizer, tokenizer.backend.get_vocab_size()).begin(grammar(many=many))
        follower.follow(tokenizers.Tokenizer.encode(tokenizer.backend, good).ids)
        assert follower.ended or many
        if behind:
            with pytest.raises(ValueError, match="cannot be followed"):
                follower.follow([0] * follower.count + [10] * len(behind))
    strict = dataclasses.replace(WEATHER, strict=True)
    free = Writing(tools=[strict, CLOCK], many=False, needed=False)
    kept = form.grammar(Marks(tokenizer), free, "no", template)
    if form.opening is None:
        assert kept is None
    else:
        assert kept is not None and admits(tokenizer, kept, "Hello")
        assert admits(tokenizer, kept, f"Let me look.{good}") and admits(tokenizer, kept, good)
        assert not admits(tokenizer, kept, "Let me look." + call_of(family, '{"city": 3}'))
        loose = Writing(tools=[WEATHER], many=True, needed=False)
        assert form.grammar(Marks(tokenizer), loose, "no", template) is None
        bytes_only = Marks(ByteTokenizer())  # where the mark is no token, nothing is kept
        assert form.grammar(bytes_only, free, "no", template) is None
    either = grammar(needed=False, answer=of_json_schema({"const": 7}))
    answer = "<|channel|>final<|message|>7" if family == "harmony" else "7"
    assert admits(tokenizer, either, good) and admits(tokenizer, either, answer)
    assert not admits(tokenizer, either, answer.replace("7", "8"))
    if family != "harmony":
        assert admits(tokenizer, grammar("open"), f"hm</think>\n{good}")
        assert admits(tokenizer, grammar("may"), f"<think>hm</think>\n{good}")
        assert admits(tokenizer, grammar("may"), good)
    else:
        thought = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
        assert admits(tokenizer, grammar(), thought + good)


def test_formats_go_by_templates():
    for family, template in TEMPLATES.items():
        assert format_of(template).name == {"nemo": "mistral", "deepseek-v3": "deepseek"}.get(
            family, family
        )
    assert format_of(None).name == format_of("<|im_start|>").name == "plain"
    assert format_of("tools <tool_call>", "llama3").name == "llama3"
    with pytest.raises(UsageError, match="hermes"):
        format_of(None, "gpt")


def test_a_template_without_tools_is_told_in_words():
    call = {"id": "1", "function": {"name": "clock", "arguments": {}}}
    found = told(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Time?"},
            {"role": "assistant", "content": "", "tool_calls": [call, call]},
            {"role": "tool", "content": "9", "tool_call_id": "1"},
            {"role": "tool", "content": "10", "tool_call_id": "2"},
        ],
        [{"function": {"name": "clock"}}],
    )
    assert [one["role"] for one in found] == ["system", "user", "assistant", "user"]
    assert found[0]["content"].startswith("Be brief.") and '"clock"' in found[0]["content"]
    assert len(read("hermes", found[2]["content"], 1).calls) == 2
    assert found[3]["content"].count("<tool_response>") == 2
    assert all(set(one) == {"role", "content"} for one in found)


def test_histories_come_in_the_forms_that_templates_want():
    call = {"id": "call_1", "function": {"name": "clock", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "9", "tool_call_id": "call_1"},
    ]
    objects, texts = history_forms(messages, 9)
    assert objects[0]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert objects[0]["content"] == "" and texts[0]["content"] is None
    assert texts[0]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'
    name = objects[0]["tool_calls"][0]["id"]
    assert len(name) == 9 and objects[1]["tool_call_id"] == name
    assert history_forms(messages)[0][1]["tool_call_id"] == "call_1"


def test_what_is_asked_of_tools():
    tools = [ToolBody.model_validate({"type": "function", "function": {"name": "clock"}})]
    assert not tool_use(None, None, None).tools and not tool_use([], "auto", None).tools
    assert not tool_use(tools, "none", None).tools
    auto = tool_use(tools, None, False)
    assert not auto.needed and not auto.many and auto.callable == auto.tools
    assert tool_use(tools, "required", None).needed
    for choice in ({"type": "function", "function": {"name": "clock"}}, {"name": "clock"}):
        assert [one.name for one in tool_use(tools, choice, None).callable] == ["clock"]
    for choice, says in [
        ("required", "needs tools"),
        ({"type": "function", "function": {"name": "other"}}, "other"),
        ("sometimes", "tool_choice"),
        (3, "tool_choice"),
        ({"type": "allowed_tools"}, "tool_choice"),
    ]:
        with pytest.raises(UsageError, match=says):
            tool_use([] if choice == "required" else tools, choice, None)
    with pytest.raises(UsageError, match="two tools"):
        tool_use(tools * 2, None, None)
