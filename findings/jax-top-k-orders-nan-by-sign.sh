#!/usr/bin/env bash
# Guess: lax.top_k puts every NaN at the same end, as argmax and argsort do
# What happens: it orders by bits: the NaN of jnp.nan comes first and the NaN that 0/0 computes on
# x86 (sign bit set) comes last; likewise 0.0 comes before -0.0
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
import platform

import jax
import jax.numpy as jnp
from jax import lax

if platform.machine() not in ("x86_64", "AMD64"):
    print("the sign of a computed NaN is another on this processor")
    raise SystemExit(77)
written = jnp.array([1.0, jnp.nan, 2.0])
computed = jax.jit(lambda x, y: x.at[1].set(y / y))(jnp.array([1.0, 0.0, 2.0]), jnp.float32(0))
first = [int(lax.top_k(x, 1)[1][0]) for x in (written, computed)]
most = [int(jnp.argmax(x)) for x in (written, computed)]
zeros = int(lax.top_k(jnp.array([-0.0, 0.0]), 1)[1][0])
print(f"{written.tolist()}: top_k {first[0]}, argmax {most[0]}")
print(f"{computed.tolist()}: top_k {first[1]}, argmax {most[1]}")
print(f"of [-0.0, 0.0] top_k takes {zeros}")
raise SystemExit(0 if first == [1, 2] and most == [1, 1] and zeros == 1 else 1)
SEE
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/see.py"
