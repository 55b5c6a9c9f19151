"""Reads GGUF: llama.cpp's models of one file or several, with tokenizer and chat template.

Tensors stay memory-mapped and are dequantised some rows at a time through the `gguf` package. What
the metadata mean is `gguf_config`'s and `gguf_vocabulary`'s; where tensors lie, `gguf_names`'.
"""

import dataclasses
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize

from jaxsys.errors import UsageError
from jaxsys.model.assemble import (
    Checkpoint,
    check_layers,
    check_tensors,
    expected_tensors,
)
from jaxsys.model.config import DecoderConfig
from jaxsys.model.gguf_config import ARCHITECTURES, read_config, shortest
from jaxsys.model.gguf_header import check_header
from jaxsys.model.gguf_names import gguf_tensors
from jaxsys.model.gguf_vocabulary import read_vocabulary
from jaxsys.model.kinds import BlockKind
from jaxsys.model.names import FileTensor
from jaxsys.model.rope import Llama3RopeScaling, LongRopeScaling, inverse_frequencies
from jaxsys.model.rows import Rows
from jaxsys.model.tokenizer import Tokenizer

ROPE_FACTORS = "rope_freqs.weight"
"""Divisors of the rotary frequencies [K/2], how llama.cpp stores Llama 3.1's scaling."""
UNREAD = (ROPE_FACTORS, "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that are settings, not weights."""
UNFOLDING = re.compile(r"(blk\.\d+\.)attn_k_b\.weight")
"""Half of what unfolds latent vectors, where a file has it as llama.cpp multiplies: keys [N, C, P]
here, values [N, V, C] in attn_v_b."""

FAULTS = (ValueError, LookupError, TypeError, ArithmeticError, struct.error)
"""What the `gguf` package raises for a file that is damaged or something else."""

PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
MOST_PARTS = 1000


class GgufFile:
    """One open model, of one file or of the parts `NAME-00001-of-00003.gguf`.

    Raises:
        UsageError: on opening, if a file is no GGUF, is cut short, missing, or of another
            architecture.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = _open(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self._add_parts()
        self._unfoldings = {
            f"{match[1]}attn_kv_b.weight": (name, f"{match[1]}attn_v_b.weight")
            for name in self._tensors
            if (match := UNFOLDING.fullmatch(name)) is not None
        }
        architecture = self.field("general.architecture")
        if architecture not in ARCHITECTURES:
            raise UsageError(
                f"{path} is of architecture {architecture!r}; known in GGUF: "
                f"{', '.join(ARCHITECTURES)}"
            )
        self._architecture: str = architecture

    @property
    def name(self) -> str:
        """For errors."""
        return str(self.path)

    def field(self, name: str, default: Any = None) -> Any:
        """A metadata value, or `default` where the file has none."""
        field = self._reader.get_field(name)
        try:
            return default if field is None else field.contents()
        except FAULTS as error:
            raise UsageError(
                f"{self.path}: metadata {name!r} cannot be read ({error}); fetch the file again"
            ) from error

    def need(self, name: str) -> Any:
        """A metadata value; UsageError where the file has none."""
        value = self.field(name)
        if value is None:
            raise UsageError(f"{self.path} lacks metadata {name!r}")
        return value

    def shape(self, tensor: str) -> tuple[int, ...] | None:
        """A tensor's shape, None where there is none; ggml lists the fastest axis first."""
        found = self._tensors.get(tensor)
        if found is None and tensor in self._unfoldings:
            of_keys, of_values = (self.shape(name) for name in self._unfoldings[tensor])
            if of_keys is None or of_values is None or len(of_keys) != 3 or len(of_values) != 3:
                raise UsageError(f"{self.path} has but one of attn_k_b and attn_v_b, or no heads")
            return of_keys[0] * (of_keys[2] + of_values[1]), of_keys[1]
        return None if found is None else tuple(int(size) for size in found.shape[::-1])

    def values(self, tensor: str) -> Rows:
        """A tensor's numbers, dequantised some rows at a time."""
        shape = self.shape(tensor)
        assert shape is not None
        if tensor not in self._tensors:
            return self._unfolded(tensor, shape)
        found = self._tensors[tensor]
        data = found.data if len(shape) > 1 else found.data[None]

        def read(start: int, stop: int) -> np.ndarray:
            try:
                if len(shape) > 1:
                    return dequantize(data[start:stop], found.tensor_type)
                return dequantize(data, found.tensor_type)[0, start:stop]
            except NotImplementedError as error:
                raise UsageError(
                    f"{self.path}: tensor {tensor!r} is quantised as {found.tensor_type.name}, "
                    "which the gguf package cannot expand; use another quantisation of this model"
                ) from error

        return Rows(shape=shape, read=read)

    def _unfolded(self, tensor: str, shape: tuple[int, ...]) -> Rows:
        """What unfolds latent vectors, out of its two halves: heads one below the other."""
        of_keys, of_values = (self.values(name) for name in self._unfoldings[tensor])
        rows = of_keys.shape[2] + of_values.shape[1]  # of a head

        def read(start: int, stop: int) -> np.ndarray:
            heads = start // rows, -(-stop // rows)
            both = [of_keys.read(*heads).swapaxes(1, 2), of_values.read(*heads)]
            made = np.concatenate(both, axis=1).reshape(-1, shape[1])
            return made[start - heads[0] * rows :][: stop - start]

        return Rows(shape=shape, read=read)

    def config(self) -> DecoderConfig:
        """The configuration that the metadata describes."""
        config = read_config(self, self._architecture)
        if ROPE_FACTORS not in self._tensors:
            return config
        return self._with_rope_scaling(config)

    def open_parameters(self, config: DecoderConfig) -> Checkpoint:
        """All parameters, found and checked, to be dequantised tensor by tensor.

        Raises:
            UsageError: if the tensors are not the configuration's.
        """
        found = {name: self.shape(name) or () for name in (*self._tensors, *self._unfoldings)}
        halves = {name for pair in self._unfoldings.values() for name in pair}
        joined = self.shape("blk.0.attn_qkv.weight") is not None

        def tensors(kind: BlockKind | None) -> list[FileTensor]:
            return gguf_tensors(config, kind, joined_qkv=joined)

        ignored = {*UNREAD, *halves, *self._further(config)}
        found = {name: shape for name, shape in found.items() if name not in ignored}
        check_layers(str(self.path), config, found)
        check_tensors(str(self.path), expected_tensors(config, tensors), found)

        return Checkpoint(config=config, fetch=self.values, tensors=tensors)

    def forget_metadata(self) -> None:
        """Lets go of what a reader keeps of vocabularies, hundreds of MB; tensors stay."""
        self._reader.fields.clear()

    def _further(self, config: DecoderConfig) -> Iterator[str]:
        """Tensors of layers past the last, which predict further tokens; they are not read."""
        count = self.field(f"{self._architecture}.nextn_predict_layers", 0) or 0
        for layer in range(config.num_layers, config.num_layers + min(count, 64)):
            yield from (name for name in self._tensors if name.startswith(f"blk.{layer}."))

    def tokenizer(self) -> Tokenizer:
        """Rebuilds the tokenizer from the metadata.

        Raises:
            UsageError: if its model or pre-tokenizer is unknown.
        """
        return read_vocabulary(self)

    def _add_parts(self) -> None:
        """Opens the other files of a model in parts."""
        count = self.field("split.count", 0) or 0
        if count < 2:
            return
        part = PART.fullmatch(self.path.name)
        if self.field("split.no", 0) != 0 or part is None or int(part[3]) != count:
            raise UsageError(
                f"{self.path} is part {self.field('split.no', 0) + 1} of {count} of a model; give "
                f"the first one, named NAME-00001-of-{count:05d}.gguf"
            )
        if count > MOST_PARTS:
            raise UsageError(f"{self.path} says that it has {count} parts; at most {MOST_PARTS}")
        for number in range(2, count + 1):
            path = self.path.with_name(f"{part[1]}-{number:05d}-of-{count:05d}.gguf")
            if not path.is_file():
                raise UsageError(f"{self.path} has {count} parts, of which {path.name} is missing")
            for tensor in _open(path).tensors:
                if tensor.name in self._tensors:
                    raise UsageError(f"{path}: tensor {tensor.name!r} is in two parts")
                self._tensors[tensor.name] = tensor

    def _with_rope_scaling(self, config: DecoderConfig) -> DecoderConfig:
        # The file holds the divisors, not Llama 3.1's four numbers. The largest divisor is the
        # factor; the others are the same in every published model: so guess, then verify. Other
        # divisors are those of a long rope whose lengths are alike.
        rows = self.values(ROPE_FACTORS)
        divisors = rows.read(0, rows.shape[0]).astype(np.float64).reshape(-1)
        ropes = [rope for kind in config.kinds if (rope := config.rope(kind)) is not None]
        if not ropes:
            return config
        plain, finite = ropes[0], bool(np.isfinite(divisors).all())
        if divisors.shape != (plain.width // 2,) or not finite or not (divisors > 0).all():
            raise UsageError(
                f"{self.path}: {ROPE_FACTORS} must be {plain.width // 2} numbers above 0"
            )
        if (divisors == 1).all():
            return config
        if len(set(ropes)) > 1 or plain.scaling is not None:
            raise UsageError(
                f"{self.path}: {ROPE_FACTORS} beside another rope scaling is not computed"
            )
        wanted = inverse_frequencies(plain) / divisors
        if divisors.max() >= 1:
            guess = Llama3RopeScaling(
                factor=shortest(divisors.max()),
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_positions=8192,
            )
            found = inverse_frequencies(dataclasses.replace(plain, scaling=guess))
            if np.allclose(found, wanted, rtol=1e-4):
                return dataclasses.replace(config, rope_scaling=guess)
        factors = tuple(map(shortest, divisors))
        scaling = LongRopeScaling(
            short_factor=factors,
            long_factor=factors,
            original_max_positions=config.max_positions,
            attention_factor=1.0,
        )
        return dataclasses.replace(config, rope_scaling=scaling)


def _open(path: Path) -> gguf.GGUFReader:
    check_header(path)
    try:
        return gguf.GGUFReader(path)
    except FAULTS as error:
        raise UsageError(
            f"{path} is not a whole GGUF file ({error}); fetch it again or check the name"
        ) from error
