#!/usr/bin/env bash
# Guess: with bfloat16 parameters Adam's second moment follows the gradients, if coarsely: after 3,000
# steps without a gradient 0.999^3000 = 5 % of it are left
# What happens: it is kept in bfloat16, where 0.999 times a number is that number again: it never
# falls. A parameter that once saw a large gradient keeps its small steps for good
# Seen: optax 0.2.8, jax 0.12.0.1, on a CPU, 2026-11-30
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
    jax==0.12.0.1 jaxlib==0.12.0.1 optax==0.2.8 numpy==2.5.5 2>"$work/pip.log" || { cat "$work/pip.log"; exit 77; }
cat >"$work/see.py" <<'SEE'
import jax
import jax.numpy as jnp
import optax

left = {}
for dtype in (jnp.bfloat16, jnp.float32):
    optimizer = optax.adam(1e-3)
    parameter = jnp.zeros((), dtype)
    state = optimizer.init(parameter)
    update = jax.jit(optimizer.update)
    for _ in range(10):
        state = update(jnp.ones((), dtype), state, parameter)[1]
    before = float(state[0].nu)
    for _ in range(3000):
        state = update(jnp.zeros((), dtype), state, parameter)[1]
    left[dtype.__name__] = float(state[0].nu) / before
print({name: f"{share:.3f} of it left" for name, share in left.items()})
raise SystemExit(0 if left["bfloat16"] == 1.0 and 0.04 < left["float32"] < 0.06 else 1)
SEE
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/see.py"
