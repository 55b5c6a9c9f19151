"""Reads a Hugging Face model folder: config.json, safetensors (sharded or not), tokenizer files."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path

import tokenizers
from jax.typing import DTypeLike

from jaxsys.errors import UsageError
from jaxsys.fields import Fields, read_fields
from jaxsys.files import MIB, one_line, read_text, refuse_pointer, shown
from jaxsys.layered import Parameters
from jaxsys.model import packed, quantised_files
from jaxsys.model.assemble import (
    Checkpoint,
    Fetch,
    check_layers,
    check_tensors,
    expected_tensors,
)
from jaxsys.model.config import DecoderConfig
from jaxsys.model.families import FAMILIES
from jaxsys.model.kinds import BlockKind
from jaxsys.model.names import FileTensor, block_tensors, edge_tensors
from jaxsys.model.rows import Rows, rows_of, same
from jaxsys.model.safetensors_file import SafetensorsFile
from jaxsys.model.tokenizer import Tokenizer

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
"""A folder of templates by name."""
TOOL_TEMPLATE = "tool_use"
"""Of templates by name, that of requests with tools."""

MOST_SETTINGS_BYTES = 8 * MIB
"""Of a config.json, a tokenizer_config.json (which may repeat 10,000 added tokens), a template."""
MOST_TOKENIZER_BYTES = 256 * MIB
"""Of a tokenizer.json; those of 260,000 tokens have some 35 MB."""
MOST_TOKENS = 2**31
MOST_NAME = 255
"""Bytes of the name of a file in an index, as file systems have it."""

SPECIAL_TOKENS_MAP = "special_tokens_map.json"
SPECIAL_NAMES = tuple(
    f"{name}_token" for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
)
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
OF_GENERATION: Mapping[str, float | None] = {
    "typical_p": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0,
    "guidance_scale": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    **dict.fromkeys(("top_h", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens")),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "sequence_bias")),
    **dict.fromkeys(("watermarking_config", "max_new_tokens", "stop_strings", "penalty_alpha")),
    **dict.fromkeys(("dola_layers", "exponential_decay_length_penalty", "force_words_ids")),
}
"""Keys of a generation_config.json that change texts and are not applied -> what changes none."""


def read_config(folder: Path) -> DecoderConfig:
    """The configuration in `folder`.

    Raises:
        UsageError: if there is none, or it asks for what is not computed.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UsageError(f"{folder} holds no {CONFIG}; give a Hugging Face model folder")
    content = read_fields(path, most_bytes=MOST_SETTINGS_BYTES).value
    try:
        return DecoderConfig.from_hf(content)
    except UsageError as error:
        raise UsageError(f"{path}: {one_line(str(error))}") from error


def open_parameters(folder: Path, config: DecoderConfig) -> Checkpoint:
    """All parameters, found and checked, to be read some rows at a time.

    Args:
        folder: the model's.
        config: as `read_config` found it.

    Returns:
        What reads them; the configuration's head is untied where the file holds another one.

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

    small: dict[str, Fetch] = {}
    settings = _settings(folder / CONFIG).value.get("quantization_config")
    if settings is not None and settings.get("quant_method") != "mxfp4":
        found, small = quantised_files.present(settings, home, found)
    marked = [name for name in found if name.endswith(quantised_files.MARKS)]
    if settings is None and marked:
        raise UsageError(
            f"{folder}: tensor {min(marked)!r} is of quantised weights, and {CONFIG} has no "
            "quantization_config that says how; older files have its keys in quantize_config.json "
            "or quant_config.json: put them there, with quant_method"
        )

    def fetch(name: str) -> Rows:
        if name in small:
            return small[name](name)
        if name in home:
            return rows_of(home[name].read(name))
        return packed.expand(home[name + packed.BLOCKS], home[name + packed.SCALES], name)

    def fetch_packed(name: str) -> packed.Packed | None:
        if name + packed.BLOCKS not in home:
            return None
        return packed.read(home[name + packed.BLOCKS], home[name + packed.SCALES], name)

    found = packed.present(found)
    config = _untied(config, found, fetch)

    def tensors(kind: BlockKind | None) -> list[FileTensor]:
        return edge_tensors(config) if kind is None else block_tensors(config, kind)

    check_layers(str(folder), config, found)
    expected = expected_tensors(config, tensors)
    ignored = [name for name in found if _is_ignored(config, name)]
    for name in found.keys() - expected.keys():
        # GPTQ's first library gave every module a bias, of zeros where there was none.
        module, _, kind = name.rpartition(".")
        if kind == "bias" and f"{module}.weight" in small and not home[name].read(name).any():
            ignored.append(name)
    check_tensors(str(folder), expected, found, ignored=ignored)

    return Checkpoint(config=config, fetch=fetch, tensors=tensors, fetch_packed=fetch_packed)


def read_whole_config(folder: Path) -> DecoderConfig:
    """As `read_config`, its head untied where the weights beside it have another one.

    Weights that are not all there, as where a model is only planned for, say nothing.
    """
    config = read_config(folder)
    if not config.tie_embeddings:
        return config
    try:
        if any(HEAD in SafetensorsFile(folder / name).shapes for name in _weight_files(folder)):
            return open_parameters(folder, config).config
    except (UsageError, OSError):
        pass
    return config


def read_parameters(
    folder: Path, config: DecoderConfig, dtype: DTypeLike
) -> tuple[DecoderConfig, Parameters]:
    """The same, read at once, cast to `dtype`, on the default device."""
    found = open_parameters(folder, config)
    return found.config, found.parameters(dtype)


HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


def _untied(
    config: DecoderConfig, found: dict[str, tuple[int, ...]], fetch: Fetch
) -> DecoderConfig:
    """A head in the file that is not the embedding is used, whatever the configuration says.

    As transformers does, which warns of it.
    """
    if not config.tie_embeddings or HEAD not in found or found[HEAD] != found.get(TABLE):
        return config
    if same(fetch(HEAD), fetch(TABLE)):
        return config
    return dataclasses.replace(config, tie_embeddings=False)


def _is_ignored(config: DecoderConfig, name: str) -> bool:
    # Old exporters also wrote the rotary constants, and a tied head's copy.
    if name.endswith("rotary_emb.inv_freq") or (config.tie_embeddings and name == HEAD):
        return True
    if not FAMILIES[config.family].unread_layers:
        return False
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return layer is not None and int(layer[1]) >= config.num_layers


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer with its special ids and chat template; None where there is no file for it."""
    path = folder / TOKENIZER
    if not path.is_file():
        return None
    backend = read_backend(path)
    settings = _settings(folder / TOKENIZER_CONFIG)
    named = _special_tokens(folder, settings)
    _add_tokens(backend, settings, named)
    ends: list[int] = []
    for source in (GENERATION_CONFIG, CONFIG):
        ends += _ids(_settings(folder / source), "eos_token_id")
    eos = backend.token_to_id(named["eos_token"]) if "eos_token" in named else None
    if eos is not None:
        ends.append(eos)
    bos = backend.token_to_id(named["bos_token"]) if "bos_token" in named else None
    templates = _chat_templates(folder, settings)
    return Tokenizer(
        backend,
        bos_id=bos,
        eos_ids=ends,
        chat_template=templates.get("default"),
        tool_template=templates.get(TOOL_TEMPLATE),
        special_tokens=named,
    )


def _add_tokens(backend: tokenizers.Tokenizer, settings: Fields, named: Mapping[str, str]) -> None:
    """Adds the tokens that tokenizer_config.json lists, and names, to those of tokenizer.json.

    As transformers does, in its order; what both have is as tokenizer_config.json describes it.
    """
    tokens: dict[str, tokenizers.AddedToken] = {}
    if "added_tokens_decoder" in settings:
        listed = settings.fields("added_tokens_decoder")
        for key in listed:
            if not key.isdecimal() or int(key) >= MOST_TOKENS:
                raise listed.wrong("", f"tokens by their ids, below {MOST_TOKENS}", key)
        for key in sorted(listed, key=int):
            one = listed.fields(key)
            flags = {
                flag: one.flag(flag, False)
                for flag in ("single_word", "lstrip", "rstrip", "special")
            }
            content, special = one.text("content"), flags["special"]
            special = special or content in named.values()
            normalized = one.flag("normalized", not flags["special"])
            tokens[content] = tokenizers.AddedToken(
                content, **flags | {"special": special, "normalized": normalized}
            )
    there = {token.content for token in backend.get_added_tokens_decoder().values()}
    for content in named.values():
        if content and content not in there and content not in tokens:
            tokens[content] = tokenizers.AddedToken(content, special=True)
    if tokens:
        backend.add_tokens(list(tokens.values()))


def _special_tokens(folder: Path, settings: Fields) -> dict[str, str]:
    """Names of special tokens and their text, out of the three places that give them.

    `special_tokens_map.json` fills in what tokenizer_config.json lacks, and wins where that is of
    the old form, which lists no added tokens; `extra_special_tokens` names further ones, and so
    does every key that ends in `_token` and is a text.
    """
    table = _settings(folder / SPECIAL_TOKENS_MAP)
    sources = [table, settings] if "added_tokens_decoder" in settings else [settings, table]
    named: dict[str, str] = {}
    for source in sources:
        named |= {name: _token_text(source, name) for name in SPECIAL_NAMES if name in source}
        named |= {name: _token_text(source, name) for name in source if _is_token(source, name)}
        if isinstance(source.get("extra_special_tokens", None), dict):
            extra = source.fields("extra_special_tokens")
            named |= {name: _token_text(extra, name) for name in extra if name in extra}
    return named


def read_generation(folder: Path) -> dict[str, float]:
    """How a model's makers sample from it: the settings of generation_config.json that are given.

    Raises:
        UsageError: if one is no number.
    """
    settings = _settings(folder / GENERATION_CONFIG)
    found: dict[str, float] = {}
    greedy = "do_sample" in settings and not settings.flag("do_sample", False)
    if greedy:
        found["temperature"] = 0.0
    for name in SAMPLING:
        if greedy and name != "repetition_penalty":
            continue  # of sampling alone
        if name in settings:
            number = settings.number(name)
            found[name] = int(number) if name == "top_k" else number
    return found


def read_unapplied(folder: Path) -> dict[str, str]:
    """What a generation_config.json asks for beside that and is not done, as an error shows it."""
    settings = _settings(folder / GENERATION_CONFIG)
    return {
        name: shown(settings.get(name))
        for name, nothing in OF_GENERATION.items()
        if name in settings and settings.get(name) not in (nothing, False, [], {})
    }


def read_backend(path: Path) -> tokenizers.Tokenizer:
    """What a tokenizer.json holds.

    Raises:
        UsageError: if it is none.
    """
    refuse_pointer(path)
    text = read_text(path, most_bytes=MOST_TOKENIZER_BYTES)
    try:
        return tokenizers.Tokenizer.from_str(text)
    except BaseException as error:  # the library raises Exception, and panics of its own kind
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise UsageError(f"{path} is not a tokenizer file ({_first_line(error)})") from error


def _weight_files(folder: Path) -> list[str]:
    if (folder / WEIGHTS).is_file():  # beside an index too, as transformers does
        return [WEIGHTS]
    index = folder / INDEX
    if index.is_file():
        weight_map = read_fields(index, hint="fetch the folder again").fields("weight_map")
        names = sorted({weight_map.text(tensor) for tensor in weight_map})
        # A name from inside a file must not lead out of the folder.
        strays = [
            name for name in names if Path(name).name != name or len(name.encode()) > MOST_NAME
        ]
        if strays:
            raise UsageError(f"{index} names {shown(strays[0])}, which is no file of its folder")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing or not names:
            raise UsageError(
                f"{index} names {len(names)} file(s), of which "
                f"{shown(missing[0])[1:-1] if missing else 'none'} is missing; fetch the folder "
                "again"
            )
        return names
    others = sorted(path.name for path in folder.glob("*.bin"))
    found = f"; {others[0]} is a pickle, which is not read: convert it" if others else ""
    raise UsageError(f"{folder} holds neither {WEIGHTS} nor {INDEX}{found}")


def _chat_templates(folder: Path, settings: Fields) -> dict[str, str]:
    """The templates by name; that of most models is called `default`.

    Files of their own take the place of all that tokenizer_config.json has.
    """
    files = {path.stem: path for path in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
    if (folder / CHAT_TEMPLATE).is_file():
        files["default"] = folder / CHAT_TEMPLATE
    if files:
        read = functools.partial(read_text, most_bytes=MOST_SETTINGS_BYTES)
        return {name: read(path) for name, path in files.items()}
    if isinstance(settings.get("chat_template", None), list):  # several named ones
        return {
            entry.text("name"): entry.text("template")
            for entry in settings.objects("chat_template")
        }
    only = settings.text("chat_template", None)
    return {} if only is None else {"default": only}


def _is_token(settings: Fields, name: str) -> bool:
    """Whether a key names a token beside the usual ones."""
    if not name.endswith("_token") or name in SPECIAL_NAMES or name not in settings:
        return False
    value = settings.get(name)
    return isinstance(value, str) or (isinstance(value, dict) and "content" in value)


def _token_text(settings: Fields, name: str) -> str:
    if isinstance(settings.get(name), dict):
        return settings.fields(name).text("content")
    return settings.text(name)


def _ids(settings: Fields, name: str) -> list[int]:
    if isinstance(settings.get(name, None), list):
        ids = settings.array(name, of=int)
    else:
        ids = [settings.integer(name)] if name in settings else []
    for token in ids:
        if not 0 <= token < MOST_TOKENS:
            raise settings.wrong(name, f"token ids from 0 to {MOST_TOKENS - 1}", token)
    return ids


def _settings(path: Path) -> Fields:
    """A file of settings that a folder need not have."""
    if not path.is_file():
        return Fields({}, name=str(path))
    return read_fields(path, most_bytes=MOST_SETTINGS_BYTES)


def _first_line(error: BaseException) -> str:
    return shown(next(iter(str(error).splitlines()), type(error).__name__))[1:-1]
