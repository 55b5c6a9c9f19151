"""What sampling, and the device, are told of requests: arrays from their parameters."""

import dataclasses
import zlib
from collections.abc import Sequence

import numpy as np

from jaxsys.serve.requests import FieldRefused, Request, SamplingParameters
from jaxsys.serve.sampling import MAX_BIASED, MAX_STOPS, Rules, SamplingNeeds, pack_rules


def rules_of(requests: Sequence[Request], rows: int) -> tuple[Rules, SamplingNeeds]:
    """The rules of a step's rows, and what it must be able to do for them."""
    parameters = [request.sampling for request in requests]
    needs = SamplingNeeds()
    for rule in parameters:
        needs |= SamplingNeeds.of(rule)
    if needs.masked and needs.random:
        needs = dataclasses.replace(needs, cut=True)  # one step fewer to compile
    seeds = [seed_of(request) for request in requests]
    rules = pack_rules(parameters, seeds, rows, [one.prompt_length for one in requests])
    return rules, needs


def history_of(request: Request, vocabulary: int) -> tuple[np.ndarray, ...] | None:
    """What adjusting remembers of a request: prompt, output so far, bias; None without it."""
    sampling = request.sampling
    if not SamplingNeeds.of(sampling).adjusted:
        return None
    prompt = np.zeros(vocabulary, bool)
    prompt[np.asarray(request.prompt_tokens, np.int64)] = True
    counts = np.bincount(request.output_tokens, minlength=vocabulary).astype(np.int32)
    bias_tokens = np.full(MAX_BIASED, vocabulary, np.int32)
    bias_values = np.zeros(MAX_BIASED, np.float32)
    for entry, (token, value) in enumerate(sampling.logit_bias.items()):
        bias_tokens[entry], bias_values[entry] = token, value
    stop_tokens = np.full(MAX_STOPS, vocabulary, np.int32)
    if sampling.min_tokens:
        stop_tokens[: len(sampling.stop_token_ids)] = sorted(sampling.stop_token_ids)
    return prompt, counts, bias_tokens, bias_values, stop_tokens


def tokens_of(request: Request, start: int, length: int) -> Sequence[int]:
    """The tokens that are known of a request from one position on."""
    prompt = request.prompt_length
    if start + length <= prompt:
        return request.prompt_tokens[start : start + length]
    return request.known_tokens()[start : start + length]


def check_sampling(parameters: SamplingParameters, vocabulary: int) -> None:
    """Raises UsageError for what the device cannot take: too many biases, unknown tokens."""
    if len(parameters.logit_bias) > MAX_BIASED:
        raise FieldRefused(
            f"logit_bias has {len(parameters.logit_bias)} entries; at most {MAX_BIASED} are taken",
            "logit_bias",
        )
    for token in parameters.logit_bias:
        if not 0 <= token < vocabulary:
            said = f"logit_bias token {token} is none of 0..{vocabulary - 1}"
            raise FieldRefused(said, "logit_bias")
    if parameters.min_tokens and len(parameters.stop_token_ids) > MAX_STOPS:
        raise FieldRefused(
            f"min_tokens={parameters.min_tokens} beside {len(parameters.stop_token_ids)} tokens "
            f"that end the output, the model's own among them; at most {MAX_STOPS} are taken",
            "stop_token_ids",
        )


def seed_of(request: Request) -> int:
    """The request's seed; without one, a hash of what differs between requests.

    Not of its whole name: after `~` that counts attempts, which must draw the same.
    """
    if request.sampling.seed is not None:
        return request.sampling.seed
    name = str(request.request_id).partition("~")[0]
    return zlib.crc32(repr((name, request.timing.arrival_s)).encode())
