"""Structured output: what a body asks of the answer's form, as a grammar.

OpenAI's `response_format`, and what vLLM calls `structured_outputs` and, before, `guided_*`. One of
them at a time. A schema that cannot be held is refused with the reason.
"""

import json
from collections.abc import Mapping
from typing import Any

from jaxsys.errors import UsageError
from jaxsys.serve import grammars
from jaxsys.serve.requests import about

MAX_CHOICES = 10_000
GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_whitespace_pattern": "whitespace_pattern",
}
"""Fields of a body, and what they are called in `structured_outputs`."""
ORDER = ("structured_outputs", *GUIDED, "response_format")
FIELDS = frozenset(ORDER)
KINDS = ("json", "json_object", "regex", "choice", "grammar")
OPTIONS = ("whitespace_pattern", "disable_any_whitespace", "disable_additional_properties")
"""What `structured_outputs` says of them, and no field of a body."""
ANY_OBJECT: dict[str, Any] = {"type": "object"}


def grammar_of(fields: Mapping[str, Any]) -> str | None:
    """The grammar that a body's fields ask for; None where they ask for none.

    Raises:
        FieldRefused: if they are not understood, or contradict each other.
    """
    with about(field_of(fields)):
        return _grammar_of(fields)


def field_of(fields: Mapping[str, Any]) -> str:
    """The field that asks for a form; of several the one that says most, "tools" where none does:
    then a grammar is that of calls."""
    asking = [name for name in ORDER if fields.get(name) is not None]
    return asking[0] if asking else "tools"


def _grammar_of(fields: Mapping[str, Any]) -> str | None:
    asked: dict[str, Any] = {}
    outputs = fields.get("structured_outputs")
    if outputs is not None:
        if not isinstance(outputs, Mapping):
            raise UsageError('structured_outputs must be an object, such as {"regex": "[a-z]+"}')
        asked = {name: value for name, value in outputs.items() if value is not None}
        unknown = sorted(set(asked) - {*KINDS, *OPTIONS})
        if unknown:
            raise UsageError(
                f"structured_outputs.{unknown[0][:60]} is not implemented; use one of "
                + ", ".join(KINDS)
            )
    for name, short in GUIDED.items():
        value = fields.get(name)
        if value is not None:
            if short in asked:
                raise UsageError(f"{name} and structured_outputs.{short} say the same; use one")
            asked[short] = value
    kinds = [kind for kind in KINDS if kind in asked and asked[kind] is not False]
    form = fields.get("response_format")
    schema = None if form is None else schema_of_format(form)
    if len(kinds) + (schema is not None) > 1:
        named = [*kinds, *(["response_format"] if schema is not None else [])]
        raise UsageError(f"{' and '.join(named)} exclude each other; use one")
    if schema is not None:
        return _of_json(closed(schema), asked)
    if not kinds:
        if asked:
            raise UsageError(f"{min(asked)} says how, but not what; add one of {', '.join(KINDS)}")
        return None
    (kind,) = kinds
    value = asked[kind]
    if kind in ("json", "json_object"):
        return _of_json(ANY_OBJECT if kind == "json_object" else value, asked)
    if kind == "choice":
        if not (
            isinstance(value, list)
            and 0 < len(value) <= MAX_CHOICES
            and all(isinstance(one, str) and one for one in value)
        ):
            raise UsageError(f"choice must be a list of 1 to {MAX_CHOICES} texts, none empty")
        return grammars.of_choices(value)
    if not (isinstance(value, str) and value):
        raise UsageError(f"{kind} must be a text")
    return grammars.of_regex(value) if kind == "regex" else grammars.of_lark(value)


def schema_of_format(form: Any, at: str = "response_format") -> Mapping[str, Any] | bool | None:
    """The JSON schema that a `response_format` asks for; None for free text.

    Raises:
        UsageError: if it is not understood.
    """
    kind = form.get("type") if isinstance(form, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return ANY_OBJECT
    if kind != "json_schema":
        raise UsageError(f"{at} must be an object whose type is text, json_object or json_schema")
    # Chats have it inside, responses beside.
    inner = form.get("json_schema", form)
    schema = inner.get("schema") if isinstance(inner, Mapping) else None
    if not isinstance(schema, Mapping | bool):
        raise UsageError(f"{at} of type json_schema needs a schema, an object")
    return schema


def _of_json(schema: Any, options: Mapping[str, Any]) -> str:
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise UsageError(f"the schema is no JSON: {error}") from None
        except RecursionError:
            raise UsageError("the schema is nested too deep; make it flatter") from None
    if not isinstance(schema, Mapping | bool):
        raise UsageError("a JSON schema must be an object, or its text")
    pattern = options.get("whitespace_pattern")
    if pattern is not None and not isinstance(pattern, str):
        raise UsageError("whitespace_pattern must be a text")
    for name in OPTIONS[1:]:
        if not isinstance(options.get(name, False), bool):
            raise UsageError(f"{name} must be true or false")
    if options.get("disable_additional_properties"):
        schema = closed(schema)
    return grammars.of_json_schema(
        schema,
        whitespace=pattern,
        compact=bool(options.get("disable_any_whitespace")),
    )


_COMBINED = ("allOf", "anyOf", "oneOf", "$ref")


def closed(schema: Any) -> Any:
    """A schema whose objects have no other properties than those that are named, or have a pattern.

    Where parts of an object stand in several schemas, closing one would shut out the others': those
    stay as they are, and so does a schema that has `allOf` anywhere.

    Raises:
        UsageError: as `grammars.check_schema`.
    """
    grammars.check_schema(schema)
    return schema if "allOf" in _words(schema) else _closed(schema)


def _words(schema: Any) -> set[str]:
    if isinstance(schema, list):
        return set().union(*map(_words, schema))
    if not isinstance(schema, Mapping):
        return set()
    return set(schema).union(*map(_words, schema.values()))


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    listed = "properties" in schema or "patternProperties" in schema
    spread = listed and any(name in schema for name in _COMBINED)
    found: dict[str, Any] = {}
    for name, value in schema.items():
        if name in ("const", "enum", "default", "examples") or (spread and name in _COMBINED):
            found[name] = value
        elif name in ("properties", "$defs", "definitions", "patternProperties"):
            inner = value if isinstance(value, Mapping) else {}
            found[name] = {key: _closed(one) for key, one in inner.items()} or value
        else:
            found[name] = _closed(value)
    if listed and not spread:
        found.setdefault("additionalProperties", False)
    return found
