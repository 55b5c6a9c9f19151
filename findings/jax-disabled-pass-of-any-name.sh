#!/usr/bin/env bash
# Guess: a compile option is checked, so that a pass named in xla_disable_hlo_passes that the
# compiler does not have is refused, as an unknown option and an unfit value are
# What happens: any name is accepted without a word and does nothing; a misspelt or renamed pass
# stays on
# Seen: jax 0.10.2, 0.11.2 and 0.12.0.1, on a CPU, 2026-11-30
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


def accepted(options):
    try:
        lowered.compile(compiler_options=options)
    except Exception as error:
        print(options, "->", str(error)[:90])
        return False
    print(options, "-> accepted")
    return True


unknown_pass = accepted({"xla_disable_hlo_passes": "no-such-pass"})
unknown_option = accepted({"xla_no_such_option": True})
unfit_value = accepted({"xla_gpu_enable_latency_hiding_scheduler": "sometimes"})
raise SystemExit(0 if unknown_pass and not unknown_option and not unfit_value else 1)
SEE
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/see.py"
