#!/usr/bin/env bash
# Guess: a cast and a product give the same number eagerly and under jax.jit
# What happens: the scale 2**-127 (byte 0 of float8_e8m0fnu, subnormal in float32) times 2**127 is
# 0 eagerly, where the float32 in between is flushed, and 1 under jit, where it is not
# Seen: jax 0.10.2 and 0.12.0.1, on a CPU, 2026-11-30
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
    jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5 2>"$work/pip.log" || { cat "$work/pip.log"; exit 77; }
cat >"$work/see.py" <<'SEE'
import jax
import jax.numpy as jnp
from jax import lax

scale = lax.bitcast_convert_type(jnp.zeros(1, jnp.uint8), jnp.float8_e8m0fnu)


def product(scale):
    return scale.astype(jnp.float32) * 2.0**127


eager, jitted = product(scale)[0].item(), jax.jit(product)(scale)[0].item()
print(f"2**-127 * 2**127: eager {eager}, jit {jitted}")
raise SystemExit(0 if (eager, jitted) == (0.0, 1.0) else 1)
SEE
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/see.py"
