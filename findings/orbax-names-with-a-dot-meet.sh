#!/usr/bin/env bash
# Guess: a checkpoint gives back the tree that was saved, whatever its dictionaries' keys are: weights
# under {"lora.a": ...}, a flat name as PyTorch has them, stay apart from those under {"lora": {"a": ...}}
# What happens: both are one array in the file, "lora.a". Both are written, one of them is left, and
# loading, with the same tree as a target too, gives it for both: no error, the other is lost. Which
# one is left is by chance, and now and then the save raises ALREADY_EXISTS. A "/" in a key is kept apart
# Seen: orbax-checkpoint 0.12.8, both APIs, jax 0.12.0.1, on a CPU, 2026-12-01
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
    jax==0.12.0.1 jaxlib==0.12.0.1 orbax-checkpoint==0.12.8 numpy==2.5.5 2>"$work/pip.log" || { cat "$work/pip.log"; exit 77; }
cat >"$work/see.py" <<'SEE'
import tempfile
import warnings

import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import v1

warnings.simplefilter("ignore")


def first_api(folder, tree):
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(folder, tree)
    checkpointer.wait_until_finished()
    return checkpointer.restore(folder, tree)


def new_api(folder, tree):
    v1.save(folder, tree)
    return v1.load(folder, tree)


found = {}
for api in (first_api, new_api):
    for mark in "./":
        flat = f"lora{mark}a"
        tree = {flat: jnp.array(1.0), "lora": {"a": jnp.array(2.0)}}
        with tempfile.TemporaryDirectory() as folder:
            try:
                loaded = api(f"{folder}/step", tree)
                values = float(loaded[flat]), float(loaded["lora"]["a"])
            except ValueError as error:
                values = f"refused: {str(error)[:40]}"
        found[api, mark] = values
        print(f"{api.__name__}: {flat!r} = 1 and 'lora' / 'a' = 2 come back as {values}")
apart = all(found[api, "/"] == (1, 2) for api in (first_api, new_api))
raise SystemExit(
    0 if apart and all(found[api, "."] != (1, 2) for api in (first_api, new_api)) else 1
)
SEE
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/see.py"
