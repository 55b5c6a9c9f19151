"""Reads a Hugging Face model folder: config.json, safetensors (sharded or not), tokenizer files."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jax.typing import DTypeLike

from jaxsys.errors import UsageError
from jaxsys.layered import Parameters
from jaxsys.model.assemble import assemble, check_tensors, expected_tensors
from jaxsys.model.config import DecoderConfig
from jaxsys.model.names import Leaf
from jaxsys.model.safetensors_file import SafetensorsFile
from jaxsys.model.tokenizer import Tokenizer

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


def read_config(folder: Path) -> DecoderConfig:
    """The configuration in `folder`.

    Raises:
        UsageError: if there is none, or it asks for what is not computed.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UsageError(f"{folder} holds no {CONFIG}; give a Hugging Face model folder")
    content = _read_json(path)
    try:
        return DecoderConfig.from_hf(content)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def read_parameters(folder: Path, config: DecoderConfig, dtype: DTypeLike) -> Parameters:
    """All parameters, read tensor by tensor and cast to `dtype`.

    Raises:
        UsageError: if a file is missing or cut short, or the tensors are not the configuration's.
    """
    home: dict[str, SafetensorsFile] = {}
    for name in _weight_files(folder):
        file = SafetensorsFile(folder / name)
        for tensor in file.shapes:
            if tensor in home:
                raise UsageError(f"{folder}: tensor {tensor!r} is in two files")
            home[tensor] = file
    found = {name: file.shapes[name] for name, file in home.items()}
    # Old exporters also wrote the rotary constants, and a tied head's copy.
    ignored = [name for name in found if name.endswith("rotary_emb.inv_freq")]
    if config.tie_embeddings:
        ignored.append("lm_head.weight")
    expected = expected_tensors(config, lambda leaf: leaf.hf)
    check_tensors(str(folder), expected, found, ignored=ignored)

    def fetch(leaf: Leaf, name: str) -> np.ndarray:
        return home[name].read(name)

    return assemble(config, fetch, name_of=lambda leaf: leaf.hf, dtype=dtype)


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer with its special ids and chat template; None where there is no file for it."""
    path = folder / TOKENIZER
    if not path.is_file():
        return None
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every fault of a file
        raise UsageError(f"{path} is not a tokenizer file ({error})") from error
    settings = _read_json(folder / TOKENIZER_CONFIG, missing={})
    named = {
        name: _token_text(settings[name])
        for name in SPECIAL_NAMES
        if settings.get(name) is not None
    }
    ends: list[int] = []
    for source in (GENERATION_CONFIG, CONFIG):
        ends += _as_list(_read_json(folder / source, missing={}).get("eos_token_id"))
    if "eos_token" in named:
        ends += _as_list(backend.token_to_id(named["eos_token"]))
    bos = backend.token_to_id(named["bos_token"]) if "bos_token" in named else None
    return Tokenizer(
        backend,
        bos_id=bos,
        eos_ids=ends,
        chat_template=_chat_template(folder, settings),
        special_tokens=named,
    )


def _weight_files(folder: Path) -> list[str]:
    index = folder / INDEX
    if index.is_file():
        names = sorted(set(_read_json(index).get("weight_map", {}).values()))
        # A name from inside a file must not lead out of the folder.
        strays = [name for name in names if Path(name).name != name]
        if strays:
            raise UsageError(f"{index} names {strays[0]!r}, which is no file of its folder")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing or not names:
            raise UsageError(
                f"{index} names {len(names)} file(s), of which {missing[0] if missing else 'none'} "
                "is missing; fetch the folder again"
            )
        return names
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    others = sorted(path.name for path in folder.glob("*.bin"))
    found = f"; {others[0]} is a pickle, which is not read: convert it" if others else ""
    raise UsageError(f"{folder} holds neither {WEIGHTS} nor {INDEX}{found}")


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    path = folder / CHAT_TEMPLATE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template


def _token_text(entry: str | dict[str, Any]) -> str:
    return entry if isinstance(entry, str) else entry["content"]


def _as_list(value: int | Iterable[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)


def _read_json(path: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    if missing is not None and not path.is_file():
        return missing
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # bad JSON or bad UTF-8
        raise UsageError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} must hold a JSON object")
    return value
