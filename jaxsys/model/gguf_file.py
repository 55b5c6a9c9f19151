"""Reads GGUF: llama.cpp's one-file models, quantised or not, with tokenizer and chat template.

Tensors stay memory-mapped and are dequantised one by one through the `gguf` package. llama.cpp
keeps the rotary pairs of a head side by side, (2i, 2i + 1); the rows of query and key kernels are
put back to the half-split order (i, i + K/2) here.
"""

import dataclasses
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from gguf.quants import dequantize
from jax.typing import DTypeLike
from tokenizers import decoders, models, pre_tokenizers

from jaxsys.errors import UsageError
from jaxsys.layered import Parameters
from jaxsys.model.assemble import (
    Placement,
    assemble,
    check_layers,
    check_tensors,
    expected_tensors,
)
from jaxsys.model.config import DecoderConfig
from jaxsys.model.gguf_header import check_header
from jaxsys.model.gguf_names import gguf_tensors
from jaxsys.model.kinds import BlockKind
from jaxsys.model.names import FileTensor
from jaxsys.model.rope import Llama3RopeScaling, inverse_frequencies
from jaxsys.model.tokenizer import Tokenizer

KNOWN_ARCHITECTURES = ("llama",)
ROPE_FACTORS = "rope_freqs.weight"
"""Divisors of the rotary frequencies [K/2], how llama.cpp stores Llama 3.1's scaling."""

END_OF_GENERATION = (
    "<|endoftext|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "</s>",
)
"""Control tokens that end a turn whatever the file names as its end-of-text."""

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3's tokenizer.json splits text before merging."""

CONTROL, USER_DEFINED = 3, 4
"""`tokenizer.ggml.token_type` of tokens that are matched whole."""

FAULTS = (ValueError, LookupError, TypeError, ArithmeticError, struct.error)
"""What the `gguf` package raises for a file that is damaged or something else."""


class GgufFile:
    """One open GGUF file.

    Raises:
        UsageError: on opening, if the file is no GGUF, is cut short, or is of another architecture.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        check_header(path)
        try:
            self._reader = gguf.GGUFReader(path)
        except FAULTS as error:
            raise UsageError(
                f"{path} is not a whole GGUF file ({error}); fetch it again or check the name"
            ) from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        architecture = self.field("general.architecture")
        if architecture not in KNOWN_ARCHITECTURES:
            raise UsageError(
                f"{path} is of architecture {architecture!r}; known in GGUF: "
                f"{', '.join(KNOWN_ARCHITECTURES)}"
            )

    def field(self, name: str, default: Any = None) -> Any:
        """A metadata value, or `default` where the file has none."""
        field = self._reader.get_field(name)
        try:
            return default if field is None else field.contents()
        except FAULTS as error:
            raise UsageError(
                f"{self.path}: metadata {name!r} cannot be read ({error}); fetch the file again"
            ) from error

    def config(self) -> DecoderConfig:
        """The configuration that the metadata describes."""
        heads = self._need("llama.attention.head_count")
        width = self._need("llama.embedding_length")
        head_dim = self.field("llama.attention.key_length", width // heads)
        positions = self._need("llama.context_length")
        self._refuse_variants(head_dim, positions)
        table = self._tensors.get("token_embd.weight")
        if table is None:
            raise UsageError(f"{self.path} lacks tensor 'token_embd.weight'")
        config = DecoderConfig(
            # ggml lists the fastest-moving dimension first.
            vocab_size=int(table.shape[1]),
            hidden_size=width,
            intermediate_size=self._need("llama.feed_forward_length"),
            num_layers=self._need("llama.block_count"),
            num_heads=heads,
            num_kv_heads=self.field("llama.attention.head_count_kv", heads),
            head_dim=head_dim,
            rope_theta=_shortest(self.field("llama.rope.freq_base", 10000.0)),
            rms_norm_eps=_shortest(self._need("llama.attention.layer_norm_rms_epsilon")),
            tie_embeddings="output.weight" not in self._tensors,
            max_positions=positions,
        )
        if ROPE_FACTORS not in self._tensors:
            return config
        return self._with_rope_scaling(config)

    def parameters(
        self, config: DecoderConfig, dtype: DTypeLike, placement: Placement | None = None
    ) -> tuple[DecoderConfig, Parameters]:
        """Dequantises every tensor, cast to `dtype`; `config` comes back as it is."""
        found = {
            name: tuple(int(size) for size in tensor.shape[::-1])
            for name, tensor in self._tensors.items()
        }

        def tensors(kind: BlockKind | None) -> list[FileTensor]:
            return gguf_tensors(config, kind)

        check_layers(str(self.path), config, found)
        check_tensors(
            str(self.path), expected_tensors(config, tensors), found, ignored=[ROPE_FACTORS]
        )
        read = assemble(config, self._dequantise, tensors, dtype=dtype, placement=placement)
        return config, read

    def tokenizer(self) -> Tokenizer:
        """Rebuilds the tokenizer from the metadata.

        Raises:
            UsageError: if its model or pre-tokenizer is unknown.
        """
        kind, split = self.field("tokenizer.ggml.model"), self.field("tokenizer.ggml.pre")
        if kind != "gpt2":
            raise UsageError(
                f"{self.path}: tokenizer model {kind!r} is not supported; known: 'gpt2' "
                "(byte-level BPE). Load the Hugging Face folder of this model instead"
            )
        tokens: list[str] = self._need("tokenizer.ggml.tokens")
        kinds: list[int] = self.field("tokenizer.ggml.token_type", [1] * len(tokens))
        merges = [tuple(line.split(" ")) for line in self._need("tokenizer.ggml.merges")]
        pre_tokenizer, ignore_merges = _pre_tokenizer(str(self.path), split)
        vocabulary = {token: index for index, token in enumerate(tokens)}
        try:
            model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges)
        except Exception as error:  # the library raises bare Exception for every fault
            raise UsageError(
                f"{self.path}: the tokenizer metadata do not fit together ({error})"
            ) from error
        backend = tokenizers.Tokenizer(model)
        backend.pre_tokenizer = pre_tokenizer
        backend.decoder = decoders.ByteLevel()
        for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
            added = [token for token, which in zip(tokens, kinds, strict=True) if which == kind]
            backend.add_tokens(
                [tokenizers.AddedToken(text, special=special, normalized=False) for text in added]
            )
        bos, eos, eot, unknown, padding = (
            self._token_id(name, len(tokens))
            for name in ("bos", "eos", "eot", "unknown", "padding")
        )
        if self.field("tokenizer.ggml.add_bos_token", False) and bos is not None:
            backend.post_processor = tokenizers.processors.TemplateProcessing(
                single=f"{tokens[bos]} $A",
                pair=f"{tokens[bos]} $A $B",
                special_tokens=[(tokens[bos], bos)],
            )
        ends = [eos, eot]
        ends += [i for i, token in enumerate(tokens) if token in END_OF_GENERATION]
        named = {
            f"{name}_token": tokens[index]
            for name, index in (("bos", bos), ("eos", eos), ("unk", unknown), ("pad", padding))
            if index is not None
        }
        return Tokenizer(
            backend,
            bos_id=bos,
            eos_ids=[index for index in ends if index is not None],
            chat_template=self.field("tokenizer.chat_template"),
            special_tokens=named,
        )

    def _token_id(self, name: str, count: int) -> int | None:
        index = self.field(f"tokenizer.ggml.{name}_token_id")
        if index is not None and not 0 <= index < count:
            raise UsageError(
                f"{self.path}: {name}_token_id={index} is outside the vocabulary of {count}"
            )
        return index

    def _need(self, name: str) -> Any:
        value = self.field(name)
        if value is None:
            raise UsageError(f"{self.path} lacks metadata {name!r}")
        return value

    def _dequantise(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        try:
            return dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise UsageError(
                f"{self.path}: tensor {name!r} is quantised as {tensor.tensor_type.name}, which "
                "the gguf package cannot expand; use another quantisation of this model"
            ) from error

    def _refuse_variants(self, head_dim: int, positions: int) -> None:
        turned = self.field("llama.rope.dimension_count", head_dim)
        if turned != head_dim:
            raise UsageError(f"{self.path}: rotary over {turned} of {head_dim} is not supported")
        if self.field("llama.expert_count", 0):
            raise UsageError(f"{self.path}: mixtures of experts are not supported")
        window = self.field("llama.attention.sliding_window", 0)
        if window and window < positions:
            raise UsageError(
                f"{self.path}: sliding_window={window} below context {positions} is not supported"
            )
        scaling = self.field("llama.rope.scaling.type", "none")
        if scaling != "none" and self.field("llama.rope.scaling.factor", 1.0) != 1.0:
            raise UsageError(f"{self.path}: rope scaling of type {scaling!r} is not supported")

    def _with_rope_scaling(self, config: DecoderConfig) -> DecoderConfig:
        # The file holds the divisors, not Llama 3.1's four numbers. The largest divisor is the
        # factor; the others are the same in every published model: so guess, then verify.
        divisors = self._dequantise(ROPE_FACTORS).astype(np.float64).reshape(-1)
        guess = Llama3RopeScaling(
            factor=_shortest(divisors.max()),
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_positions=8192,
        )
        scaled = dataclasses.replace(config, rope_scaling=guess)
        before, after = config.rope(), scaled.rope()
        assert before is not None and after is not None
        wanted = inverse_frequencies(before) / divisors
        if not np.allclose(inverse_frequencies(after), wanted, rtol=1e-4):
            raise UsageError(
                f"{self.path}: {ROPE_FACTORS} is not Llama 3's rope scaling, the one supported"
            )
        return scaled


def _pre_tokenizer(source: str, name: str | None) -> tuple[pre_tokenizers.PreTokenizer, bool]:
    """The splitter of a named tokenizer, and whether whole words skip the merges."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in ("gpt-2", "default", None):
        return byte_level, False
    if name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, byte_level]), False
    if name in ("llama-bpe", "llama-v3", "llama3"):
        split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), behavior="isolated")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([split, plain]), True
    raise UsageError(
        f"{source}: pre-tokenizer {name!r} is not known; known: gpt-2, smollm, llama-bpe. "
        "Load the Hugging Face folder of this model instead"
    )


def _shortest(value: float) -> float:
    # Metadata are float32: 1e-05 comes back as 9.999999747378752e-06.
    return float(str(np.float32(value)))
