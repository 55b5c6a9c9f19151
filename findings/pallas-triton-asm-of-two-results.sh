#!/usr/bin/env bash
# Guess: pallas.triton.elementwise_inline_asm with two entries in result_shape_dtypes returns two
# arrays ("result_shape_dtypes: The shapes and dtypes of the results produced"), so that one piece
# of assembly can unpack both halves of a byte
# What happens: one result lowers; two trace, with the right shapes, and end in a ValueError when
# they are lowered ("2 outvars do not match 1 outvals"): the assembly must be run twice
# Seen: jax 0.10.2, 0.11.2 and 0.12.0.1, lowered for an H100 on a CPU, 2026-11-30
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
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

ONE = "add.s32 $0, $1, 1;", "=r,r"
TWO = "add.s32 $0, $2, 1; add.s32 $1, $2, 2;", "=&r,=r,r"
LIKE = jax.ShapeDtypeStruct((128,), jnp.int32)


def kernel(program, constraints, x_ref, *out_refs):
    results = triton.elementwise_inline_asm(
        program,
        args=[x_ref[...]],
        constraints=constraints,
        pack=1,
        result_shape_dtypes=[LIKE for _ in out_refs],
    )
    for out_ref, result in zip(out_refs, results, strict=True):
        out_ref[...] = result


def lowered(count, program, constraints):
    call = pl.pallas_call(
        functools.partial(kernel, program, constraints),
        out_shape=[LIKE] * count,
        compiler_params=triton.CompilerParams(),
    )
    device = jax.sharding.AbstractDevice(
        platform="gpu", device_kind="NVIDIA H100 80GB HBM3", num_cores=None
    )
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(call).trace(LIKE)
        try:
            traced.lower(lowering_platforms=("cuda",))
        except ValueError as error:
            return f"ValueError: {error}"
    return "lowered"


print("jax", jax.__version__)
found = [lowered(1, *ONE), lowered(2, *TWO)]
for count, outcome in zip((1, 2), found):
    print(f"{count} result(s): {outcome}")
raise SystemExit(0 if found[0] == "lowered" and "2 outvars do not match 1" in found[1] else 1)
SEE
JAX_PLATFORMS=cpu "$work/venv/bin/python" -W ignore "$work/see.py"
