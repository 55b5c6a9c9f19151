"""Adapters loaded and unloaded while serving, asked for and answered as vLLM does."""

import pydantic
from fastapi.responses import PlainTextResponse, Response
from pydantic import Field
from starlette.exceptions import HTTPException

from jaxsys.serve.adapters import Served
from jaxsys.serve.http.protocol import MAX_NAME
from jaxsys.serve.requests import FieldRefused

MAX_PATH = 4096
"""Characters of a folder's path."""


class LoadAdapterRequest(pydantic.BaseModel):
    """Body of `/v1/load_lora_adapter`."""

    model_config = pydantic.ConfigDict(strict=True)

    lora_name: str = Field(
        min_length=1, max_length=MAX_NAME, description=f"a text of 1 to {MAX_NAME} characters"
    )
    lora_path: str = Field(
        min_length=1, max_length=MAX_PATH, description="a folder of the server's machine"
    )
    load_inplace: bool | None = Field(False, description="true or false")


class UnloadAdapterRequest(pydantic.BaseModel):
    """Body of `/v1/unload_lora_adapter`."""

    model_config = pydantic.ConfigDict(strict=True)

    lora_name: str = Field(
        min_length=1, max_length=MAX_NAME, description=f"a text of 1 to {MAX_NAME} characters"
    )
    lora_int_id: int | None = Field(None, description="ignored: names say it")


def check_allowed(allowed: bool) -> None:
    """Raises HTTPException, 404, where the server does not load adapters while it serves."""
    if not allowed:
        raise HTTPException(
            404, "adapters are not loaded while serving; start with --allow-lora-updates"
        )


def check_name(name: str, model_name: str) -> None:
    """Raises UsageError for a name that an adapter cannot have."""
    if name == model_name:
        raise FieldRefused(f"lora_name={name!r} is the model's own; give another", "lora_name")
    if not name.isprintable():
        raise FieldRefused(f"lora_name={name!r} must be printable characters", "lora_name")


async def load(adapters: Served, body: LoadAdapterRequest, model_name: str) -> Response:
    """Loads a folder."""
    name = body.lora_name
    check_name(name, model_name)
    await adapters.load(name, body.lora_path, in_place=bool(body.load_inplace))
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


async def unload(adapters: Served, body: UnloadAdapterRequest) -> Response:
    """Forgets a name."""
    await adapters.forget(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
