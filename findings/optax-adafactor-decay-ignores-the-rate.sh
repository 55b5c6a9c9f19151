#!/usr/bin/env bash
# Guess: adafactor's weight_decay_rate is what weight_decay is of adamw, lion, lamb or adan: a step
# takes learning_rate * weight_decay of a weight off it, less as the rate's schedule falls
# What happens: it is not multiplied by the rate: each step takes weight_decay_rate itself. adamw's
# usual 0.1 at a rate of 1e-3 takes a tenth off in 1,000 steps without gradients; with adafactor a
# tenth is gone in one step, at a rate of 0 too
# Seen: optax 0.2.8, jax 0.12.0.1, on a CPU, 2026-12-01
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

weights, gradient = jnp.ones(4), jnp.zeros(4)


def step(optimizer):
    return float(optimizer.update(gradient, optimizer.init(weights), weights)[0][0])


found = {}
for rate in (1e-3, 1e-5, 0.0):
    found[rate] = (
        step(optax.adamw(rate, weight_decay=0.1)),
        step(optax.adafactor(rate, weight_decay_rate=0.1)),
    )
    adamw, adafactor = found[rate]
    print(f"rate {rate}: adamw takes {adamw:.1e} off a weight of 1, adafactor {adafactor:.1e}")
scaled = abs(found[1e-3][0] + 1e-4) < 1e-8 and found[0.0][0] == 0
raise SystemExit(0 if scaled and all(abs(other + 0.1) < 1e-6 for _, other in found.values()) else 1)
SEE
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/see.py"
