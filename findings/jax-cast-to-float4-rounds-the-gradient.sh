#!/usr/bin/env bash
# Guess: rounding weights through a small dtype, w.astype(float4_e2m1fn).astype(float32), as training
# for quantised weights does, passes gradients on as they come ("straight through")
# What happens: the transpose of a cast is the cast back, so that the gradient itself is rounded to
# four bits: all that are below 0.25 become 0, and nothing trains; all beyond 6 become 6. Through
# float8_e4m3fn those below 0.001 become 0 and those past 464 NaN. Written as
# w + stop_gradient(rounded - w), or with a custom derivative, they pass
# Seen: jax 0.12.0.1, on a CPU, 2026-12-01
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


def rounded(w, dtype):
    return w.astype(dtype).astype(jnp.float32)


def straight(w, dtype):
    return w + jax.lax.stop_gradient(rounded(w, dtype) - w)


def slope_of(how, dtype, slope):
    return jax.grad(lambda w: slope * how(w, dtype))(1.0)


slopes = (1e-4, 0.2, 0.7, 500.0)
found = {}
for name in ("float4_e2m1fn", "float8_e4m3fn"):
    for how in (rounded, straight):
        found[name, how] = [float(slope_of(how, name, slope)) for slope in slopes]
        print(f"{name}, {how.__name__}: slopes {list(slopes)} come back as {found[name, how]}")
small, wide = found["float4_e2m1fn", rounded], found["float8_e4m3fn", rounded]
passed = all(jnp.allclose(jnp.array(found[name, straight]), jnp.array(slopes)) for name, _ in found)
raise SystemExit(
    0
    if passed and small[:2] == [0, 0] and small[3] == 6 and wide[0] == 0 and wide[3] != wide[3]
    else 1
)
SEE
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/see.py"
