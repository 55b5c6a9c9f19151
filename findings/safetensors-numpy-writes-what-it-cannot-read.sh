#!/usr/bin/env bash
# Guess: safetensors.numpy reads back what it wrote; load(bytes) and load_file(path) read the same
# dtypes
# What happens: float8 arrays are written and neither function reads them (AttributeError: numpy
# has no float8_e4m3fn); bfloat16 is read by load_file, and load(bytes) raises KeyError('BF16')
# Seen: safetensors 0.7.0 and 0.8.0, on a CPU, 2026-11-30
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python=""
for name in python3.13 python3.12 python3.11 "$HOME"/.pyenv/versions/3.*/bin/python; do
    if [ -z "$python" ] && "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
        python="$name"
    fi
done
[ -n "$python" ] || { echo "no Python 3.11 to 3.13 here"; exit 77; }
"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    safetensors==0.8.0 numpy==2.3.5 ml_dtypes==0.5.4 2>"$work/pip.log" || { cat "$work/pip.log"; exit 77; }
cat >"$work/see.py" <<'SEE'
import tempfile

import ml_dtypes
import numpy as np
import safetensors.numpy

found = {}
with tempfile.TemporaryDirectory() as folder:
    for dtype in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn):
        content = safetensors.numpy.save({"x": np.ones((2, 2), dtype)})
        path = f"{folder}/x.safetensors"
        with open(path, "wb") as file:
            file.write(content)
        for name, read, source in (
            ("load", safetensors.numpy.load, content),
            ("load_file", safetensors.numpy.load_file, path),
        ):
            try:
                what = f"read as {read(source)['x'].dtype}"
            except (KeyError, AttributeError) as error:
                what = repr(error)
            found[np.dtype(dtype).name, name] = what
            print(f"{np.dtype(dtype).name}, {name}: {what}")
bad = [key for key, what in found.items() if not what.startswith("read")]
wanted = [("bfloat16", "load"), ("float8_e4m3fn", "load"), ("float8_e4m3fn", "load_file")]
raise SystemExit(0 if bad == wanted else 1)
SEE
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/see.py"
