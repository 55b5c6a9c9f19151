#!/usr/bin/env bash
# Guess: NumPy's mean of a bfloat16 array (what np.asarray of a bfloat16 JAX array is) is added up in
# something wider, as that of float16 is: the mean of 10,000 ones is 1
# What happens: it is added one by one in bfloat16, where 256 + 1 is 256: the mean of 10,000 ones is
# 0.0256, without a word, and so are sum, average, var, std and cumsum. Products (a @ b) add in
# float32. With dtype=np.float32 the mean is 1, and jnp.mean is right as it is
# Seen: ml_dtypes 0.6.0, numpy 2.5.5, on a CPU, 2026-12-01
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
    ml_dtypes==0.6.0 numpy==2.5.5 2>"$work/pip.log" || { cat "$work/pip.log"; exit 77; }
cat >"$work/see.py" <<'SEE'
import ml_dtypes
import numpy as np

found = {}
for dtype in (np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn):
    ones = np.ones(10_000, dtype)
    found[dtype] = float(ones.mean()), float(ones.mean(dtype=np.float32)), float(ones @ ones)
    mean, wide, product = found[dtype]
    print(f"{np.dtype(dtype)}: mean {mean}, in float32 {wide}; ones @ ones {product}")
half, brain, _ = found.values()
raise SystemExit(0 if half[0] == 1 and brain[0] < 0.03 and brain[1:] == (1, 10_000) else 1)
SEE
"$work/venv/bin/python" "$work/see.py"
