#!/usr/bin/env bash
# Guess: a run that goes back from step 200 to its checkpoint of step 100, as after a spike of the
# loss, saves its new steps 150 and 200, or is told that it cannot
# What happens: CheckpointManager.save returns False for every step up to the last one there, and so
# does the new API's Checkpointer: nothing is written, logged or raised until step 250. A run that
# is killed before goes on from the old step 200, the one it went back from. force=True writes step
# 150, and for 200 it is an error; delete the later steps first
# Seen: orbax-checkpoint 0.12.8, jax 0.12.0.1, on a CPU, 2026-12-01
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
    jax==0.12.0.1 jaxlib==0.12.0.1 orbax-checkpoint==0.12.8 numpy==2.5.5 2>"$work/pip.log" || { cat "$work/pip.log"; exit 77; }
cat >"$work/see.py" <<'SEE'
import logging
import tempfile
import warnings

import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import v1

warnings.simplefilter("ignore")
heard = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: heard.append(record.getMessage())


def first_api(folder, steps, sign):
    with ocp.CheckpointManager(folder) as manager:
        saved = {}
        for step in steps:
            saved[step] = manager.save(
                step, args=ocp.args.StandardSave({"w": jnp.array(sign * step)})
            )
        manager.wait_until_finished()
        target = ocp.args.StandardRestore({"w": jnp.array(0)})
        return saved, int(manager.restore(manager.latest_step(), args=target)["w"])


def new_api(folder, steps, sign):
    with v1.training.Checkpointer(folder) as checkpointer:
        saved = {step: checkpointer.save(step, {"w": jnp.array(sign * step)}) for step in steps}
        return saved, int(checkpointer.load(checkpointer.latest.step)["w"])


found = []
for api, back in ((first_api, (150, 200)), (new_api, (150,))):
    with tempfile.TemporaryDirectory() as folder:
        api(folder, (100, 200), 1)
        logging.getLogger().addHandler(handler)
        heard.clear()
        saved, last = api(folder, back, -1)
        logging.getLogger().removeHandler(handler)
    told = [line for line in heard if "step" in line.lower()]
    found.append((list(saved.values()), last, told))
    print(f"{api.__name__}: saved {saved}, the last checkpoint is that of {last}; warnings: {told}")
raise SystemExit(0 if found == [([False, False], 200, []), ([False], 200, [])] else 1)
SEE
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/see.py"
