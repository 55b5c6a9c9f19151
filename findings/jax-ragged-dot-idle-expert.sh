#!/usr/bin/env bash
# Guess: in lax.ragged_dot a group without rows takes no part, whatever its matrix holds
# What happens: on a CPU a NaN (or infinity) in the matrix of a group of size 0 turns every row of
# the result into NaN: all groups are multiplied and masked by zeros
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
import jax.numpy as jnp
from jax import lax

rows = jnp.ones((4, 3))
matrices = jnp.ones((3, 3, 2)).at[1].set(jnp.nan)
found = lax.ragged_dot(rows, matrices, jnp.array([2, 0, 2], jnp.int32))
right = lax.ragged_dot(rows, jnp.ones((3, 3, 2)), jnp.array([2, 0, 2], jnp.int32))
print(f"group sizes 2, 0, 2, NaN in the second matrix: {found.tolist()}, without: {right.tolist()}")
raise SystemExit(0 if bool(jnp.isnan(found).all()) and right.tolist() == [[3.0, 3.0]] * 4 else 1)
SEE
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/see.py"
