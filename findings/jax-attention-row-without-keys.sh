#!/usr/bin/env bash
# Guess: a query whose mask lets it see no key gets zeros from jax.nn.dot_product_attention, or
# NaN, as a softmax over nothing would give
# What happens: it gets the mean of all values, masked ones included, and passes gradients on to
# them
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

q = jax.random.normal(jax.random.key(0), (1, 2, 1, 8))
k = jax.random.normal(jax.random.key(1), (1, 4, 1, 8))
v = jnp.arange(4.0)[None, :, None, None] * jnp.ones((1, 4, 1, 8))
mask = jnp.array([[True] * 4, [False] * 4])[None, None]


def second_row(v):
    return jax.nn.dot_product_attention(q, k, v, mask=mask)[0, 1, 0, 0]


found = float(second_row(v))
reached = float(jax.grad(second_row)(v).sum())
print(f"values 0, 1, 2, 3, none visible: {found}; sum of gradients to them: {reached}")
raise SystemExit(0 if abs(found - 1.5) < 1e-6 and abs(reached - 1) < 1e-6 else 1)
SEE
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/see.py"
