#!/usr/bin/env bash
# Guess: the expression that outlines_core.json_schema.build_regex_from_schema makes of a schema allows
# valid texts alone, and a schema that it cannot keep is refused, as one with `not` is
# What happens: bounds of strings and arrays (maxLength, maxItems) are kept, those of numbers are not:
# minimum, maximum, exclusiveMinimum, multipleOf and an object's minProperties change nothing, without
# an error or a warning. A count "from 1 to 2" may be -7
# Seen: outlines-core 0.2.14, on a CPU, 2026-12-01
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
    outlines-core==0.2.14 2>"$work/pip.log" || { cat "$work/pip.log"; exit 77; }
cat >"$work/see.py" <<'SEE'
import json
import re

from outlines_core.json_schema import build_regex_from_schema

WHOLE = {"type": "integer"}
cases = [
    ({"type": "string", "maxLength": 3}, '"abcd"', False),
    ({"type": "array", "items": WHOLE, "maxItems": 2}, "[1,2,3]", False),
    ({"type": "integer", "minimum": 1, "maximum": 2}, "-7", True),
    ({"type": "integer", "exclusiveMinimum": 0}, "0", True),
    ({"type": "number", "maximum": 1.0}, "1.5", True),
    ({"type": "integer", "multipleOf": 5}, "3", True),
    ({"type": "object", "properties": {"a": WHOLE}, "minProperties": 1}, "{}", True),
]
found = []
for schema, text, _ in cases:
    found.append(re.fullmatch(build_regex_from_schema(json.dumps(schema)), text) is not None)
    print(f"{json.dumps(schema)}: {text}, not valid, is {'allowed' if found[-1] else 'refused'}")
try:
    build_regex_from_schema('{"not": {"type": "string"}}')
    refused = False
except ValueError as error:
    refused = True
    print(f"not: refused, {str(error).splitlines()[0]}")
raise SystemExit(0 if refused and found == [expected for _, _, expected in cases] else 1)
SEE
"$work/venv/bin/python" "$work/see.py"
