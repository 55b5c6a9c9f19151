"""Tokenizers: bytes, streaming without split characters, chat templates, bad input."""

import concurrent.futures
import functools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsys.errors import UsageError
from jaxsys.model import ByteTokenizer, Tokenizer
from jaxsys.model.chat import render_chat
from jaxsys.model.shapes import BYTE_VOCABULARY

BYTES = ByteTokenizer()
TEXT = st.text(st.characters(codec="utf-8"))


def test_every_byte_is_its_own_id():
    assert BYTES.vocab_size == BYTE_VOCABULARY
    assert BYTES.encode("aé\n") == [97, 0xC3, 0xA9, 10]
    assert BYTES.encode("a<|im_end|>b") == [97, 258, 98]
    assert BYTES.decode([97, 258, 98]) == "ab"
    assert BYTES.decode([97, 258, 98], skip_special=False) == "a<|im_end|>b"
    assert BYTES.eos_ids == (256, 258)


@settings(max_examples=100, deadline=None)
@given(TEXT)
def test_shortcut_and_library_agree_and_round_trip(text):
    ids = BYTES.encode(text)
    assert ids == Tokenizer.encode(BYTES, text)
    assert BYTES.decode(ids) == text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, BYTE_VOCABULARY - 1)) | TEXT.map(BYTES.encode))
def test_streamed_pieces_join_to_the_whole(ids):
    stream = BYTES.stream()
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == BYTES.decode(ids)


def test_a_long_text_lets_other_threads_run():
    text = "hello wörld <|im_end|>" * 40_000
    encode = functools.partial(Tokenizer.encode, BYTES)
    ticks = 0
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        ids = pool.submit(encode, text)
        while not ids.done():
            time.sleep(0.001)
            ticks += 1
        assert ids.result() == encode(text[:22]) * 40_000
    assert ticks > 20  # 2 where the interpreter is held


def test_a_character_comes_only_when_whole():
    stream = BYTES.stream()
    pieces = [stream.push(byte) for byte in "é😀".encode()]
    assert pieces == ["", "é", "", "", "", "😀"]
    assert [stream.push(0xF0), stream.push(0x9F), stream.flush()] == ["", "", "\ufffd"]
    assert [stream.push(97), stream.flush()] == ["a", ""]


def test_half_a_surrogate_pair_is_refused():
    for encode in (BYTES.encode, lambda text: Tokenizer.encode(BYTES, text)):
        with pytest.raises(UsageError, match=r"holds '\\ud83d' at 2, half of a surrogate pair"):
            encode("ab\ud83d")


def test_chat_in_chatml():
    messages = [{"role": "user", "content": "Hi"}]
    text = BYTES.apply_chat_template(messages)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert BYTES.encode_chat(messages)[:2] == [257, ord("u")]
    ended = BYTES.apply_chat_template(messages, add_generation_prompt=False)
    assert ended == "<|im_start|>user\nHi<|im_end|>\n"


def test_templates_see_what_transformers_gives_them():
    template = (
        "{{ bos_token }}\n"
        "  {% for m in messages %}\n"
        "{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}"
        "{{ strftime_now('%%') }}"
    )
    text = render_chat(
        template,
        [{"role": "user", "content": "é"}, {"role": "user", "content": "no"}],
        special_tokens={"bos_token": "<s>"},
    )
    assert text == '<s>\n{"role": "user", "content": "é"}%'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "refuses these messages"),
        ("{{ messages[0]['content'] + 1 }}", "refuses these messages"),
        ("{{ messages.append(1) }}", "unsafe|not safe|refuses"),
        ("{{ ''.__class__.__mro__ }}", "refuses these messages"),
    ],
)
def test_a_template_that_refuses_is_a_usage_error(template, message):
    with pytest.raises(UsageError, match=message):
        render_chat(template, [{"role": "user", "content": "x"}])


def test_without_a_template_there_is_no_chat():
    plain = Tokenizer(BYTES.backend)
    with pytest.raises(UsageError, match="no chat template; use plain completions"):
        plain.apply_chat_template([])


@pytest.mark.parametrize(
    ("template", "text"),
    [
        # SmolLM3 and others mark what the assistant says.
        (
            "{% for m in messages %}{% generation %}{{m.content}};{% endgeneration %}{% endfor %}",
            "x;y;",
        ),
        (
            "{% set n = 'x' %}{% generation %}{% set n = 'z' %}{{ n }}{% endgeneration %}{{ n }}",
            "zx",
        ),
        (
            "{{ {'b': 'é', 'a': 1} | tojson(sort_keys=true, separators=(',', ':')) }}",
            '{"a":1,"b":"é"}',
        ),
        ("{{ 'é' | tojson(ensure_ascii=true) }}", '"\\u00e9"'),
        ("{{ [1] | tojson(indent=1) }}", "[\n 1\n]"),
        ("{{ messages[0].reasoning_content }}{{ messages[0].thinking }}", "hmhm"),
    ],
)
def test_what_templates_of_published_models_use(template, text):
    messages = [{"role": "user", "content": "x", "reasoning": "hm"}, {"role": "a", "content": "y"}]
    assert render_chat(template, messages) == text
