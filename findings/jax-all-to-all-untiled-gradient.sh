#!/usr/bin/env bash
# Guess: lax.all_to_all(tiled=False) can be differentiated like tiled=True: its transpose is the
# exchange the other way
# What happens: forward it is right, but reverse mode raises ValueError (expected cotangent type)
# wherever split_axis and concat_axis differ
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
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

mesh = Mesh(np.array(jax.devices()), ("a",))


def exchange(tiled):
    def run(x):
        return lax.all_to_all(x, "a", split_axis=0, concat_axis=1, tiled=tiled)

    spec = PartitionSpec(None, "a")
    return jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec)


def outcome(tiled):
    x = jnp.arange(96.0).reshape(4, 8, 3)
    forward = exchange(tiled)(x)
    try:
        gradient = jax.grad(lambda x: (exchange(tiled)(x) ** 2).sum())(x)
    except ValueError as error:
        return forward.shape, str(error)[:100]
    return forward.shape, "right" if bool(jnp.allclose(gradient, 2 * x)) else "wrong"


found = {tiled: outcome(tiled) for tiled in (True, False)}
for tiled, (shape, gradient) in found.items():
    print(f"tiled={tiled}: forward {shape}; gradient: {gradient}")
raise SystemExit(0 if found[True][1] == "right" and "cotangent" in found[False][1] else 1)
SEE
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/see.py"
