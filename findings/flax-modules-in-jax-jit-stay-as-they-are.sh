#!/usr/bin/env bash
# Guess: a training step over an nnx model and its nnx.Optimizer works under jax.jit as it does under
# nnx.jit, or is refused, as modules were no valid argument of jax.jit in earlier flax
# What happens: modules are pytrees now, and jax.jit hands the step copies: optimizer.update changes
# them and they are dropped. The loss comes back, step after step the same one, without an error or
# a warning; likewise a Dropout draws one mask for ever, and a BatchNorm's means stay 0
# Seen: flax 0.12.12, jax 0.12.0.1, on a CPU, 2026-12-01
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
    jax==0.12.0.1 jaxlib==0.12.0.1 flax==0.12.12 optax==0.2.8 numpy==2.5.5 2>"$work/pip.log" || { cat "$work/pip.log"; exit 77; }
cat >"$work/see.py" <<'SEE'
import jax
import jax.numpy as jnp
import optax
from flax import nnx

x = jnp.ones((1, 4))


def step(model, optimizer):
    loss, gradients = nnx.value_and_grad(lambda model: (model(x) ** 2).sum())(model)
    optimizer.update(model, gradients)
    return loss


found = {}
for name, jit in {"nnx.jit": nnx.jit, "jax.jit": jax.jit}.items():
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.05), wrt=nnx.Param)
    run, dropout = jit(step), nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    drop = jit(lambda dropout: dropout(jnp.ones(64)))
    losses = [float(run(model, optimizer)) for _ in range(4)]
    same = bool((drop(dropout) == drop(dropout)).all())
    found[name] = losses, int(optimizer.step[...]), same
    print(f"{name}: losses {[round(loss, 3) for loss in losses]}")
    print(f"    {found[name][1]} steps counted; the same dropout twice: {same}")
trained, kept = found.values()
raise SystemExit(
    0
    if trained[0][3] < trained[0][0] / 2 and len(set(kept[0])) == 1 and kept[1:] == (0, True)
    else 1
)
SEE
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/see.py"
