#!/usr/bin/env bash
# Guess: NCCL_P2P_DISABLE=1 (and NCCL_SHM_DISABLE=1, so that sockets are left) keeps every transfer
# between the GPUs of a jitted program off their direct link, as it does by default
# What happens: with xla_gpu_collective_permute_mode=COLLECTIVES_PEER_MEMORY a ppermute copies by
# peer access, which reads none of NCCL's settings: it stays as fast as the direct link, so that a
# benchmark of "slow links" measures NVLink
# Seen: jax 0.11.2 (jax[cuda13]), two H200s linked by NVLink, driver 580.159, 2026-11-30
set -euo pipefail
command -v nvidia-smi >/dev/null || { echo "no NVIDIA GPU here"; exit 77; }
[ "$(nvidia-smi -L | grep -c '^GPU ')" -ge 2 ] || { echo "two GPUs are needed"; exit 77; }
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
    'jax[cuda13]==0.11.2' jaxlib==0.11.2 numpy==2.5.2 2>"$work/pip.log" || { cat "$work/pip.log"; exit 77; }
cat >"$work/see.py" <<'SEE'
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

PEER = {"xla_gpu_collective_permute_mode": "COLLECTIVES_PEER_MEMORY"}
BYTES, TURNS = 2**28, 4
mesh, cut = Mesh(np.array(jax.devices()[:2]), ("ring",)), PartitionSpec("ring")


def gigabytes_per_second(options):
    def around(x):
        for _ in range(TURNS):
            x = lax.ppermute(x, "ring", [(0, 1), (1, 0)]) + 1
        return x

    run = jax.shard_map(around, mesh=mesh, in_specs=cut, out_specs=cut, check_vma=False)
    run = jax.jit(run, compiler_options=options)
    x = jax.device_put(jnp.zeros((2, BYTES // 4), jnp.float32), NamedSharding(mesh, cut))
    jax.block_until_ready(run(x))
    start = time.perf_counter()
    jax.block_until_ready(run(x))
    return TURNS * BYTES / (time.perf_counter() - start) / 1e9


nccl, peer = gigabytes_per_second({}), gigabytes_per_second(PEER)
print(f"ppermute of {BYTES >> 20} MiB through sockets: {nccl:.1f} GB/s by default, {peer:.1f} GB/s by peer copies")
raise SystemExit(0 if peer > 10 * nccl else 1)
SEE
NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1 NCCL_IB_DISABLE=1 "$work/venv/bin/python" "$work/see.py"
