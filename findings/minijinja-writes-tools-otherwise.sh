#!/usr/bin/env bash
# Guess: a chat template of a model's repository makes the same prompt in minijinja, which servers
# written in Rust render them with, as in transformers, whose `tojson` writes plain JSON
# What happens: minijinja's own `tojson` (as Jinja's own, which transformers replaces) writes <, >, &
# and ' as \u003c, \u003e, \u0026 and \u0027: a tool whose description says "the user's city" or
# "a < b" reaches the model in other tokens than it was trained with, without an error. A filter of
# one's own puts it right. Numbers of 1e20 are printed in full, and a string is no `sequence` there
# Seen: minijinja 3.1.0, jinja2 3.1.6, without a GPU, 2026-12-01
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
    minijinja==3.1.0 jinja2==3.1.6 markupsafe==3.0.4 2>"$work/pip.log" || { cat "$work/pip.log"; exit 77; }
cat >"$work/see.py" <<'SEE'
import json

import jinja2
import minijinja

tool = {"name": "weather", "description": "the user's city, if a < b & c"}
template = "{{ tool | tojson }}"


def plain(value, **_):
    return json.dumps(value, ensure_ascii=False)


as_transformers = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
as_transformers.filters["tojson"] = plain
own = minijinja.Environment()
mended = minijinja.Environment(filters={"tojson": plain})
found = {
    "transformers' filter": as_transformers.from_string(template).render(tool=tool),
    "jinja2": jinja2.Environment().from_string(template).render(tool=tool),
    "minijinja": own.render_str(template, tool=tool),
    "minijinja with that filter": mended.render_str(template, tool=tool),
    "a sequence": own.render_str("{{ 'text' is sequence }}"),
}
for name, text in found.items():
    print(f"{name}: {text}")
wanted, jinja, mini, again, sequence = found.values()
escaped = all("user\\u0027s" in text and "a \\u003c b \\u0026 c" in text for text in (jinja, mini))
raise SystemExit(0 if wanted == plain(tool) == again and escaped and sequence == "False" else 1)
SEE
"$work/venv/bin/python" "$work/see.py"
