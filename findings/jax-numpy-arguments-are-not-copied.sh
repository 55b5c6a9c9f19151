#!/usr/bin/env bash
# Guess: jax.device_put and a jitted function have taken their NumPy argument when they return: its
# memory can be filled with the next batch, as a loader does that keeps one buffer
# What happens: on a CPU an array that begins at a multiple of 64 bytes is not copied but shared. What
# device_put returned changes with it, and a step that is still running reads the next batch: its sum
# of zeros is one of sevens. An array that begins elsewhere, as most of NumPy's do, is copied, so that
# it happens by chance. jnp.array copies
# Seen: jax 0.12.0.1, 0.11.2 and 0.10.2, on a CPU, 2026-12-01
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


def zeros(offset):
    """1,024 zeros that begin `offset` bytes behind a multiple of 64."""
    memory = np.zeros(4096 + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    return memory[start : start + 4096].view(np.float32)


@jax.jit
def step(batch, weights):
    for _ in range(10):
        weights = weights @ weights * 1e-3
    return (batch + 0 * weights[0, 0]).sum()  # after the products


weights = jnp.ones((700, 700))
step(zeros(0), weights).block_until_ready()
found = {}
for offset in (0, 16):
    batch = zeros(offset)
    put, copied = jax.block_until_ready((jax.device_put(batch), jnp.array(batch)))
    batch[:] = 7
    buffer = zeros(offset)
    total = step(buffer, weights)
    buffer[:] = 7
    found[offset] = float(put.sum()), float(copied.sum()), float(total)
    put, copied, total = found[offset]
    print(f"zeros {offset} bytes behind a multiple of 64, filled with sevens once handed over:")
    print(
        f"    sums {put:.0f} (device_put), {copied:.0f} (jnp.array), {total:.0f} (step under way)"
    )
raise SystemExit(0 if found[0] == (7168, 0, 7168) and found[16] == (0, 0, 0) else 1)
SEE
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/see.py"
