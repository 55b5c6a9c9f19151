#!/usr/bin/env bash
# Guess: jax.random.categorical draws from softmax(logits), whatever the logits' dtype
# What happens: the noise that it adds has that dtype too. In bfloat16 it takes so few values that
# many tokens tie at the top, and the first of them wins: of 4,096 equally likely tokens the mean
# index drawn is about 126, and not one is from the upper half; in float16 12 % are, in float32 half
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

keys = jax.random.split(jax.random.key(0), 5000)
upper = {}
for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
    logits = jnp.zeros(4096, dtype)
    drawn = jax.vmap(lambda key: jax.random.categorical(key, logits))(keys)
    upper[dtype.__name__] = float(jnp.mean(drawn >= 2048))
    print(f"{dtype.__name__}: mean token {drawn.mean():.0f} of 4096, "
          f"{upper[dtype.__name__]:.1%} in the upper half")
as_stated = upper["bfloat16"] == 0 and 0.08 < upper["float16"] < 0.17
raise SystemExit(0 if as_stated and 0.48 < upper["float32"] < 0.52 else 1)
SEE
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/see.py"
