#!/usr/bin/env bash
# Guess: in a conversation the prompt of a turn begins with that of the turn before and its answer, so
# that a cache of prefixes computes the new message alone, with a system prompt as without one
# What happens: up to version 3 of Mistral's prompt format (Mistral 7B v0.3, Nemo) mistral-common writes
# the system prompt before the last user message, whichever that is: it moves with each turn, and the
# turns share nothing behind the first [INST], here 2 tokens of 191. Since version 7 it stands first
# Seen: mistral-common 1.13.1, with the vocabularies that it brings, on a CPU, 2026-12-01
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
    mistral-common==1.13.1 sentencepiece==0.2.3 numpy==2.3.5 2>"$work/pip.log" || { cat "$work/pip.log"; exit 77; }
cat >"$work/see.py" <<'SEE'
from pathlib import Path

import mistral_common
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

folder = Path(mistral_common.__file__).parent / "data"
SYSTEM = {"role": "system", "content": "Answer in one word, and be kind. " * 20}
files = {
    "version 3": "mistral_instruct_tokenizer_240323.model.v3",
    "version 3, Tekken": "tekken_240911.json",
    "version 7": "mistral_instruct_tokenizer_241114.model.v7",
}


def shared(tokenizer, system, answer):
    """Tokens of the first turn's prompt, and how many of these the second turn's begins with."""
    first = [*system, {"role": "user", "content": "Is the sky blue?"}]
    second = [
        *first,
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "And the sea?"},
    ]
    before, after = (
        tokenizer.encode_chat_completion(ChatCompletionRequest.from_openai(turn)).tokens
        for turn in (first, second)
    )
    same = next(i for i, (a, b) in enumerate(zip([*before, -1], after, strict=False)) if a != b)
    return len(before), same


found = {}
for name, file in files.items():
    tokenizer = MistralTokenizer.from_file(str(folder / file))
    found[name] = [shared(tokenizer, system, "Yes") for system in ([SYSTEM], [])]
    (length, same), (plain, plainly) = found[name]
    print(
        f"{name}: the second turn shares {same} of {length} tokens with a system prompt, ", end=""
    )
    print(f"{plainly} of {plain} without one")
v3, tekken, v7 = found.values()
moved = all(turns[0][1] <= 3 < turns[0][0] and turns[1][0] == turns[1][1] for turns in (v3, tekken))
raise SystemExit(0 if moved and v7[0][0] == v7[0][1] > 100 else 1)
SEE
"$work/venv/bin/python" "$work/see.py"
