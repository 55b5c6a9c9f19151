#!/usr/bin/env bash
# Guess: on a GPU it does not matter much whether the weights of `x @ w` lie inputs first [K, N] or
# outputs first [N, K]: bfloat16 products take both, and turning 59 MB round takes some 30 us
# What happens: a product of two float8 matrices with [K, N] weights takes ten times as long as with
# [N, K] (408 us against 25), longer than the same product in bfloat16 (38 us)
# Seen: jax 0.11.2 (jax[cuda13]), one H200, driver 580.159, 64 rows, K 4096, N 14336, 2026-11-30
set -euo pipefail
command -v nvidia-smi >/dev/null || { echo "no NVIDIA GPU here"; exit 77; }
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python=""
for name in python3.13 python3.12 "$HOME"/.pyenv/versions/3.*/bin/python; do
    if [ -z "$python" ] && "$name" -c 'import sys; sys.exit(not (3, 12) <= sys.version_info < (3, 14))' 2>/dev/null; then
        python="$name"
    fi
done
[ -n "$python" ] || { echo "no Python 3.12 to 3.13 here"; exit 77; }
"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    'jax[cuda13]==0.11.2' jaxlib==0.11.2 numpy==2.5.2 2>"$work/pip.log" || { cat "$work/pip.log"; exit 77; }
cat >"$work/see.py" <<'SEE'
import time

import jax
import jax.numpy as jnp

if not str(getattr(jax.devices()[0], "compute_capability", "0")) >= "8.9":
    raise SystemExit(77)
ROWS, INPUTS, OUTPUTS, COUNT = 64, 4096, 14336, 12


def microseconds(dtype, outputs_first):
    shape = (OUTPUTS, INPUTS) if outputs_first else (INPUTS, OUTPUTS)
    axes = (((1,), (1 if outputs_first else 0,)), ((), ()))
    make = jax.jit(lambda key: jax.random.normal(key, shape, jnp.bfloat16).astype(dtype))
    weights = [make(key) for key in jax.random.split(jax.random.key(0), COUNT)]
    x = jax.random.normal(jax.random.key(1), (COUNT, ROWS, INPUTS), jnp.bfloat16).astype(dtype)

    @jax.jit
    def run(x, weights):
        return [
            jax.lax.dot_general(x[i], w, axes, preferred_element_type=jnp.bfloat16)
            for i, w in enumerate(weights)
        ]

    jax.block_until_ready(run(x, weights))
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        jax.block_until_ready(run(x, weights))
        best = min(best, time.perf_counter() - start)
    return best / COUNT * 1e6


wide = microseconds(jnp.bfloat16, False)
inputs_first, outputs_first = (microseconds(jnp.float8_e4m3fn, o) for o in (False, True))
print(f"bfloat16 {wide:.0f} us; float8 inputs first {inputs_first:.0f}, outputs first {outputs_first:.0f}")
raise SystemExit(0 if inputs_first > 3 * outputs_first and inputs_first > wide else 1)
SEE
"$work/venv/bin/python" "$work/see.py"
