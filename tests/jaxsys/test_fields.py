"""What files of others may cost and hold: bounds before values take memory, types with names."""

import json
from dataclasses import dataclass
from enum import StrEnum

import pytest

from jaxsys.errors import UsageError
from jaxsys.fields import Fields, read_fields
from jaxsys.files import parse_json, read_bytes, read_lines, shown


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, kw_only=True)
class Pen:
    colour: Colour
    width: float
    count: int = 1
    maker: str | None = None

    def __post_init__(self):
        if self.width <= 0:
            raise ValueError(f"width={self.width} must be above 0")


def fields(value, **more):
    return Fields(value, name="pens p.json", **more)


def test_a_record_is_made_of_values_of_its_types():
    pen = fields({"colour": "blue", "width": 2, "maker": None}).record(Pen)
    assert pen == Pen(colour=Colour.BLUE, width=2.0)
    assert type(pen.width) is float and pen.colour is Colour.BLUE


@pytest.mark.parametrize(
    "value, says",
    [
        ({"width": 1}, "its field 'colour' is missing"),
        ({"colour": "green", "width": 1}, "'colour' is 'green', and must be one of red, blue"),
        ({"colour": "red", "width": "1"}, "'width' is '1', and must be a finite number"),
        ({"colour": "red", "width": float("nan")}, "'width' is nan, and must be a finite number"),
        ({"colour": "red", "width": 1, "count": 1.0}, "'count' is 1.0, and must be a whole"),
        ({"colour": "red", "width": 1, "count": True}, "'count' is True, and must be a whole"),
        ({"colour": "red", "width": 1, "count": 10**30}, "and must be a whole number"),
        ({"colour": "red", "width": 1, "count": None}, "'count' is None, and must be a whole"),
        ({"colour": "red", "width": 1, "length": 1}, "'length' is not known; known: colour, width"),
        ({"colour": "red", "width": 0}, "width=0.0 must be above 0"),
        ({"colour": ["red"], "width": 1}, "'colour' is ['red'], and must be one of"),
    ],
)
def test_a_fault_names_file_field_value_and_rule(value, says):
    with pytest.raises(UsageError) as error:
        fields(value, hint="buy another").record(Pen)
    assert str(error.value).startswith("pens p.json: ") and says in str(error.value)
    assert str(error.value).endswith("; buy another") and "\n" not in str(error.value)


def test_inner_fields_are_named_from_the_top():
    file = fields({"box": {"pens": [{"count": 1}, {"count": "2"}]}})
    with pytest.raises(UsageError, match=r"its field 'box.pens\[1\].count' is '2'"):
        [pen.integer("count") for pen in file.fields("box").objects("pens")]
    with pytest.raises(UsageError, match="its field 'box.pens' is .*, and must be a string"):
        file.fields("box").text("pens")
    with pytest.raises(UsageError, match="its field 'pens' is missing"):
        file.objects("pens")
    assert file.integer("absent", 3) == 3 and "absent" not in file


def test_absent_and_null_take_the_default_but_another_type_does_not():
    file = fields({"null": None, "text": "1"})
    assert file.number("null", 2.5) == file.number("absent", 2.5) == 2.5
    with pytest.raises(UsageError, match="must be a finite number"):
        file.number("text", 2.5)
    with pytest.raises(UsageError, match="'null' is None, and must be true or false"):
        file.flag("null")


@pytest.mark.parametrize(
    "text, says",
    [
        (b"{", "it is not JSON: "),
        (b"\xff", "it is not JSON: byte 0 is not UTF-8"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested deeper than 64 levels"),
        (b"[" * 70 + b"]" * 70, "nested deeper than 64 levels"),
        (b"[" + b"{}," * 300_000 + b"{}]", "300002 objects and arrays"),
        (b"[" + b"0," * 2_100_000 + b"0]", "2100000 commas"),
        (b'{"a": 1' + b"0" * 4000 + b"}", "a whole number of 4001 digits"),
        (b'{"a": 1' + b"0" * 9000 + b"}", "a whole number of 9001 digits"),
        (rb'{"a": "\ud800"}', "half of a surrogate pair"),
        (rb'{"\udc00": 1}', "half of a surrogate pair"),
    ],
)
def test_json_beyond_what_can_be_meant_is_one_line(text, says):
    with pytest.raises(UsageError, match=says) as error:
        parse_json(text, name="it")
    assert len(str(error.value)) < 200 and "\n" not in str(error.value)


def test_json_that_looks_odd_but_is_right_is_read():
    assert parse_json(r'{"a": "\ud83d\ude00"}', name="it") == {"a": "\N{GRINNING FACE}"}
    assert parse_json(b"[" * 64 + b"]" * 64, name="it")
    longest = 1000000000000000019884624838656  # of tokenizers that have no longest text
    assert parse_json(json.dumps({"a": longest}), name="it") == {"a": longest}
    with pytest.raises(UsageError, match="holds the key 'a' twice"):
        parse_json('{"a": 1, "a": 2}', name="it", unique=True)


def test_no_more_is_read_than_is_allowed(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"12345678")
    assert read_bytes(path, most_bytes=8) == b"12345678"
    with pytest.raises(UsageError, match="plan .*f is larger than 7 bytes"):
        read_bytes(path, what="plan", most_bytes=7)
    with pytest.raises(UsageError, match="/dev/zero is larger than 100 bytes"):
        read_bytes("/dev/zero", most_bytes=100)
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        read_bytes(tmp_path)
    with pytest.raises(UsageError, match="cannot be read: .*null"):
        read_bytes("a\0b")
    with pytest.raises(UsageError, match="line 1 is longer than 7 bytes"):
        list(read_lines(path, most_bytes=7))
    path.write_bytes(b"a\r\n\xff\nc")
    assert list(read_lines(path, errors="replace")) == [(1, "a"), (2, "\ufffd"), (3, "c")]
    with pytest.raises(UsageError, match="line 2 is not UTF-8 text"):
        list(read_lines(path))
    path.write_text("[1]")
    with pytest.raises(UsageError, match="pens .*f must hold a JSON object; buy another"):
        read_fields(path, what="pens", hint="buy another")


def test_large_values_are_said_shortly():
    for value in ("x" * 10**6, list(range(10**6)), {str(i): i for i in range(10**5)}, 10**39):
        assert len(shown(value)) < 120
    assert shown("a\nb") == r"'a\nb'"
