#!/usr/bin/env python
"""What guessing tokens gains: JSON into results/, a table on stdout.

scripts/bench_speculation.py gpu    Llama-3-8B's shape, random bfloat16 weights: time of a step that
                                    guesses against one that does not, by batch; and SmolLM2-135M,
                                    where it is installed, on texts that repeat themselves, and on
                                    one that does not
scripts/bench_speculation.py cpu    SmolLM2-135M alone
scripts/bench_speculation.py tiny   a tiny shape, to try the script

"break even" is the ratio of the two times: the tokens that a request must gain a step. In "right",
all guesses are known to be right: the most that guessing can bring. Every text is checked against
the one without guesses; in bfloat16 wider steps round otherwise, so the share of equal tokens is
told.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsys.errors import UsageError
from jaxsys.model import default_model_path, load
from jaxsys.results import table, write_result
from jaxsys.serve.clock import WallClock
from jaxsys.serve.executor import JaxExecutor
from jaxsys.serve.hooks import NoGovernor
from jaxsys.serve.requests import Request, SamplingParameters
from jaxsys.serve.speculation import Speculation, SpeculationConfig
from jaxsys.serve.steps import USUAL
from jaxsys.serve.turns import Turns
from studies import serving as benchmark
from studies.serving import Study

OF_STEPS = {
    "gpu": dataclasses.replace(
        benchmark.STUDIES["gpu"],
        pool_tokens=100_032,
        buckets=(1, 4, 16, 64),
        batches=(1, 4, 16, 64),
        prompts=(),
    ),
    "cpu": dataclasses.replace(
        benchmark.STUDIES["cpu"], buckets=(1, 4), batches=(1, 4), prompts=(), seconds=2.0
    ),
    "tiny": dataclasses.replace(
        benchmark.STUDIES["tiny"], batches=(1, 4), prompts=(), context=32, forms=()
    ),
}
OF_TEXTS = {
    "gpu": dataclasses.replace(
        benchmark.STUDIES["cpu"],
        dtype="bfloat16",
        page_size=64,
        pool_tokens=32_768,
        buckets=(1,),
        context=1024,
        prompts=(1024,),
        piece=1024,
    ),
    "cpu": dataclasses.replace(
        benchmark.STUDIES["cpu"], buckets=(1,), context=512, prompts=(512,), piece=512
    ),
}
CODE = """def area(width, height):
    if width < 0:
        raise ValueError("width must not be negative")
    if height < 0:
        raise ValueError("height must not be negative")
    return width * height


def volume(width, height, depth):
    if depth < 0:
        raise ValueError("depth must not be negative")
    return area(width, height) * depth
"""
PROMPTS = {
    "code said again": f"Repeat this Python code exactly, without any change:\n\n{CODE}",
    "code changed": f"Rename width to w in this code and write all of it:\n\n{CODE}",
    "a story": "Write a short story about a lighthouse keeper who finds a letter.",
}
OUTPUT = 160
"""Tokens of an answer."""
ROUNDS = 3


class Known(Speculation):
    """Guesses from texts that are known, all of them right; or always wrong."""

    def __init__(self, config: SpeculationConfig, texts: dict[Any, list[int]] | None):
        super().__init__(config)
        self.texts = texts

    def wanted(self, running, bucket):
        return bool(running)

    def draft(self, request):
        most = min(
            self.config.num_speculative_tokens, request.sampling.max_tokens - request.generated - 1
        )
        if self.texts is None:
            return [1] * max(0, most)
        return self.texts[request.request_id][request.generated : request.generated + most]


class Loop:
    """An instance's turns without a thread."""

    def __init__(self, study: Study, executor: JaxExecutor, speculation: Speculation | None):
        self.executor = executor
        self.scheduler = benchmark.scheduler_of(study, executor, speculation)
        self.turns = Turns(self.scheduler, NoGovernor(), WallClock(), self)
        self.turns.start()
        self.ended_at_s: list[float] = []
        self.gained = 0

    def dispatch(self, iteration):
        return self.executor.dispatch(iteration)

    def fetch(self, fetch):
        raise AssertionError(f"no host keeps pages: {fetch}")

    def ended(self, iteration, outcome, latency_s, now_s):
        if iteration.decodes and not iteration.prefills:
            self.ended_at_s.append(time.perf_counter())

    def completed(self, iteration, outcome, completion, now_s):
        self.gained += sum(completion.gained)

    def turn(self) -> None:
        flight = self.turns.turn()
        if flight is not None:
            self.turns.end(self.executor.collect(flight.handle))


def request_of(name: Any, prompt: list[int], count: int) -> Request:
    rule = SamplingParameters(max_tokens=count, temperature=0)
    return Request(name, sampling=rule, arrival_s=0.0, prompt_tokens=prompt)


def answer(study: Study, executor: JaxExecutor, prompt: list[int], speculation) -> Any:
    """One request's tokens, tokens a second behind the first, and the loop."""
    loop = Loop(study, executor, speculation)
    request = request_of("text", prompt, OUTPUT)
    loop.scheduler.add(request)
    while loop.scheduler.requests or loop.turns.in_flight:
        loop.turn()
    times = request.timing.token_times_s
    return request.output_tokens, (len(times) - 1) / (times[-1] - times[0]), loop


def steps_study(study: Study, guesses: SpeculationConfig, note) -> None:
    """Steps that guess against steps that do not."""
    config, parameters = benchmark.model_of(study.model, study.dtype)
    count = guesses.num_speculative_tokens
    executor = benchmark.build_executor(study, config, parameters, None, guesses=count)
    del parameters
    tables = executor.shapes.table_buckets
    compile_all(executor, tables)
    generator = np.random.default_rng(0)
    for batch in study.batches:
        found = {}
        for name, speculation in (("plain", None), ("guesses", Known(guesses, None))):
            loop = Loop(study, executor, speculation)
            context = study.context - study.page_size
            for index in range(batch):
                prompt = generator.integers(0, config.vocab_size, context).tolist()
                request = request_of(index, prompt, 3 * study.page_size)
                request.output_tokens, request.generated = [1], 1
                loop.scheduler.add_incoming(request)
            for request in loop.scheduler.reserve_incoming():
                loop.scheduler.start_received(request)
                executor.resume(request)
            assert len(loop.scheduler.running) == batch, "too few pages"
            began_s = None
            while loop.scheduler.running and len(loop.ended_at_s) < study.page_size + 8:
                loop.turn()
                if len(loop.ended_at_s) == 8 and began_s is None:
                    began_s = time.perf_counter()
                if began_s and time.perf_counter() - began_s > study.seconds:
                    break
            found[name] = statistics.median(np.diff(loop.ended_at_s[4:])) * 1e3
            while loop.turns.in_flight:
                loop.turn()
        note(
            {
                "study": "steps",
                "model": study.model,
                "batch": batch,
                "plain_ms": round(found["plain"], 3),
                "guesses_ms": round(found["guesses"], 3),
                "break_even": round(found["guesses"] / found["plain"], 2),
                "most": count + 1,
            }
        )


def texts_study(study: Study, guesses: SpeculationConfig, note) -> None:
    """Whole answers of the packaged model."""
    model = load(default_model_path(), jax.numpy.dtype(study.dtype))
    assert model.tokenizer is not None
    count = guesses.num_speculative_tokens
    executor = benchmark.build_executor(study, model.config, model.parameters, None, guesses=count)
    compile_all(executor, executor.shapes.table_buckets)
    for name, text in PROMPTS.items():
        chat = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        prompt = list(model.tokenizer.encode(chat))
        plain = answer(study, executor, prompt, None)[0]  # warms too
        # Rounds alternate, so that all see the same neighbours; of each way the quickest counts.
        rates: dict[str, list[float]] = {"plain": [], "ngram": [], "right": []}
        speculations = {"ngram": Speculation(guesses), "right": Known(guesses, {"text": plain})}
        last: dict[str, Any] = {}
        for _ in range(ROUNDS):
            rates["plain"].append(answer(study, executor, prompt, None)[1])
            for way, speculation in speculations.items():
                found, rate, loop = answer(study, executor, prompt, speculation)
                rates[way].append(rate)
                last[way] = found, loop
        plain_rate = max(rates["plain"])
        for way, (found, loop) in last.items():
            speculation = speculations[way]
            rate = max(rates[way])
            equal = sum(a == b for a, b in zip(found, plain, strict=False)) / len(plain)
            note(
                {
                    "study": "texts",
                    "text": name,
                    "way": way,
                    "tokens_per_s_plain": round(plain_rate, 1),
                    "tokens_per_s": round(rate, 1),
                    "times": round(rate / plain_rate, 2),
                    "tokens_a_step": round(loop.gained / max(1, loop.scheduler.iterations), 2),
                    "accepted": speculation.accepted_tokens,
                    "guessed": speculation.draft_tokens,
                    "equal_tokens": round(equal, 3),
                }
            )


def compile_all(executor: JaxExecutor, tables) -> None:
    for batch in executor.shapes.decode_buckets:
        executor.steps.compile(("sample", batch, USUAL[0]))
        for table_pages in tables:
            for kind in ("decode", "inputs"):
                executor.steps.compile((kind, batch, table_pages))
    for batch in executor.shapes.guessing_buckets:
        executor.steps.compile(("verify", batch, USUAL[0]))
        for table_pages in tables:
            executor.steps.compile(("several", batch, table_pages))


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench_speculation.py", description=__doc__)
    parser.add_argument("study", choices=OF_STEPS)
    parser.add_argument("--guesses", type=int, default=5, help="most tokens guessed at once")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the JSON")
    arguments = parser.parse_args()
    guesses = SpeculationConfig(num_speculative_tokens=arguments.guesses)
    path = arguments.out / f"speculation_{arguments.study}.json"
    rows: list[dict[str, Any]] = []

    def note(row: dict[str, Any]) -> None:
        rows.append(row)
        print("  ".join(f"{name}={value}" for name, value in row.items()), flush=True)
        write_result(
            path,
            benchmark=f"speculation_{arguments.study}",
            kind="measured",
            config={"guesses": dataclasses.asdict(guesses), "output_tokens": OUTPUT},
            rows=rows,
            figures={"device": jax.devices()[0].device_kind},
        )

    steps_study(OF_STEPS[arguments.study], guesses, note)
    texts = OF_TEXTS.get(arguments.study)
    if texts is not None:
        try:
            default_model_path()
        except UsageError as error:
            print(f"no texts: {error}", file=sys.stderr)
        else:
            texts_study(texts, guesses, note)
    for kind in ("texts", "steps"):
        if any(row["study"] == kind for row in rows):
            print(table([row for row in rows if row["study"] == kind]))
    print(f"written to {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
