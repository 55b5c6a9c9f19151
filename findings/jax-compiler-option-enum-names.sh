#!/usr/bin/env bash
# Guess: what XLA_FLAGS takes as --xla_gpu_collective_permute_mode=peer, a jit's compiler_options take
# as {"xla_gpu_collective_permute_mode": "peer"}
# What happens: compiler_options refuse "peer" as no valid enum value and take the protocol buffer's
# own name, COLLECTIVES_PEER_MEMORY
# Seen: the refusal on jax 0.10.2, 0.11.2 and 0.12.0.1, the flag on 0.12.0.1; on a CPU, 2026-11-30
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

lowered = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((4,), jnp.float32))


def accepted(value):
    try:
        lowered.compile(compiler_options={"xla_gpu_collective_permute_mode": value})
    except Exception as error:
        print("compiler_options", value, "->", str(error)[:100])
        return False
    print("compiler_options", value, "-> accepted")
    return True


short, long = accepted("peer"), accepted("COLLECTIVES_PEER_MEMORY")
raise SystemExit(0 if long and not short else 1)
SEE
export JAX_PLATFORMS=cpu
"$work/venv/bin/python" "$work/see.py"
cat >"$work/flag.py" <<'FLAG'
import jax

jax.jit(lambda x: x + 1)(1.0)
FLAG
flag() {
    XLA_FLAGS="--xla_gpu_collective_permute_mode=$1" "$work/venv/bin/python" "$work/flag.py" \
        >"$work/flag.log" 2>&1
}
flag peer && echo "XLA_FLAGS peer -> accepted" || { echo "XLA_FLAGS peer -> refused"; exit 1; }
