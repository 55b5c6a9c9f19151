#!/usr/bin/env bash
# A NaN in a masked value reaches every query of jax.nn.dot_product_attention.
#
# Good guess: positions beyond `key_value_seq_lengths` take no part, so whatever their keys and values
#   hold, the output is that of the shorter sequence. A cache may then be handed on uncleared.
# What happens: a NaN in a masked key is harmless, a NaN in a masked value is not: the probability of
#   exactly zero is multiplied with it, and 0 * NaN = NaN makes every query's output NaN. So it is with
#   implementation="xla" on CPU and, where there is a GPU, with implementation="cudnn" too (seen so
#   on an H200 with JAX 0.11.2, prefill with a padding mask).
# Way out: put zeros in place of masked values before the call.
# Versions: jax 0.10.2 on CPU, 0.11.2 on an H200 (both implementations). Date: 2026-11-30.
# Exit: 0 seen as stated, 1 if that has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip -q install "jax==${JAX_VERSION:-0.10.2}" >/dev/null
cat >try.py <<'PY'
import jax
import jax.numpy as jnp

print("jax", jax.__version__, jax.devices()[0].device_kind)
shape = (1, 16, 2, 64)
query, key, value = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(3))
length = jnp.array([10], jnp.int32)


def attend(key, value, implementation):
    return jax.nn.dot_product_attention(
        query, key, value, key_value_seq_lengths=length, implementation=implementation
    )


kinds = ["xla"] + ["cudnn"] * (jax.default_backend() == "gpu")
seen = True
for kind in kinds:
    clean = attend(key, value, kind)
    bad_key = attend(key.at[:, 10:].set(jnp.nan), value, kind)
    bad_value = attend(key, value.at[:, 10:].set(jnp.nan), kind)
    harmless = bool((bad_key == clean).all())
    spoilt = int(jnp.isnan(bad_value).all(axis=(0, 2, 3)).sum())
    print(f"{kind}: NaN in masked keys changes nothing: {harmless}; "
          f"NaN in masked values: {spoilt} of {shape[1]} queries are NaN")
    seen = seen and harmless and spoilt == shape[1]
raise SystemExit(0 if seen else 1)
PY
venv/bin/python try.py
