"""Texts, bytes, offsets and ends of answers, over models whose outputs are written down."""

import json

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, processors

from jaxsys.model import ByteTokenizer
from jaxsys.model.tokenizer import Tokenizer

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SPECIAL = 260  # <|reserved_0|>: a special token that ends nothing by itself


def sentencepiece():
    """A tokenizer as Llama 2 has it: spaces are parts of pieces, and unknown letters are bytes."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    for letter in "▁abcdefghijklmnopqrstuvwxyz":
        vocabulary[letter] = len(vocabulary)
    merges = []
    for word in ("▁true", "true", "▁no"):
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(
        [tokenizers.AddedToken(text, special=True, normalized=False) for text in ("<s>", "</s>")]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return Tokenizer(backend, bos_id=1, eos_ids=[2])


@pytest.fixture(scope="module")
def words(scripted):
    """After anything: " true", then "true", " no" and the letter "t" as a byte."""
    tokenizer = sentencepiece()
    logits = {"▁true": 9.0, "true": 8.0, "▁no": 7.0, "t": 6.0, "<0x74>": 5.5}
    logits = {tokenizer.backend.token_to_id(word): value for word, value in logits.items()}
    return scripted(tokenizer, lambda _: logits)


@pytest.fixture(scope="module")
def letters(scripted):
    """a b c <special> a b c ...; after anything else, a."""
    order = [97, 98, 99, SPECIAL]

    def logits_of(token):
        return {order[(order.index(token) + 1) % 4] if token in order else 97: 20.0}

    return scripted(ByteTokenizer(), logits_of)


@pytest.fixture(scope="module")
def halves(scripted):
    """The bytes of "é€" again and again; beside each, three bytes that are no character."""
    order = list("é€".encode())

    def logits_of(token):
        place = order.index(token) + 1 if token in order else 0
        return {0xF0: 7.0, 0x80: 6.5, 0xFF: 6.0} | {order[place % len(order)]: 9.0}

    return scripted(ByteTokenizer(), logits_of)


def test_a_completion_goes_on_from_the_prompt(words):
    body = {"prompt": "no", "max_tokens": 2, "temperature": 0}
    assert words.post(COMPLETIONS, body).json()["choices"][0]["text"] == " true true"
    parts = [part["choices"][0]["text"] for part in words.stream(COMPLETIONS, body)]
    assert parts == [" true", " true"]
    ended = words.post(COMPLETIONS, body | {"stop": [" true"]}).json()["choices"][0]
    assert ended["text"] == "" and ended["finish_reason"] == "stop"
    echoed = words.post(COMPLETIONS, body | {"echo": True}).json()["choices"][0]
    assert echoed["text"] == "no true true"
    # Where nothing stands before it, the first piece has no space.
    first = words.post(COMPLETIONS, body | {"prompt": [1]}).json()["choices"][0]
    assert first["text"] == "true true"


@pytest.mark.parametrize("prompt", ["no", [1]])
def test_tokens_join_and_no_alternative_is_lost(words, prompt):
    body = {"prompt": prompt, "max_tokens": 3, "temperature": 0, "logprobs": 5, "echo": False}
    choice = words.post(COMPLETIONS, body).json()["choices"][0]
    beside = choice["logprobs"]
    assert "".join(beside["tokens"]) == choice["text"]
    for token, value, top in zip(
        beside["tokens"], beside["token_logprobs"], beside["top_logprobs"], strict=True
    ):
        assert len(top) == 5 and top[token] == value == max(top.values())
    lengths = [0, *map(len, beside["tokens"])]
    assert beside["text_offset"] == [sum(lengths[: at + 1]) for at in range(3)]
    parts = [part["choices"][0] for part in words.stream(COMPLETIONS, body)]
    offsets = [offset for part in parts for offset in part["logprobs"]["text_offset"]]
    assert offsets == beside["text_offset"]


def test_bytes_of_half_characters_are_those_bytes(halves):
    messages = [{"role": "user", "content": "a"}]
    body = {"messages": messages, "max_tokens": 7, "temperature": 0}
    body |= {"logprobs": True, "top_logprobs": 4}
    choice = halves.post(CHAT, body).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[byte] for byte in ("é€" + "é").encode()]
    assert "".join(entry["token"] for entry in content) == choice["message"]["content"] == "é€é"
    assert {bytes(one["bytes"]) for one in content[0]["top_logprobs"]} == {
        b"\xc3",
        b"\xf0",
        b"\x80",
        b"\xff",
    }
    body = {"prompt": "a", "max_tokens": 5, "temperature": 0, "logprobs": 4}
    beside = halves.post(COMPLETIONS, body).json()["choices"][0]["logprobs"]
    assert "".join(beside["tokens"]) == "é€"
    assert all(len(top) == 4 for top in beside["top_logprobs"])
    # A character that ends half way is put out as such, once.
    cut = halves.post(COMPLETIONS, body | {"max_tokens": 3}).json()["choices"][0]
    assert cut["text"] == "".join(cut["logprobs"]["tokens"]) == "é\N{REPLACEMENT CHARACTER}"
    # One that the prompt began is the answer's.
    begun = {"prompt": [97, 0xC3], "max_tokens": 1, "temperature": 0}
    assert halves.post(COMPLETIONS, begun).json()["choices"][0]["text"] == "é"


def counted(server, name):
    """The values of a metric, by its labels."""
    lines = server.ask("GET", "/metrics").text.splitlines()
    return {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in lines
        if line.startswith(name) and "_created" not in line
    }


@pytest.mark.parametrize(
    ("more", "text", "tokens"),
    [
        ({"stop": ["c"]}, "ab", 3),
        ({"stop": ["<|reserved_0|>"]}, "abc", 4),
        ({"stop": ["c<|reserved_0|>a"]}, "ab", 5),
        ({"stop": ["c"], "include_stop_str_in_output": True}, "abc", 3),
        (
            {"stop": ["<|reserved_0|>"], "include_stop_str_in_output": True},
            "abc<|reserved_0|>",
            4,
        ),
        ({"stop_token_ids": [98]}, "a", 2),
        ({"stop_token_ids": [98], "include_stop_str_in_output": True}, "ab", 2),
        ({"stop": ["b"], "min_tokens": 3}, "abca", 6),
        ({"stop": ["ca"], "min_tokens": 2}, "ab", 5),
        ({"stop": ["<|reserved_0|>"], "skip_special_tokens": False}, "abc", 4),
    ],
)
def test_where_an_answer_ends(letters, caplog, more, text, tokens):
    """What the client is told is what is counted; nothing computed ahead is."""
    caplog.set_level("INFO", logger="jaxsys.serve.http.choice_run")
    before = counted(letters, "jaxsys_")
    body = {"prompt": "x", "max_tokens": 12, "temperature": 0} | more
    answer = letters.post(COMPLETIONS, body).json()
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == (text, "stop")
    assert answer["usage"]["completion_tokens"] == tokens
    letters.idle()
    now = counted(letters, "jaxsys_")
    name = 'jaxsys_requests_total{finish_reason="%s"}'
    assert now[name % "stop"] == before.get(name % "stop", 0) + 1
    assert not now.get(name % "abort") and not now.get(name % "length")
    output = "jaxsys_output_tokens_total"
    assert now[output] == before.get(output, 0) + tokens
    (logged,) = [record for record in caplog.records if record.message == "request"]
    assert (logged.output_tokens, logged.finish_reason) == (tokens, "stop")  # type: ignore
    parts = letters.stream(COMPLETIONS, body)
    assert "".join(part["choices"][0]["text"] for part in parts) == text
    letters.idle()


def test_an_answer_has_its_least_length(scripted):
    """b would end the answer at once; before the third token it cannot be chosen."""
    server = scripted(ByteTokenizer(), lambda _: {98: 9.0, 99: 8.0})
    body = {"prompt": "x", "max_tokens": 8, "temperature": 0, "stop_token_ids": [98]}
    assert server.post(COMPLETIONS, body).json()["choices"][0]["text"] == ""
    body |= {"min_tokens": 2, "logprobs": 2}
    choice = server.post(COMPLETIONS, body).json()["choices"][0]
    assert choice["text"] == "cc" and choice["finish_reason"] == "stop"
    json.dumps(choice, allow_nan=False)


@pytest.mark.parametrize(
    ("more", "prompt_tokens", "text"),
    [
        ({}, 6, "ca"),
        ({"truncate_prompt_tokens": 2}, 2, "ca"),
        ({"truncate_prompt_tokens": -1, "max_tokens": 126, "stop": ["b"]}, 2, "ca"),
        ({"max_completion_tokens": 1}, 6, "c"),
        ({"skip_special_tokens": False}, 6, "c<|reserved_0|>a"),
    ],
)
def test_fields_of_peers_are_kept(letters, more, prompt_tokens, text):
    body = {"prompt": "xxxxab", "max_tokens": 3, "temperature": 0} | more
    answer = letters.post(COMPLETIONS, body).json()
    assert answer["usage"]["prompt_tokens"] == prompt_tokens
    assert answer["choices"][0]["text"] == text


def test_a_chat_goes_on_where_its_last_message_ends(letters):
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a"}]
    body = {"messages": messages, "max_tokens": 2, "temperature": 0}

    def asked(**more):
        answer = letters.post(CHAT, body | more).json()
        return answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"]

    text, tokens = asked(continue_final_message=True)
    assert text == "bc"
    # <|im_end|> and a new line behind the message, and "<|im_start|>assistant\n" behind those
    assert asked(add_generation_prompt=False)[1] == tokens + 2
    assert asked()[1] == tokens + 2 + 11
    both = letters.post(
        CHAT, body | {"continue_final_message": True, "add_generation_prompt": True}
    )
    assert both.status_code == 400 and "exclude each other" in both.json()["error"]["message"]


@pytest.mark.parametrize(
    "field",
    [
        {"tool_choice": "required"},
        {"guided_forms": {"type": "object"}},
        {"structured_outputs": {"structural_tag": "z"}},
        {"response_format": {"type": "xml"}},
        {"chat_template": "{{ 'z' }}"},
        {"modalities": ["audio"]},
        {"best_of": 2},
        {"use_beam_search": True},
        {"bad_words": ["a"]},
        {"length_penalty": 0.5},
        {"reasoning_effort": "low"},
    ],
)
def test_fields_that_would_change_the_answer_are_refused_by_name(letters, field):
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    answer = letters.post(CHAT, body | field)
    assert answer.status_code == 400
    assert next(iter(field)) in answer.json()["error"]["message"]


def test_fields_that_say_what_is_so_anyway_are_taken(letters):
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "tools": []}
    body |= {"tool_choice": "auto", "response_format": {"type": "text"}, "best_of": 1}
    body |= {"length_penalty": 1.0, "use_beam_search": False, "modalities": ["text"]}
    body |= {"guided_json": None, "suffix": "", "service_tier": "auto", "parallel_tool_calls": True}
    assert letters.post(CHAT, body).status_code == 200
