"""The quick way that most of a stream is written: the same bytes as the usual one."""

import pytest

from jaxsys.model import ByteTokenizer
from jaxsys.serve.http.answers import ChatShape, Choice, CompletionShape, event
from jaxsys.serve.http.response_shape import ResponseShape
from jaxsys.serve.http.text_stream import TextStream
from jaxsys.serve.http.tools import CallPart, Said
from jaxsys.serve.http.vocabulary import Vocabulary

TEXTS = ["a", "", 'it said "no"\n\t\\', "é\u2028\x00😀", "half \ud83d of a pair"]


@pytest.mark.parametrize("shape", [CompletionShape, ChatShape])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("reason", [None, "stop", "length"])
@pytest.mark.parametrize("said", [None, "plain", "called"])
def test_a_line_is_what_the_increment_comes_to(shape, text, reason, said):
    one = shape('a "model"', Vocabulary(ByteTokenizer()), False)
    apart = None if said is None else Said(content=text)
    choice = Choice(3, text, [], reason, said=apart, called=said == "called")
    (usual,) = one.increments(choice)
    assert one.line(choice) == event(usual)


def test_what_is_more_than_text_is_written_the_usual_way():
    vocabulary = Vocabulary(ByteTokenizer())
    call = CallPart(index=0, name="f", arguments="")
    for said in (Said(reasoning="hm"), Said(calls=[call])):
        assert ChatShape("m", vocabulary, False).line(Choice(0, "", [], said=said)) is None
    for shape in (ChatShape, CompletionShape):
        assert shape("m", vocabulary, True).line(Choice(0, "a", [])) is None
        assert shape("m", vocabulary, False).line(Choice(0, "a", [], prompt=[(1, None)])) is None
    assert ResponseShape.line is CompletionShape.__mro__[1].line


@pytest.mark.parametrize("stop", [(), ("never",)])
def test_plain_tokens_are_what_they_are_among_others(stop):
    """A stop string takes the way that looks at everything."""
    data = "plain é text 😀 and \x00 more".encode() + b"\xf0\x9f x \xc3"
    stream = TextStream(ByteTokenizer(), stop, prompt=list("ü".encode()[:1]))
    pushed = [stream.push(token) for token in data]
    text = "".join([*pushed, stream.flush()])
    spoken = stream.take()
    assert text == "".join(one.text for one in spoken)
    assert text.startswith("plain é text 😀 and \x00 more") and text.endswith(" x \ufffd")
    assert b"".join(one.data for one in spoken) == data
    assert [one.first for one in spoken].count(True) == 0
