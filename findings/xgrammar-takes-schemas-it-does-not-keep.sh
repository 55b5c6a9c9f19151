#!/usr/bin/env bash
# Guess: a JSON schema that xgrammar compiles without a warning is kept: what its grammar lets a model
# write is valid. What it cannot keep it says, as it warns of a multipleOf of numbers
# What happens: `not`, `if`/`then`, `dependentRequired`, `uniqueItems`, what stands beside `$ref` or
# `anyOf`, and `required` names without an entry in `properties` are left out without a word, in
# strict mode (the default) as without it. In strict mode the last is worse: an object without the
# required key is allowed, and the one with it is refused
# Seen: xgrammar 0.2.9, on a CPU, 2026-12-01
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
"$work/venv/bin/python" -m pip install --quiet --no-deps --disable-pip-version-check \
    xgrammar==0.2.9 apache-tvm-ffi==0.1.15.post2 pydantic==2.14.4 typing-extensions==4.16.0 \
    annotated-types==0.8.0 pydantic_core==2.50.5 typing-inspection==0.4.5 numpy==2.5.5 2>"$work/pip.log" || { cat "$work/pip.log"; exit 77; }
cat >"$work/see.py" <<'SEE'
import json
import sys
from unittest import mock

import tvm_ffi  # noqa: F401  before torch is stood in for, so that it does without

# 3 GB that xgrammar imports, and that a grammar does not need; with them it is the same.
sys.modules.update(torch=mock.MagicMock(), transformers=mock.MagicMock())
import xgrammar  # noqa: E402

WHOLE = {"type": "integer"}
PAIR = {"a": WHOLE, "b": WHOLE}
cases = [
    ({"type": "integer", "minimum": 5}, "3", False),
    ({"type": "integer", "not": {"const": 3}}, "3", True),
    ({"type": "integer", "if": {"maximum": 9}, "then": {"minimum": 5}}, "3", True),
    ({"type": "array", "items": WHOLE, "uniqueItems": True}, "[1, 1]", True),
    ({"type": "object", "properties": PAIR, "dependentRequired": {"a": ["b"]}}, '{"a": 1}', True),
    ({"$ref": "#/$defs/n", "minimum": 5, "$defs": {"n": WHOLE}}, "3", True),
    ({"type": "integer", "anyOf": [{"minimum": 5}, {"maximum": 1}]}, "3", True),
    ({"type": "object", "properties": {"a": WHOLE}, "required": ["z"]}, '{"a": 1}', True),
]
letters = [chr(code) for code in range(128)]
compiler = xgrammar.GrammarCompiler(
    xgrammar.TokenizerInfo([*letters, "</s>"], stop_token_ids=[len(letters)])
)


def allowed(schema, text, strict):
    grammar = compiler.compile_json_schema(json.dumps(schema), strict_mode=strict)
    matcher = xgrammar.GrammarMatcher(grammar, terminate_without_stop_token=True)
    return matcher.accept_string(text) and matcher.is_terminated()


found = []
for schema, text, expected in cases:
    outcome = [allowed(schema, text, strict) for strict in (True, False)]
    found.append(outcome == [expected, expected])
    print(f"{json.dumps(schema)}: {text}, not valid, is {'allowed' if outcome[0] else 'refused'}")
keyed = allowed(cases[-1][0], '{"a": 1, "z": 1}', True)
print(f'and {{"a": 1, "z": 1}}, valid, is {"allowed" if keyed else "refused"} in strict mode')
raise SystemExit(0 if all(found) and not keyed else 1)
SEE
"$work/venv/bin/python" "$work/see.py"
