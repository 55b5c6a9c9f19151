"""JSON objects of files that others made, whose values are asked for by name and type.

    fields = read_fields(path, what="plan", hint="make the plan again")
    fields.fields("for").integer("devices", least=1)
    # plan p.json: its field 'for.devices' is '8', and must be a whole number of at least 1; make
    # the plan again

Whatever is wrong is a `UsageError` of one line that names file, field, value, rule and way out.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from jaxsys.errors import FileError, UsageError, did_you_mean
from jaxsys.files import MOST_BYTES, MOST_DIGITS, read_json, shown

LARGEST = 2**53
"""Of whole numbers where a reader sets no other bound: beyond it JSON numbers are not exact."""

_NEEDED: Any = object()
_KINDS = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}

Record = TypeVar("Record")
NOT_CALLED: Mapping[str, str] = MappingProxyType({})


def read_fields(
    path: str | Path, *, what: str = "", most_bytes: int = MOST_BYTES, hint: str = ""
) -> "Fields":
    """The JSON object that a file holds.

    Args:
        path: the file.
        what: what it should be, as errors put it before the path: "plan".
        most_bytes: no more than this is read.
        hint: the way out, which errors of its fields end with.

    Raises:
        UsageError: if it cannot be read or holds no JSON object.
    """
    value = read_json(path, what=what, most_bytes=most_bytes)
    return Fields(value, name=f"{what} {path}".lstrip(), hint=hint)


class Fields:
    """A JSON object whose values are asked for by name and type.

    Every method raises UsageError, naming file, field, value and rule, if a value is of another
    type or outside its bounds, or is absent and no `default` is given. A field that is null counts
    as absent where there is a default.

    Args:
        value: the object.
        name: what errors call the file: "plan p.json"; "" where the caller says it.
        at: the field that holds the object, "" for the whole file.
        hint: the way out: "make the plan again".
    """

    def __init__(self, value: Any, *, name: str, at: str = "", hint: str = "") -> None:
        self.name, self.at, self.hint = name, at, hint
        if not isinstance(value, Mapping):
            if at:
                raise self.wrong("", "a JSON object", value)
            raise UsageError(f"{name or 'it'} must hold a JSON object{f'; {hint}' if hint else ''}")
        self.value: Mapping[str, Any] = value

    def __contains__(self, key: str) -> bool:
        return self.value.get(key) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self.value)

    def __len__(self) -> int:
        return len(self.value)

    def path(self, key: str) -> str:
        """A field's name from the file's top: "for.devices"."""
        short = key if len(key) <= 60 and key.isprintable() else shown(key)
        return ".".join(part for part in (self.at, short) if part)

    def wrong(self, key: str, rule: str, value: Any) -> UsageError:
        """The error of a field that is not what it must be: "must be `rule`"."""
        return self.fault(f"its field {self.path(key)!r} is {shown(value)}, and must be {rule}")

    def fault(self, text: str) -> UsageError:
        """An error with the file's name before it and the way out behind it."""
        return FileError(
            (f"{self.name}: " if self.name else "") + text + (f"; {self.hint}" if self.hint else "")
        )

    def get(self, key: str, default: Any = _NEEDED) -> Any:
        """A value of any type."""
        value = self.value.get(key)
        if value is None and default is not _NEEDED:
            return default
        if key not in self.value:
            raise self.fault(f"its field {self.path(key)!r} is missing")
        return value

    def integer(
        self, key: str, default: Any = _NEEDED, *, least: int = 0, most: int = LARGEST
    ) -> int:
        """A whole number from `least` to `most`."""
        value = self.get(key, default)
        if value is default:
            return value
        if type(value) is not int or not least <= value <= most:
            span = f" to {most}" if most != LARGEST else ""
            least_or_from = f"from {least}{span}" if span else f"of at least {least}"
            raise self.wrong(key, f"a whole number {least_or_from}", value)
        return value

    def number(
        self,
        key: str,
        default: Any = _NEEDED,
        *,
        least: float = -math.inf,
        above: float = -math.inf,
    ) -> float:
        """A finite number, at least `least` and above `above`."""
        value = self.get(key, default)
        if value is default:
            return value
        if type(value) is int and abs(value) <= 10**MOST_DIGITS:
            value = float(value)
        if type(value) is not float or not math.isfinite(value):
            raise self.wrong(key, "a finite number", value)
        if value < least or value <= above:
            bound = f"above {above}" if value <= above else f"of at least {least}"
            raise self.wrong(key, f"a number {bound}", value)
        return value

    def text(self, key: str, default: Any = _NEEDED) -> str:
        """A string."""
        value = self.get(key, default)
        if value is not default and type(value) is not str:
            raise self.wrong(key, "a string", value)
        return value

    def flag(self, key: str, default: Any = _NEEDED) -> bool:
        """True or false."""
        value = self.get(key, default)
        if value is not default and type(value) is not bool:
            raise self.wrong(key, "true or false", value)
        return value

    def choice(self, key: str, known: Iterable[str], default: Any = _NEEDED) -> Any:
        """One of the strings `known`; if that is an enumeration, its member."""
        value = self.get(key, default)
        if value is default:
            return value
        found = [name for name in known if type(value) is str and name == value]
        if not found:
            raise self.wrong(key, f"one of {', '.join(known)}", value)
        return found[0]

    def array(self, key: str, default: Any = _NEEDED, *, of: type | None = None) -> list[Any]:
        """An array, of values of type `of` if that is given (floats may be whole)."""
        value = self.get(key, default)
        if value is default:
            return value
        if type(value) is not list:
            raise self.wrong(key, "an array", value)
        if of is not None:
            for index, item in enumerate(value):
                if type(item) is not of and not (of is float and type(item) is int):
                    raise self.wrong(f"{key}[{index}]", _KINDS.get(of, f"a {of.__name__}"), item)
        return value

    def fields(self, key: str) -> "Fields":
        """A JSON object."""
        return Fields(self.get(key), name=self.name, at=self.path(key), hint=self.hint)

    def objects(self, key: str) -> "list[Fields]":
        """An array of JSON objects."""
        return [
            Fields(item, name=self.name, at=f"{self.path(key)}[{index}]", hint=self.hint)
            for index, item in enumerate(self.array(key))
        ]

    def record(
        self, kind: type[Record], *, called: Mapping[str, str] = NOT_CALLED, **given: Any
    ) -> Record:
        """A dataclass from the fields that are called as its own, each of its annotated type.

        Args:
            kind: a dataclass whose fields are int, float, str, bool, enumerations of strings, or
                one of these or None.
            called: another name -> the field that is meant by it, for who writes that.
            **given: fields that are not read here.

        Raises:
            UsageError: also if a field is unknown, or the dataclass refuses the values.
        """
        known = _annotations(kind)
        for key in self.value:
            if key not in known:
                meant = called.get(key)
                near = did_you_mean(key, known) if meant is None else f" (did you mean {meant!r}?)"
                raise self.fault(
                    f"its field {self.path(key)!r} is not known{near}; known: {', '.join(known)}"
                )
        values = dict(given)
        for key, (type_, needed, may_be_none) in known.items():
            if key in given or (key not in self.value and not needed):
                continue
            null = may_be_none and self.get(key) is None
            values[key] = None if null else self._as(type_, key)
        try:
            return kind(**values)
        except ValueError as error:
            raise self.fault(str(error)) from None

    def _as(self, type_: type, key: str) -> Any:
        value = self.value.get(key)
        if type_ is int:
            if type(value) is int and -LARGEST <= value <= LARGEST:
                return value  # schedules have hundreds of thousands of them
            return self.integer(key, least=-LARGEST)
        if type_ is float:
            return self.number(key)
        if type_ is str:
            return self.text(key)
        if type_ is bool:
            return self.flag(key)
        return self.choice(key, typing.cast(Iterable[str], type_))


@functools.cache
def _annotations(kind: type) -> dict[str, tuple[type, bool, bool]]:
    """Field -> (type, whether it has no default, whether it may be None)."""
    hints = typing.get_type_hints(kind)
    found = {}
    for field in dataclasses.fields(kind):
        parts = typing.get_args(hints[field.name]) or (hints[field.name],)
        needed = field.default is dataclasses.MISSING is field.default_factory
        found[field.name] = (parts[0], needed, type(None) in parts)
    return found
