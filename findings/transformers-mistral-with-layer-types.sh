#!/usr/bin/env bash
# Guess: a config.json of model_type "mistral" is a Mistral, whose one sliding_window holds in every
# layer; MistralConfig and AutoConfig read the same from it
# What happens: with a `layer_types` key AutoConfig gives a Ministral, whose layers have a window or
# none by that list; MistralConfig keeps one window for all. So the two compute unlike logits past the
# window's length. An empty list or null is enough to change the class
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

from transformers import AutoConfig, MistralConfig

folder = sys.argv[1]
settings = {"model_type": "mistral", "num_hidden_layers": 2, "sliding_window": 8}


def read(**more):
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(settings | more, file)
    auto, own = AutoConfig.from_pretrained(folder), MistralConfig.from_pretrained(folder)
    print(f"{more}: AutoConfig gives {type(auto).__name__}, MistralConfig {type(own).__name__}")
    return type(auto).__name__, type(own).__name__


types = ["sliding_attention", "full_attention"]
found = [read(), read(layer_types=types), read(layer_types=None)]
wanted = [("MistralConfig",) * 2, *[("MinistralConfig", "MistralConfig")] * 2]
raise SystemExit(0 if found == wanted else 1)
SEE
mkdir "$work/model"
"$work/venv/bin/python" "$work/see.py" "$work/model" 2>/dev/null
