#!/usr/bin/env bash
# Guess: a compiled program's text lists which devices each collective joins, replica_groups={{0,1},
# {2,3}} or in iota form [2,2]<=[4], whatever wrote the program, as it did up to JAX 0.10
# What happens: since JAX 0.11 a shard_map's all_gather says replica_groups=mesh['a'=2,'b'=2] {'b'},
# axes of the mesh and no device at all, which a reader of lists finds no groups in; the permute of
# the same program still lists its pairs
# Seen: jax 0.10.2 (lists), 0.11.2 and 0.12.0.1 (axes), on CPU devices, 2026-11-30
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
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

jax.config.update("jax_num_cpu_devices", 4)
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))


def both(x):
    shifted = jax.lax.ppermute(x, "b", [(0, 1), (1, 0)])
    return jax.lax.all_gather(shifted, "b", tiled=True)


run = jax.shard_map(
    both, mesh=mesh, in_specs=PartitionSpec("b"), out_specs=PartitionSpec(), check_vma=False
)
text = jax.jit(run).lower(jnp.ones(8)).compile().as_text()
groups = re.findall(r"replica_groups=(\S+ \{[^}]*\}|\{\{.*?\}\}|\[\S+)", text)
pairs = re.findall(r"source_target_pairs=\{\{.*?\}\}", text)
print("jax", jax.__version__)
print("all_gather:", groups)
print("ppermute:", pairs)
listed = any(re.fullmatch(r"\{\{.*\}\}|\[[0-9,]+\]<=.*", group) for group in groups)
by_axes = any(group.startswith("mesh[") and "{'b'}" in group for group in groups)
raise SystemExit(0 if by_axes and not listed and pairs else 1)
SEE
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/see.py"
