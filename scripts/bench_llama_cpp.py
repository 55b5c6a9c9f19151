#!/usr/bin/env python
"""Decodes the packaged SmolLM2-135M with llama.cpp on this CPU, to hold the server's engine to.

Needs `llama-cpp-python` (it compiles llama.cpp), in any environment: `--python` names its
interpreter. The packaged weights are written out again as float32 and as Q8_0, the precisions
nearest to the engine's float32 and int8. JSON goes to results/serve_llama_cpp.json;
`scripts/bench_serve.py cpu` measures the engine.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from jaxsys.model.load import default_model_path
from jaxsys.results import table, write_result

INSIDE = """
import json, sys, time
import llama_cpp
from llama_cpp import Llama

source, folder, context, tokens, threads = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
rows = []
kinds = {"float32": llama_cpp.LLAMA_FTYPE_ALL_F32, "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0}
for name, kind in [*kinds.items(), ("q4_1 as packaged", None)]:
    path = source
    if kind is not None:
        path = f"{folder}/{name}.gguf"
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype, settings.allow_requantize = kind, True
        if llama_cpp.llama_model_quantize(source.encode(), path.encode(), settings):
            sys.exit(f"writing {name} failed")
    model = Llama(path, n_ctx=context + 2 * tokens, n_threads=threads, n_threads_batch=threads,
                  verbose=False)
    prompt = [1 + i % 1000 for i in range(context)]
    start = time.perf_counter()
    model.eval(prompt)
    prefill_s = time.perf_counter() - start
    for _ in range(8):
        model.eval([5])
    start = time.perf_counter()
    for i in range(tokens):
        model.eval([7 + i])
    seconds = time.perf_counter() - start
    rows.append({"weights": name, "threads": threads, "context": context,
                 "tokens_per_s": round(tokens / seconds, 2),
                 "prefill_tokens_per_s": round(context / prefill_s, 1)})
print(json.dumps({"version": llama_cpp.__version__, "rows": rows}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench_llama_cpp.py", description=__doc__)
    parser.add_argument("--python", default=sys.executable, help="one that has llama-cpp-python")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("results/serve_llama_cpp.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        line = [options.python, "-c", INSIDE, str(default_model_path()), folder]
        line += [str(options.context), str(options.tokens), str(options.threads)]
        done = subprocess.run(line, check=False, capture_output=True, text=True)
    if done.returncode:
        print(f"bench_llama_cpp: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return 1
    found = json.loads(done.stdout.splitlines()[-1])
    config = {"llama_cpp_python": found["version"], "context": options.context}
    config |= {"tokens": options.tokens, "threads": options.threads}
    write_result(
        options.out, benchmark="serve_llama_cpp", kind="measured", config=config, rows=found["rows"]
    )
    print(table(found["rows"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
