"""The API's description: `/openapi.json`, and `/docs` as one page that needs no other."""

import html
import json
from collections.abc import Sequence
from typing import Any

import fastapi
import pydantic
from fastapi.openapi.utils import get_openapi

_REFERENCE = "#/components/schemas/"
_STYLE = """
 body { font: 15px system-ui, sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em; }
 h2 { border-top: 1px solid #ccc; padding-top: .8em; font-size: 110%; } code { font-size: 95%; }
 h2 b { color: #15690f; } table { border-collapse: collapse; } summary { cursor: pointer; }
 td, th { text-align: left; padding: .2em .8em .2em 0; vertical-align: top; } p { color: #444; }
 pre { background: #f4f4f4; padding: .6em; overflow: auto; }
"""
_EXAMPLES: dict[str, Any] = {
    "/v1/completions": {"prompt": "Once upon a time", "max_tokens": 16},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [72, 105]},
}


def body_of(kind: type[pydantic.BaseModel]) -> dict[str, Any]:
    """What a route says of a body that it reads itself."""
    schema = {"$ref": _REFERENCE + kind.__name__}
    return {"requestBody": {"content": {"application/json": {"schema": schema}}, "required": True}}


def describe(app: fastapi.FastAPI, bodies: Sequence[type[pydantic.BaseModel]]) -> None:
    """Has an application's description hold the forms of `bodies`."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
            )
            schemas = found.setdefault("components", {}).setdefault("schemas", {})
            for kind in bodies:
                schema = kind.model_json_schema(ref_template=_REFERENCE + "{model}")
                schemas |= schema.pop("$defs", {})
                schemas[kind.__name__] = schema
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def page(description: dict[str, Any]) -> str:
    """A description as one page without scripts."""
    title = html.escape(f"{description['info']['title']} {description['info']['version']}")
    parts = [
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title>",
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>",
        f"<p>{html.escape(description['info'].get('description', ''))} ",
        "As data: <a href='openapi.json'>openapi.json</a>.</p>",
    ]
    schemas = description.get("components", {}).get("schemas", {})
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2><b>{method.upper()}</b> <code>{html.escape(path)}</code></h2>")
            content = operation.get("requestBody", {}).get("content", {})
            if content:
                parts.append(_fields(next(iter(content.values()))["schema"], schemas))
                parts.append(_example(path))
    return "".join(parts) + "</body></html>"


def _example(path: str) -> str:
    body = json.dumps(_EXAMPLES.get(path, {}))
    command = (
        f"curl http://127.0.0.1:8000{path} -H 'Content-Type: application/json' \\\n  -d '{body}'"
    )
    return f"<pre>{html.escape(command)}</pre>"


def _fields(schema: dict[str, Any], schemas: dict[str, Any]) -> str:
    schema = schemas.get(schema.get("$ref", "").removeprefix(_REFERENCE), schema)
    needed = schema.get("required", ())
    rows = []
    for name, field in schema.get("properties", {}).items():
        default = "required" if name in needed else json.dumps(field.get("default"))
        cells = (f"<code>{name}</code>", field.get("description", ""), f"<code>{default}</code>")
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "<tr><th>field</th><th>must be</th><th>without it</th></tr>"
    return f"<details><summary>fields</summary><table>{head}{''.join(rows)}</table></details>"
