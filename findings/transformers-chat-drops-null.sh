#!/usr/bin/env bash
# Guess: a chat template sees a message as it was given: an assistant's `"content": null` beside
# tool calls, as the OpenAI API returns it, is none in the template
# What happens: apply_chat_template leaves out keys whose value is None, so the content is undefined:
# `content is none` is false, `'content' in message` too, and a template that tells a null content
# from a missing one, as several published ones do, takes another branch
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
    transformers==5.24.0 jinja2==3.1.6 2>"$work/pip.log" || { cat "$work/pip.log"; exit 77; }
cat >"$work/see.py" <<'SEE'
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

template = (
    "{% for m in messages %}{{ m.role }}: "
    "{% if m.content is not defined %}undefined{% elif m.content is none %}null"
    "{% else %}{{ m.content }}{% endif %}; {% endfor %}"
)
backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)
call = {"type": "function", "function": {"name": "now", "arguments": {}}}
messages = [
    {"role": "user", "content": "When?"},
    {"role": "assistant", "content": None, "tool_calls": [call]},
]
text = tokenizer.apply_chat_template(messages, tokenize=False)
print(text)
raise SystemExit(0 if text == "user: When?; assistant: undefined; " else 1)
SEE
"$work/venv/bin/python" "$work/see.py" 2>/dev/null
