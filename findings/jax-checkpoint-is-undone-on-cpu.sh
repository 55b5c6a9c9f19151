#!/usr/bin/env bash
# Guess: jax.checkpoint, whose prevent_cse is on by default, makes a compiled gradient compute the
# block's forward products again and keep less
# What happens: 0.10.2 on a CPU compiles as many products as without it and takes as much memory:
# the barriers that should prevent it are dropped before equal expressions are merged; 0.11.2 and
# 0.12.0.1 compute them again
# Seen: jax 0.10.2 (shown), 0.11.2 and 0.12.0.1, on a CPU, 2026-11-30
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python=""
for name in python3.13 python3.12 python3.11 "$HOME"/.pyenv/versions/3.*/bin/python; do
    if [ -z "$python" ] && "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
        python="$name"
    fi
done
[ -n "$python" ] || { echo "no Python 3.11 to 3.13 here"; exit 77; }
"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5 ml_dtypes==0.5.4 2>"$work/pip.log" || { cat "$work/pip.log"; exit 77; }
cat >"$work/see.py" <<'SEE'
import re

import jax
import jax.numpy as jnp


def block(x, w):
    return jnp.tanh(jnp.tanh(x @ w) @ w)


def loss(w, x, block):
    for _ in range(4):
        x = block(x, w)
    return x.sum()


value = jax.ShapeDtypeStruct((64, 64), jnp.float32)
found = {}
for name, run in (("plain", block), ("checkpointed", jax.checkpoint(block))):
    text = jax.jit(jax.grad(lambda w, x: loss(w, x, run))).lower(value, value).compile().as_text()
    found[name] = len(re.findall(r"= f32\[64,64\]\S* dot\(", text))
    print(f"{name}: {found[name]} products")
raise SystemExit(0 if found["plain"] == found["checkpointed"] > 0 else 1)
SEE
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/see.py"
