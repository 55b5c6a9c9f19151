"""Text as it comes: pieces join to the whole, stop strings end it, characters stay whole."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsys.model import ByteTokenizer
from jaxsys.serve.http.text_stream import TextStream

TOKENIZER = ByteTokenizer()


def stream(text, stop=()):
    """The pieces put out for the bytes of `text`, up to the end or a stop string."""
    pieces = []
    source = TextStream(TOKENIZER, stop)
    for token in TOKENIZER.encode(text):
        pieces.append(source.push(token))
        if source.stopped:
            return pieces, True
    pieces.append(source.flush())
    return pieces, source.stopped


# Hypothesis tries strings that stand in our modules, special tokens among them.
@given(st.text(max_size=40).filter(lambda text: "<|" not in text))
def test_pieces_join_to_the_text(text):
    pieces, stopped = stream(text)
    assert "".join(pieces) == text and not stopped


@given(st.text(alphabet="abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4)))
def test_the_text_ends_before_the_first_stop_string(text, stops):
    pieces, stopped = stream(text, stops)
    found = [text.index(stop) for stop in stops if stop in text]
    joined = "".join(pieces)
    assert stopped == bool(found)
    if not found:
        assert joined == text
        return
    # The stop string that is complete first ends the text.
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    seen = text[: min(ends)]
    assert joined == seen[: min(seen.index(stop) for stop in stops if stop in seen)]


@pytest.mark.parametrize("text", ["naïve 日本 🙂", "🙂" * 3])
def test_no_piece_splits_a_character(text):
    pieces, _ = stream(text)
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert "".join(pieces) == text
