#!/usr/bin/env bash
# Guess: a lax.switch whose branches each write one of two buffers and hand the other on costs no
# copy, in a straight line as in a loop: what is handed on stays where it is
# What happens: in a straight line every switch after the first copies, in one of its branches, the
# buffer that this branch only hands on; the same switch in a scan copies neither, before or in it
# (the two arrays of zeros that the loop begins with are made by a copy each)
# Seen: jax 0.12.0.1 (shown) and 0.11.2, on a CPU; with 0.11.2 likewise on an NVIDIA H200, where the
# copies were 8 GiB a tick of a training step, 2026-11-30
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python=""
for name in python3.13 python3.12 "$HOME"/.pyenv/versions/3.1[23]*/bin/python; do
    if [ -z "$python" ] && "$name" -c 'import sys; sys.exit(not (3, 12) <= sys.version_info < (3, 14))' 2>/dev/null; then
        python="$name"
    fi
done
[ -n "$python" ] || { echo "no Python 3.12 or 3.13 here"; exit 77; }
"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.3.5 ml_dtypes==0.5.4 2>"$work/pip.log" || { cat "$work/pip.log"; exit 77; }
cat >"$work/see.py" <<'SEE'
import re

import jax
import jax.numpy as jnp

N = 256


def turn(buffers, x, weights, slot):
    """Writes what a product makes into one of two buffers."""

    def into(number):
        def branch(buffers, x):
            made = jnp.tanh(x @ weights)
            return (*buffers[:number], made, *buffers[number + 1 :]), made @ weights

        return branch

    return jax.lax.switch(slot, [into(0), into(1)], buffers, x)


def ends(buffers, x):
    return buffers[0].sum() + 2 * buffers[1].sum(), x


def straight(x, weights, slots):
    buffers = (jnp.zeros((N, N)), jnp.zeros((N, N)))
    for slot in slots:
        buffers, x = turn(buffers, x, weights, slot)
    return ends(buffers, x)


def loop(x, weights, slots):
    carry = (jnp.zeros((N, N)), jnp.zeros((N, N))), x
    carry, _ = jax.lax.scan(lambda c, slot: (turn(*c, weights, slot), None), carry, slots)
    return ends(*carry)


shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (((N, N), jnp.float32), ((N, N), jnp.float32), ((4,), jnp.int32))]
found = {}
for name, run in (("straight", straight), ("loop", loop)):
    main = inside = 0
    is_main = False
    for line in jax.jit(run).lower(*shapes).compile().as_text().splitlines():
        if line.rstrip().endswith("{") and re.match(r"(ENTRY )?%?[\w.\-]+ \(", line):
            is_main = line.startswith("ENTRY")
        if re.search(rf"= f32\[{N},{N}\]\S* copy\(", line):
            main, inside = main + is_main, inside + (not is_main)
    found[name] = inside
    print(f"{name}: {inside} copies of a buffer in branches, {main} before them")
raise SystemExit(0 if found == {"straight": 3, "loop": 0} else 1)
SEE
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/see.py"
