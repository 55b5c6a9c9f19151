#!/usr/bin/env bash
# Guess: 64 experts in one array start as 64 single layers do: nnx.LinearGeneral, told by batch_axis
# that the first axis is a batch of kernels, and nnx.Einsum of (64, in, out), whose equation says so,
# draw each kernel with deviation 1 / sqrt(in), as nnx.Linear does
# What happens: the batch is counted into the fan-in: each of 64 kernels is drawn 8 times smaller, and
# an expert's output has a 64th of the variance. LinearGeneral cannot be told otherwise (it flattens
# the shape before it draws); Einsum can, by variance_scaling(..., batch_axis=(0,)). flax.linen's
# DenseGeneral(batch_dims=...) does as LinearGeneral does
# Seen: flax 0.12.12, jax 0.12.0.1, on a CPU, 2026-12-01
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
    jax==0.12.0.1 jaxlib==0.12.0.1 flax==0.12.12 numpy==2.5.5 2>"$work/pip.log" || { cat "$work/pip.log"; exit 77; }
cat >"$work/see.py" <<'SEE'
import jax
from flax import nnx

rngs = nnx.Rngs(0)
told = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=(0,))
layers = {
    "Linear": nnx.Linear(128, 128, rngs=rngs),
    "LinearGeneral": nnx.LinearGeneral(128, 128, batch_axis={0: 64}, rngs=rngs),
    "Einsum": nnx.Einsum("eti,eio->eto", (64, 128, 128), rngs=rngs),
    "Einsum, told": nnx.Einsum("eti,eio->eto", (64, 128, 128), kernel_init=told, rngs=rngs),
}
x = jax.random.normal(jax.random.key(1), (64, 16, 128))
spread = {name: float(layer.kernel[...].std()) for name, layer in layers.items()}
for name, layer in layers.items():
    print(f"{name}: kernels of deviation {spread[name]:.4f}, output {float(layer(x).std()):.3f}")
ratio = {name: spread["Linear"] / deviation for name, deviation in spread.items()}
small = all(abs(ratio[name] - 8) < 0.2 for name in ("LinearGeneral", "Einsum"))
raise SystemExit(0 if small and abs(ratio["Einsum, told"] - 1) < 0.05 else 1)
SEE
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/see.py"
