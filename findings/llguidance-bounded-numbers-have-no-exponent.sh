#!/usr/bin/env bash
# Guess: a grammar made from {"type": "number", "minimum": 0} allows every JSON number of at least
# 0, 1e5 as well as 100000
# What happens: a number with a bound is decimal digits only: 1e5 is refused, which the same
# schema without a bound allows
# Seen: llguidance 1.9.1, on a CPU, 2026-11-30
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
    llguidance==1.9.1 tokenizers==0.23.3 numpy==2.3.5 2>"$work/pip.log" || { cat "$work/pip.log"; exit 77; }
cat >"$work/see.py" <<'SEE'
import json

from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
letters = {byte: chr(byte) for byte in visible}
hidden = [byte for byte in range(256) if byte not in letters]
letters |= {byte: chr(256 + place) for place, byte in enumerate(hidden)}
backend = Tokenizer(models.BPE(vocab={c: byte for byte, c in letters.items()}, merges=[]))
backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
backend.decoder = decoders.ByteLevel()
backend.add_special_tokens([AddedToken("<end>", special=True)])
tokenizer = LLTokenizer(backend.to_str(), eos_token=256)


def allows(schema, text):
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    assert not matcher.is_error(), matcher.get_error()
    ids = [*text.encode(), 256]
    allowed = matcher.validate_tokens(ids) == len(ids)
    print(f"{json.dumps(schema)}: {text} is {'allowed' if allowed else 'refused'}")
    return allowed


free, bounded = {"type": "number"}, {"type": "number", "minimum": 0}
found = [allows(s, t) for s in (free, bounded) for t in ("100000", "0.5", "1e5")]
raise SystemExit(0 if found == [True, True, True, True, True, False] else 1)
SEE
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/see.py"
