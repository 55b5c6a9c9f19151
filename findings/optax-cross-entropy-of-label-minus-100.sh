#!/usr/bin/env bash
# Guess: softmax_cross_entropy_with_integer_labels gives nan for a label outside the vocabulary, as
# it does for one beyond its end, so that PyTorch's mark for "not counted", -100, is noticed
# What happens: a negative label counts from the end. -100 is the class V - 100, with its finite loss,
# and its gradient trains the model to say that class
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

logits = jax.random.normal(jax.random.key(0), (1, 1000))
losses = {
    label: float(optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array([label]))[0])
    for label in (-100, 900, 1000)
}
print(losses)
gradient = jax.grad(
    lambda x: optax.softmax_cross_entropy_with_integer_labels(x, jnp.array([-100])).sum()
)(logits)
pushed = int(jnp.argmin(gradient))
print(f"label -100 pushes up class {pushed}")
beyond = losses[1000] != losses[1000]
raise SystemExit(0 if losses[-100] == losses[900] and pushed == 900 and beyond else 1)
SEE
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/see.py"
