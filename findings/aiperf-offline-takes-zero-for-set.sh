#!/usr/bin/env bash
# Guess: HF_HUB_OFFLINE=0 leaves aiperf as it is without the variable, as huggingface_hub reads it,
# and a tokenizer's folder on disk loads, offline or not: nothing is fetched for it
# What happens: aiperf takes any value for offline, "0" too; offline it looks every tokenizer up in
# the Hub's cache, where a folder's path is refused as no name of a repository
# Seen: aiperf 0.13.0, huggingface_hub as it came with it, on a CPU, 2026-11-30
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python=""
for name in python3.12 python3.11 python3.13 "$HOME"/.pyenv/versions/3.*/bin/python; do
    if [ -z "$python" ] && "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
        python="$name"
    fi
done
[ -n "$python" ] || { echo "no Python 3.11 to 3.13 here"; exit 77; }
"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    aiperf==0.13.0 2>"$work/pip.log" || { cat "$work/pip.log"; exit 77; }
cat >"$work/see.py" <<'SEE'
import sys

from aiperf.common.tokenizer import Tokenizer
from huggingface_hub import constants
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import PreTrainedTokenizerFast

backend = Backend(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(sys.argv[1])
try:
    found = str(Tokenizer.from_pretrained(sys.argv[1]).encode("b"))
except Exception as error:
    found = type(error).__name__
print(f"huggingface_hub offline: {constants.HF_HUB_OFFLINE}; aiperf: {found}")
SEE
unset HF_HUB_OFFLINE TRANSFORMERS_OFFLINE
without="$("$work/venv/bin/python" "$work/see.py" "$work/folder" 2>/dev/null | tail -1)"
zero="$(HF_HUB_OFFLINE=0 "$work/venv/bin/python" "$work/see.py" "$work/folder" 2>/dev/null | tail -1)"
echo "without the variable: $without"
echo "HF_HUB_OFFLINE=0:     $zero"
[ "$without" = "huggingface_hub offline: False; aiperf: [1]" ] || exit 1
[ "$zero" = "huggingface_hub offline: False; aiperf: TokenizerError" ] || exit 1
