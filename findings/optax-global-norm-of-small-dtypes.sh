#!/usr/bin/env bash
# Guess: optax.global_norm of 1,000 leaves of norm 1 is sqrt(1000) = 31.6, and clip_by_global_norm(1)
# makes a gradient of that length, in any dtype
# What happens: squares are added in the leaves' own dtype. In bfloat16 a sum of ones ends at 256:
# norm 16, and the clipped gradient is twice as long as asked for. In float16 1,000 leaves of
# norm 10 overflow to inf, and the clipped gradient is zero
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


def clipped(leaf):
    tree = [leaf] * 1000
    found = optax.clip_by_global_norm(1.0).update(tree, optax.EmptyState())[0]
    wide = [float(x) ** 2 for x in jax.tree.leaves(found)]
    return float(optax.global_norm(tree)), sum(wide) ** 0.5


coarse, narrow = clipped(jnp.ones((), jnp.bfloat16)), clipped(jnp.full((), 10, jnp.float16))
print(f"bfloat16: norm {coarse[0]:.2f} of 31.62, clipped to {coarse[1]:.2f}")
print(f"float16: norm {narrow[0]:.2f} of 316.23, clipped to {narrow[1]:.2f}")
as_stated = coarse[0] == 16.0 and coarse[1] > 1.9
raise SystemExit(0 if as_stated and narrow == (float("inf"), 0.0) else 1)
SEE
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/see.py"
