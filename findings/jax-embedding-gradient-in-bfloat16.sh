#!/usr/bin/env bash
# Guess: the gradient of a bfloat16 embedding table adds a token's rows as a product does, in float32:
# 1,000 places of slope 1 give 1,000
# What happens: a lookup's gradient is a scatter that adds in bfloat16, where 256 + 1 is 256: frequent
# tokens stop learning from their 257th place on. The same lookup as a product with one-hot rows gives
# 1,000
# Seen: jax 0.12.0.1, on a CPU, 2026-11-30
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

table, tokens = jnp.zeros((2, 4), jnp.bfloat16), jnp.zeros(1000, jnp.int32)
looked_up = jax.grad(lambda table: table[tokens].sum())(table)[0, 0].item()
product = jax.grad(lambda table: (jax.nn.one_hot(tokens, 2, dtype=table.dtype) @ table).sum())(table)
print(f"lookup {looked_up}, product {product[0, 0].item()}, of 1000")
raise SystemExit(0 if (looked_up, product[0, 0].item()) == (256.0, 1000.0) else 1)
SEE
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/see.py"
