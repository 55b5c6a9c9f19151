"""`/v1/embeddings`: prompts as vectors of length 1.

Final hidden states, behind the last norm: their mean over the prompt (the default), or the last
token's, as `pooling` says. Decoders trained to give embeddings say which they were trained for;
of others the mean tells more.
"""

import base64
from typing import Any, Literal

import numpy as np
import pydantic
from pydantic import Field

from jaxsys.model import Tokenizer
from jaxsys.serve.http.protocol import MAX_NAME, ListOf, Name, TokenId, check_tokens, encode
from jaxsys.serve.requests import FieldRefused

MAX_INPUTS = 2048
AT_ONCE = 32
"""Inputs of one request that are in the engine together."""


class EmbeddingRequest(pydantic.BaseModel):
    """Body of `/v1/embeddings`."""

    model_config = pydantic.ConfigDict(strict=True)

    model: Name | None = Field("", description=f"a text of at most {MAX_NAME} characters")
    input: str | ListOf[str] | ListOf[TokenId] | ListOf[ListOf[TokenId]] = Field(
        description="a text, a list of texts, a list of token ids, or a list of such lists"
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        "float", description="float or base64"
    )
    dimensions: int | None = Field(None, ge=1, description="a whole number, at least 1")
    pooling: Literal["mean", "last"] | None = Field("mean", description="mean or last")
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, description="a whole number from 1 on; -1 cuts to what fits"
    )

    def given(self) -> list[str | list[int]]:
        """The inputs as they came.

        Raises:
            UsageError: if there are none, or too many.
        """
        given: Any = self.input
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        if not 0 < len(given) <= MAX_INPUTS:
            raise FieldRefused(f"input has {len(given)} entries; give 1 to {MAX_INPUTS}", "input")
        return given

    def name(self, index: int) -> str:
        """What an input is called in messages."""
        return "input" if len(self.given()) == 1 else f"input[{index}]"

    def prompts(self, tokenizer: Tokenizer, most_characters: int, room: int) -> list[list[int]]:
        """The inputs as tokens, cut where that is asked for.

        Raises:
            UsageError: if one is empty, too long or no text.
        """
        most = self.truncate_prompt_tokens
        if most == 0:
            raise FieldRefused(
                "truncate_prompt_tokens=0 leaves no input; use 1 or more, or -1",
                "truncate_prompt_tokens",
            )
        found = []
        for index, one in enumerate(self.given()):
            name = self.name(index)
            if isinstance(one, str):
                tokens = encode(tokenizer, one, most_characters=most_characters, name=name)
            else:
                tokens = check_tokens(tokenizer, one, name)
            found.append(tokens if most is None else tokens[: room if most == -1 else most])
        return found


def entry(index: int, vector: list[float], form: str | None) -> dict[str, Any]:
    """One embedding of an answer."""
    shown: Any = vector
    if form == "base64":
        shown = base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
    return {"object": "embedding", "index": index, "embedding": shown}
