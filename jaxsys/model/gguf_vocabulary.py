"""Rebuilds a tokenizer from a GGUF's metadata, over the `tokenizers` library.

Two kinds: byte-level BPE (`gpt2`), whose text is first split by one of the pre-tokenizers below,
and SentencePiece (`llama`), which becomes a BPE over whole texts whose merges are ranked by the
scores of what they make, with bytes for what the vocabulary lacks. Regular expressions are those of
the models' own tokenizer.json; which name means which, and what an absent key means, is
llama.cpp's (of 2026-10).
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from jaxsys.errors import UsageError
from jaxsys.files import shown
from jaxsys.model.gguf_config import Source
from jaxsys.model.tokenizer import Tokenizer

END_OF_GENERATION = (
    "<|endoftext|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|END_OF_TURN_TOKEN|>",
    "<|user|>",
    "[|endofturn|]",
    "</s>",
    "<｜end▁of▁sentence｜>",
    "<end_of_utterance>",
    "<|calls|>",
    "<|flush|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "[e~[",
    "<|ifm|im_end|>",
)
"""Control tokens that end a turn whatever the file names as its end-of-text."""
END_OF_MESSAGE = "<|end|>"
TURNS_OF_MESSAGES = (("<|return|>", "<|call|>"), ("<|calls|>", "<|flush|>"))
"""Where a vocabulary has such a pair, which ends turns, `END_OF_MESSAGE` stands within them."""

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
"""`tokenizer.ggml.token_type` of tokens that are matched whole."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

LLAMA3 = (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST,)
QWEN2 = (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST,)
QWEN35 = (
    _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    + r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
DIGITS = (r"\p{N}", _GPT2)
GPT2 = (_GPT2,)
DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")
DEEPSEEK_CODER = (
    r"[\r\n]",
    r"\s?\p{L}+",
    r"\s?\p{P}+",
    r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    r"\p{N}",
)
DEEPSEEK_LLM = (
    r"[\r\n]",
    r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    r"\p{N}+",
)
SEED_CODER = (
    _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_DEEPSEEK3_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    _DEEPSEEK3_WORDS,
)
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}" + _CASED_REST,
)
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    + _CASED_REST,
)

SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"), LLAMA3),
    "midm-2.0": LLAMA3,
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe", "glm4", "glm5"), LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez"), QWEN2),
    **dict.fromkeys(("solar-open", "grok-2", "kormo"), QWEN2),
    "qwen35": QWEN35,
    **dict.fromkeys(("starcoder", "refact", "command-r", "smollm", "codeshell"), DIGITS),
    **dict.fromkeys(("exaone", "minerva-7b", "mellum2"), DIGITS),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4"), GPT2),
    **dict.fromkeys(("gigachat", "a.x-4.0", "mellum", "granite-docling"), GPT2),
    "default": DEFAULT,
    "falcon": FALCON,
    "deepseek-coder": DEEPSEEK_CODER,
    "deepseek-llm": DEEPSEEK_LLM,
    "seed-coder": SEED_CODER,
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), DEEPSEEK3),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2"), GPT4O),
    "tekken": TEKKEN,
}
"""Pre-tokenizer -> expressions, each splitting what the one before left."""

WHOLE_WORDS = frozenset(
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2", "glm4", "glm5", "tekken")
    + ("midm-2.0",)
)
"""Those under which a word of the vocabulary skips the merges."""
BEGINNING = WHOLE_WORDS - {"glm4", "glm5"}
"""Those whose texts begin with the beginning-of-text token where the file does not say."""


def read_vocabulary(source: Source) -> Tokenizer:
    """The tokenizer that the metadata describe.

    Raises:
        UsageError: if its model or pre-tokenizer is unknown, or its parts do not fit together.
    """
    kind = source.field("tokenizer.ggml.model")
    tokens: list[str] = source.need("tokenizer.ggml.tokens")
    kinds: list[int] = source.field("tokenizer.ggml.token_type", [1] * len(tokens))
    if len(kinds) != len(tokens):
        raise UsageError(f"{source.name}: {len(kinds)} token types for {len(tokens)} tokens")
    if len(set(tokens)) < len(tokens):
        counted = Counter(tokens).most_common(1)[0]
        raise UsageError(f"{source.name}: token {shown(counted[0])} is {counted[1]} times there")
    split = source.field("tokenizer.ggml.pre") or "default"
    try:
        if kind == "gpt2":
            backend = _byte_level(source, tokens, split)
        elif kind == "llama":
            backend = _sentence_piece(source, tokens)
        else:
            raise UsageError(
                f"{source.name}: tokenizer model {kind!r} is not supported; known: 'gpt2' "
                "(byte-level BPE) and 'llama' (SentencePiece). Load the Hugging Face folder of "
                "this model instead"
            )
    except UsageError:
        raise
    except Exception as error:  # the library raises bare Exception for every fault
        raise UsageError(
            f"{source.name}: the tokenizer metadata do not fit together ({error})"
        ) from error
    for which, special in ((UNKNOWN, True), (CONTROL, True), (USER_DEFINED, False)):
        added = [token for token, found in zip(tokens, kinds, strict=True) if found == which]
        backend.add_tokens(
            [tokenizers.AddedToken(text, special=special, normalized=False) for text in added]
        )
    ids = {
        name: _token_id(source, name, len(tokens))
        for name in ("bos", "eos", "eot", "eom", "unknown", "padding", "seperator", "mask")
    }
    if kind == "llama":
        ids = {"bos": 1, "eos": 2} | {key: value for key, value in ids.items() if value is not None}
    bos, eos = ids.get("bos"), ids.get("eos")
    begins = kind == "llama" or split in BEGINNING
    first = bos if source.field("tokenizer.ggml.add_bos_token", begins) else None
    last = eos if source.field("tokenizer.ggml.add_eos_token", False) else None
    _put_around(backend, tokens, first, last)
    ends = [ids.get(name) for name in ("eos", "eot", "eom")]
    ends += [
        index
        for index, (token, found) in enumerate(zip(tokens, kinds, strict=True))
        if token in END_OF_GENERATION and found in (CONTROL, USER_DEFINED)
    ]
    ending = {tokens[index] for index in ends if index is not None}
    if any(ending.issuperset(pair) for pair in TURNS_OF_MESSAGES):
        ends = [index for index in ends if index is None or tokens[index] != END_OF_MESSAGE]
    called = {"unknown": "unk", "padding": "pad", "seperator": "sep"}
    named = {
        f"{called.get(name, name)}_token": tokens[index]
        for name, index in ids.items()
        if index is not None and name not in ("eot", "eom")
    }
    return Tokenizer(
        backend,
        bos_id=bos,
        eos_ids=[index for index in ends if index is not None],
        chat_template=source.field("tokenizer.chat_template"),
        tool_template=source.field("tokenizer.chat_template.tool_use"),
        special_tokens=named,
    )


def _byte_level(source: Source, tokens: Sequence[str], split: str) -> tokenizers.Tokenizer:
    expressions = SPLITS.get(split)
    if expressions is None:
        raise UsageError(
            f"{source.name}: pre-tokenizer {split!r} is not known; known: {', '.join(SPLITS)}. "
            "Load the Hugging Face folder of this model instead"
        )
    merges: list[Any] = [tuple(line.split(" ")) for line in source.need("tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split in WHOLE_WORDS)
    )
    parts: list[Any] = [
        pre_tokenizers.Split(tokenizers.Regex(one), behavior="isolated") for one in expressions
    ]
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentence_piece(source: Source, tokens: Sequence[str]) -> tokenizers.Tokenizer:
    scores: list[float] = source.need("tokenizer.ggml.scores")
    if len(scores) != len(tokens):
        raise UsageError(f"{source.name}: {len(scores)} scores for {len(tokens)} tokens")
    unknown = _token_id(source, "unknown", len(tokens))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(tokens, scores, vocabulary),
            unk_token=tokens[0 if unknown is None else unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = source.field("tokenizer.ggml.add_space_prefix", True)
    spaces: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", "▁")])
    undone: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*undone, decoders.Strip(" ", 1, 0)] if prefix else undone)
    return backend


def _merges(
    tokens: Sequence[str], scores: Sequence[float], vocabulary: dict[str, int]
) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, the best pieces first."""
    found: list[tuple[float, int, int, tuple[str, str]]] = []
    for token, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((-score, vocabulary[left], vocabulary[right], (left, right)))
    found.sort(key=lambda entry: entry[:3])
    return [pair for *_, pair in found]


def _put_around(
    backend: tokenizers.Tokenizer, tokens: Sequence[str], first: int | None, last: int | None
) -> None:
    """Texts begin and end with these tokens, where there are any."""
    used = [index for index in (first, last) if index is not None]
    if not used:
        return
    head = "" if first is None else f"{tokens[first]} "
    tail = "" if last is None else f" {tokens[last]}"
    backend.post_processor = processors.TemplateProcessing(
        single=f"{head}$A{tail}",
        pair=f"{head}$A $B{tail}",
        special_tokens=[(tokens[index], index) for index in dict.fromkeys(used)],
    )


def _token_id(source: Source, name: str, count: int) -> int | None:
    index = source.field(f"tokenizer.ggml.{name}_token_id")
    if index is not None and not 0 <= index < count:
        raise UsageError(
            f"{source.name}: {name}_token_id={index} is outside the vocabulary of {count}"
        )
    return index
