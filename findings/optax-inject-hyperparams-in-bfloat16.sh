#!/usr/bin/env bash
# Guess: optax.inject_hyperparams(optax.adam) steps as optax.adam does
# What happens: numbers are kept in the dtype of the parameters. In bfloat16 b2 = 0.999 is 1.0, so
# the second moment stays 0, its bias correction divides 0 by 0, and the first update is nan; without
# inject_hyperparams the same parameters train
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
import jax.numpy as jnp
import optax

parameter, gradient = jnp.ones((), jnp.bfloat16), jnp.full((), 0.5, jnp.bfloat16)
plain, injected = optax.adam(1e-2), optax.inject_hyperparams(optax.adam)(learning_rate=1e-2)
first = plain.update(gradient, plain.init(parameter), parameter)[0]
state = injected.init(parameter)
other = injected.update(gradient, state, parameter)[0]
print(f"optax.adam: {first}; injected, b2 = {state.hyperparams['b2']}: {other}")
raise SystemExit(0 if jnp.isfinite(first) and jnp.isnan(other) else 1)
SEE
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/see.py"
