"""Chat templates in the manner of published models, and conversations that try their branches.

`python tests/jaxsys/chat_cases.py` (with the extra `parity`) renders them with transformers and
stores the texts in data/chats.json, which says with which version.
"""

import json
from pathlib import Path
from typing import Any

import tokenizers

STORED = Path(__file__).parent / "data" / "chats.json"
FOLDER = Path(__file__).parent / "data" / "chats"

NAMES = ("llama", "qwen", "mistral", "gemma", "phi", "deepseek", "gpt_oss", "cohere")


def template(name: str) -> Any:
    """As a tokenizer_config.json has it: one text, or several by name."""
    texts = {path.stem: path.read_text() for path in FOLDER.glob(f"{name}*.jinja")}
    if len(texts) == 1:
        return texts[name]
    return [
        {"name": "tool_use", "template": texts[f"{name}_tools"]},
        {"name": "default", "template": texts[name]},
    ]


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Says how <warm> it is & how windy",
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string", "description": "Größe, 北京"},
                    "days": {"type": "array", "items": {"type": "integer"}, "default": 3},
                    "unit": {"type": "string", "enum": ["C", "F"]},
                },
                "required": ["place"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "description": ""}},
]
CALL = {
    "id": "abcdef123",
    "type": "function",
    "function": {"name": "weather", "arguments": {"place": "Ulm", "days": [1, 2], "é": None}},
}
USER = {"role": "user", "content": "  Hi <b>there</b> 'you' & \"all\" \n"}
ASKED = [USER, {"role": "assistant", "content": " Hello.\n"}, {"role": "user", "content": "Why?"}]
SYSTEM = {"role": "system", "content": "Be brief. "}
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one": {"messages": [USER]},
    "system": {"messages": [SYSTEM, USER]},
    "turns": {"messages": [SYSTEM, *ASKED]},
    "answered": {"messages": ASKED[:2], "add_generation_prompt": False},
    "thought": {
        "messages": [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}, USER]
    },
    "reasoned": {
        "messages": [USER, {"role": "assistant", "content": "Yes.", "reasoning": "As it is."}],
        "add_generation_prompt": False,
    },
    "tools": {"messages": [SYSTEM, USER], "tools": TOOLS},
    "called": {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL], "name": None},
            {"role": "tool", "name": "weather", "content": '{"c": 3}', "tool_call_id": "abcdef123"},
        ],
        "tools": TOOLS,
    },
    "called twice": {
        "messages": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}, USER]
    },
    "answer alone": {"messages": [USER, {"role": "tool", "content": "3"}]},
    "two users": {"messages": [USER, USER]},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": " a "}]}]},
    "six": {"messages": [*ASKED[:2] * 3, USER]},
    "unlike": {"messages": [USER, {"role": "critic", "content": "no"}]},
}
SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": False}
    | {"rstrip": False, "single_word": False},
    "eos_token": "</s>",
    "pad_token": None,
    "image_token": "<image>",
    "extra_special_tokens": {"eoi_token": "<eoi>"},
    "add_bos_token": True,
}


def write_folder(name: str, folder: Path) -> None:
    """A folder of a tokenizer alone."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = ["<s>", "</s>", "<image>", "<eoi>", "a", "b"]
    model = tokenizers.models.WordLevel({one: i for i, one in enumerate(tokens)}, unk_token="a")
    backend = tokenizers.Tokenizer(model)
    backend.add_special_tokens(tokens[:4])
    backend.save(str(folder / "tokenizer.json"))
    settings = SETTINGS | {"chat_template": template(name)}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text('{"model_type": "llama"}')


def their_texts(folder: Path) -> dict[str, str | None]:
    """What transformers renders of each conversation; None where it raises."""
    import transformers  # pyright: ignore[reportMissingImports]

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found: dict[str, str | None] = {}
    for name, asked in CONVERSATIONS.items():
        options = {"add_generation_prompt": True, "tokenize": False} | asked
        try:
            found[name] = tokenizer.apply_chat_template(options.pop("messages"), **options)
        except Exception:  # noqa: BLE001 - a template may raise anything
            found[name] = None
    return found


def store() -> None:
    """Renders and writes data/chats.json."""
    import tempfile

    import transformers  # pyright: ignore[reportMissingImports]

    texts = {}
    for name in NAMES:
        with tempfile.TemporaryDirectory() as folder:
            write_folder(name, Path(folder))
            texts[name] = their_texts(Path(folder))
    found = {"transformers": transformers.__version__, "texts": texts}
    STORED.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    store()
