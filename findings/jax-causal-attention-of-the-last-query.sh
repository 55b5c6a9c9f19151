#!/usr/bin/env bash
# Guess: jax.nn.dot_product_attention(is_causal=True) of one new query against 8 keys (a cache) lets
# it see all 8, as FlashAttention has aligned the two ends since its version 2.1; a local_window_size
# of (2, 0) lets it see the last three
# What happens: query i is taken for position i, whatever number of keys there is: the new query sees
# the first key alone and its answer is that key's value, without an error; so with the window too,
# and with key_value_seq_lengths. A mask, or is_causal=False for a single query, is needed
# Seen: jax 0.12.0.1 and 0.10.2, on a CPU, 2026-12-01
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

query, keys = jnp.zeros((1, 1, 1, 8)), jnp.zeros((1, 8, 1, 8))  # [batch, length, heads, width]
values = jnp.broadcast_to(jnp.arange(8.0)[:, None, None], (1, 8, 1, 8))
lengths = jnp.array([6], jnp.int32)
cases = {
    "is_causal": {"is_causal": True},
    "window (2, 0)": {"local_window_size": (2, 0)},
    "is_causal, 6 keys": {"is_causal": True, "key_value_seq_lengths": lengths},
    "no option": {},
}
found = {
    name: float(jax.nn.dot_product_attention(query, keys, values, **case)[0, 0, 0, 0])
    for name, case in cases.items()
}
for name, mean in found.items():
    print(f"{name}: the values of the keys seen, 0 to 7 in order, have the mean {mean}")
raise SystemExit(0 if list(found.values()) == [0, 0, 0, 3.5] else 1)
SEE
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/see.py"
