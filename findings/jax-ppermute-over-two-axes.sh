#!/usr/bin/env bash
# Guess: lax.ppermute over the axes ('b', 'a') numbers devices as lax.axis_index(('b', 'a')) does,
# so that the device with index i receives from index i - 1
# What happens: 0.10.2 silently numbers them in the mesh's own order ('a', 'b'), unlike
# axis_index, all_gather and psum_scatter; 0.12.0.1 raises an error instead
# Seen: jax 0.10.2 (shown) and 0.12.0.1, on a CPU, 2026-11-30
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
    jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5 ml_dtypes==0.5.4 2>"$work/pip.log" || { cat "$work/pip.log"; exit 77; }
cat >"$work/see.py" <<'SEE'
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
axes = ("b", "a")


def around(_):
    own = lax.axis_index(axes)[None]
    return own, lax.ppermute(own, axes, [(i, (i + 1) % 8) for i in range(8)])


spec = PartitionSpec(("a", "b"))
run = jax.jit(jax.shard_map(around, mesh=mesh, in_specs=spec, out_specs=(spec, spec)))
own, received = (x.tolist() for x in run(np.arange(8.0)))
print(f"own index      {own}\nreceived from  {received}")
wanted = [(i - 1) % 8 for i in own]
in_mesh_order = [own[(place - 1) % 8] for place in range(8)]
raise SystemExit(0 if received != wanted and received == in_mesh_order else 1)
SEE
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/see.py"
