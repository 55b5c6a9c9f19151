#!/usr/bin/env bash
# Guess: jax.random.normal(key, shape, jnp.bfloat16), as a model's initializers draw in that dtype,
# is the float32 draw, rounded: of a million about 63 are beyond 4 deviations, and the mean is 0
# What happens: it is made of a uniform number of 7 bits. There are 128 values, the largest 2.9
# deviations, and the mean is -0.011, eleven standard errors off
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

drawn = {
    dtype.__name__: jax.random.normal(jax.random.key(1), (1_000_000,), dtype).astype(jnp.float32)
    for dtype in (jnp.bfloat16, jnp.float32)
}
for name, x in drawn.items():
    print(f"{name}: {jnp.unique(x).size} values, largest {jnp.abs(x).max():.3f}, "
          f"mean {x.mean():+.4f}, standard error 0.001")
few, many = drawn["bfloat16"], drawn["float32"]
as_stated = jnp.unique(few).size == 128 and jnp.abs(few).max() < 3 and few.mean() < -0.008
raise SystemExit(0 if as_stated and jnp.abs(many).max() > 4 else 1)
SEE
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/see.py"
