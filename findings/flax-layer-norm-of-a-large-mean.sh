#!/usr/bin/env bash
# Guess: flax's LayerNorm, in float32, without scale and bias, gives rows of mean 0 and deviation 1
# What happens: it takes the variance as mean(x^2) - mean(x)^2 by default (use_fast_variance). Of rows
# with mean 10,000 and deviation 1 nothing is left of it, and their deviation comes out as some 700;
# with use_fast_variance=False it is 1
# Seen: flax 0.12.12, jax 0.12.0.1, on a CPU, 2026-11-30
set -euo pipefail
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
    jax==0.12.0.1 jaxlib==0.12.0.1 flax==0.12.12 numpy==2.5.5 2>"$work/pip.log" || { cat "$work/pip.log"; exit 77; }
cat >"$work/see.py" <<'SEE'
import flax.linen as nn
import jax
import jax.numpy as jnp

x = 10_000 + jax.random.normal(jax.random.key(0), (4, 1024))
found = {}
for fast in (True, False):
    norm = nn.LayerNorm(use_scale=False, use_bias=False, use_fast_variance=fast)
    found[fast] = float(jnp.std(norm.apply({}, x)))
print(f"deviation: by default {found[True]:.1f}, with use_fast_variance=False {found[False]:.4f}")
raise SystemExit(0 if found[True] > 100 and abs(found[False] - 1) < 0.01 else 1)
SEE
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/see.py"
