#!/usr/bin/env bash
# Guess: a config.json's rope_scaling names its kind as `rope_type` or, as files of before 2024 do, as
# `type`: {"type": "linear", "factor": 8.0} stretches a Gemma 3 or an Olmo 3 as it does a Llama
# What happens: of these two families, whose rotary settings are by kind of layer, `type` is not read:
# the settings are put over {"rope_type": "default"}, which stays; the factor is kept and does nothing,
# without a warning. With `rope_type` it counts
# Seen: transformers 5.24.0, on a CPU, 2026-11-30
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python=""
for name in python3.13 python3.12 python3.11 "$HOME"/.pyenv/versions/3.*/bin/python; do
    if [ -z "$python" ] && "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
        python="$name"
    fi
done
[ -n "$python" ] || { echo "no Python 3.11 to 3.13 here"; exit 77; }
"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    transformers==5.24.0 2>"$work/pip.log" || { cat "$work/pip.log"; exit 77; }
cat >"$work/see.py" <<'SEE'
import json
import os
import sys

from transformers import AutoConfig

folder, found = sys.argv[1], {}
for family in ("llama", "gemma3_text", "olmo3"):
    for name in ("type", "rope_type"):
        settings = {"model_type": family, "rope_scaling": {name: "linear", "factor": 8.0}}
        with open(os.path.join(folder, "config.json"), "w") as file:
            json.dump(settings, file)
        rope = AutoConfig.from_pretrained(folder).rope_parameters
        rope = rope.get("full_attention", rope)
        found[family, name] = rope["rope_type"]
        print(f"{family}: {name}=linear is read as rope_type={rope['rope_type']}, factor {rope['factor']}")
unread = [key for key, kind in found.items() if kind != "linear"]
raise SystemExit(0 if unread == [("gemma3_text", "type"), ("olmo3", "type")] else 1)
SEE
mkdir "$work/model"
"$work/venv/bin/python" "$work/see.py" "$work/model" 2>/dev/null
