#!/usr/bin/env bash
# Guess: the log-sum-exp that jax.nn.dot_product_attention(return_residual=True) returns beside
# its output is differentiable like the output, so that blocks of a ring can be merged by it and
# trained
# What happens: its derivative is exactly zero, without an error; a merge of two blocks gives the
# right output and wrong gradients of queries and keys
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

q, k, v = (jax.random.normal(jax.random.key(i), (1, 8, 2, 16)) for i in range(3))


def whole(q):
    return jax.nn.dot_product_attention(q, k, v)


def in_two_blocks(q):
    parts = [
        jax.nn.dot_product_attention(q, k[:, half], v[:, half], return_residual=True)
        for half in (slice(0, 4), slice(4, 8))
    ]
    outputs, sums = (jnp.stack(p) for p in zip(*parts))
    weights = jax.nn.softmax(sums, axis=0)
    return (weights[..., None] * outputs).sum(0)


def lse(q):
    return jax.nn.dot_product_attention(q, k, v, return_residual=True)[1].sum()


def gradient(f):
    return jax.grad(lambda q: (f(q) ** 2).sum())(q)


forward = float(abs(whole(q) - in_two_blocks(q)).max())
off = float(abs(gradient(whole) - gradient(in_two_blocks)).max() / abs(gradient(whole)).max())
of_lse = float(abs(jax.grad(lse)(q)).max())
print(f"outputs differ by {forward:.1e}; largest gradient of the log-sum-exp: {of_lse}")
print(f"the merged blocks' gradient of the queries is off by {100 * off:.0f} % of its largest")
raise SystemExit(0 if forward < 1e-5 and of_lse == 0 and off > 0.1 else 1)
SEE
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/see.py"
