#!/usr/bin/env bash
# Guess: compiled.cost_analysis()["flops"] of a model whose 32 layers run in a lax.scan is that of the
# same layers written out, as the scan's length is known when it is compiled
# What happens: the body of a loop is counted once: 32 layers in a scan count as one, and so does
# "bytes accessed". A share of the peak (MFU) or a plan made from it is 32 times too small
# Seen: jax 0.12.0.1 and 0.10.2, on a CPU, 2026-12-01
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

layers, width = 32, 64


def scanned(x, weights):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]


def written_out(x, weights):
    for i in range(layers):
        x = x @ weights[i]
    return x


x, weights = jnp.zeros((width, width)), jnp.zeros((layers, width, width))
found = {
    f: jax.jit(f).lower(x, weights).compile().cost_analysis()["flops"]
    for f in (scanned, written_out)
}
for f, count in found.items():
    print(f"{f.__name__}: {count:,.0f} operations; {layers} products are {layers * 2 * width**3:,}")
once, whole = found.values()
raise SystemExit(0 if whole >= layers * 2 * width**3 and once < 1.1 * whole / layers else 1)
SEE
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/see.py"
