#!/usr/bin/env bash
# Guess: the product of two float8 matrices comes out wider (float32, or what it was summed in), as
# hardware gives it, since a sum of 256 products hardly fits eight bits
# What happens: `x @ w` is float8_e4m3fn again, and every sum past 464 is NaN, without a word, though
# no number and no true sum is large; `preferred_element_type` must be given
# Seen: jax 0.12.0.1 and 0.10.2, on a CPU, 2026-11-30
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

x = jnp.full((2, 256), 1.5, jnp.float8_e4m3fn)
w = jnp.full((256, 2), 1.5, jnp.float8_e4m3fn)
found = x @ w
wide = jnp.matmul(x, w, preferred_element_type=jnp.float32)
print(f"x @ w: {found.dtype}, {found[0, 0]}; in float32: {wide[0, 0]}")
as_stated = found.dtype == jnp.float8_e4m3fn and bool(jnp.isnan(found).all())
raise SystemExit(0 if as_stated and bool((wide == 576).all()) else 1)
SEE
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/see.py"
