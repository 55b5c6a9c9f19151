#!/usr/bin/env bash
# Guess: jax.nn.scaled_dot_general with an mxfp8 configuration gives 0 for a row of zeros, such as
# padding
# What happens: a block of 32 zeros gets the scale NaN and the whole row of the product becomes
# NaN
# Seen: jax 0.12.0.1 (0.10.2 has no lowering for a CPU), on a CPU, 2026-11-30
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

x = jax.random.normal(jax.random.key(0), (1, 64, 64)).at[0, 0].set(0)
config = jax.nn.get_scaled_dot_general_config("mxfp8")
axes = (((2,), (2,)), ((0,), (0,)))
found = jax.nn.scaled_dot_general(x, x, axes, configs=[config] * 3)[0]
print(f"row 0, all zeros: {found[0, :4].tolist()}; row 1: {found[1, 1:4].tolist()}")
zero, rest = found[0], found[1:, 1:]
raise SystemExit(0 if bool(jnp.isnan(zero).all()) and bool(jnp.isfinite(rest).all()) else 1)
SEE
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/see.py"
