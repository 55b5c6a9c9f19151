#!/usr/bin/env bash
# Guess: a product of float32 matrices with precision=DotAlgorithmPreset.BF16_BF16_F32 is rounded to
# bfloat16 before it is multiplied wherever it is taken, or refused where that is not to be had, as a
# CPU refuses TF32_TF32_F32 and BF16_BF16_F32_X9
# What happens: on a CPU it is taken and computed in float32, as are its _X3 and _X6: an error of 1e-5
# where bfloat16 factors give 0.08. A test on a CPU of what the algorithm costs in accuracy sees
# nothing, and passes. F16_F16_F16 is done as it says
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
import numpy as np
from jax.lax import DotAlgorithmPreset

a = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
exact = a.astype(np.float64) @ a
factors = np.asarray(jnp.asarray(a).astype(jnp.bfloat16)).astype(np.float64)
found = {}
for name in ("BF16_BF16_F32", "BF16_BF16_F32_X3", "F32_F32_F32", "F16_F16_F16", "TF32_TF32_F32"):
    try:
        product = jax.lax.dot(
            a, a, precision=DotAlgorithmPreset[name], preferred_element_type=jnp.float32
        )
        found[name] = float(np.abs(product - exact).max())
    except ValueError as error:
        found[name] = f"refused, {str(error).splitlines()[0]}"
    print(f"{name}: {found[name]}")
rounded = float(np.abs(factors @ factors - exact).max())
print(f"factors in bfloat16, summed exactly: {rounded}")
same = found["BF16_BF16_F32"] == found["F32_F32_F32"] == found["BF16_BF16_F32_X3"] < 1e-4
refused = str(found["TF32_TF32_F32"]).startswith("refused")
raise SystemExit(0 if same and rounded > 0.01 and found["F16_F16_F16"] > 1e-3 and refused else 1)
SEE
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/see.py"
