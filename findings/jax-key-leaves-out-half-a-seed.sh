#!/usr/bin/env bash
# Guess: jax.random.key takes a 64-bit seed, as it says ("a 64- or 32-bit integer"): seeds that differ,
# such as a hash of a run's name or a time in nanoseconds, begin different streams; or one that does
# not fit is refused, as jax.random.fold_in refuses it
# What happens: with 64-bit types off, as they are by default, the upper 32 bits are dropped without a
# word: 1, 2**32 + 1 and 2**40 + 1 are the same key. With jax_enable_x64 they are three keys, so that
# the flag changes what such a seed draws
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

seeds = (1, 2**32 + 1, 2**40 + 1)


def keys():
    return [jax.random.key_data(jax.random.key(seed)).tolist() for seed in seeds]


narrow = keys()
try:
    jax.random.fold_in(jax.random.key(0), seeds[1])
    folded = "taken"
except OverflowError as error:
    folded = f"refused, {error}"
jax.config.update("jax_enable_x64", True)
wide = keys()
print(f"keys of the seeds {seeds}: {narrow}; with 64-bit types {wide}")
print(f"fold_in of {seeds[1]}: {folded}")
same = narrow[0] == narrow[1] == narrow[2]
raise SystemExit(0 if same and len({tuple(key) for key in wide}) == 3 else 1)
SEE
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/see.py"
