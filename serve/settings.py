"""Options of `jaxsys serve` from a file and from the environment, besides those that are typed.

    file.toml            port = 8000                environment     JAXSYS_SERVE_PORT=8000
                         key-for-all = true                         JAXSYS_SERVE_KEY_FOR_ALL=true
                         cors = ["https://a.org"]                   JAXSYS_SERVE_CORS=https://a.org

A file whose name ends in .json holds an object of the same names, or the manifest of `jaxsys plan
serve`, whose "serve" is one. A name is the option's without its dashes. What is typed goes before
the environment, and that before the file. Names that no option has are refused, so that no setting
is passed over in silence.
"""

import argparse
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxsys.errors import UsageError
from jaxsys.files import MIB, read_json

PREFIX = "JAXSYS_SERVE_"
SERVE = "serve"
"""Of a manifest, what holds the options."""
_NEVER = frozenset({"help", "settings"})


def add_to(parser: argparse.ArgumentParser) -> None:
    """Gives a parser the option that names the file."""
    parser.add_argument(
        "--settings",
        type=Path,
        metavar="FILE",
        help=f"TOML file of these options, such as port = 8000, or the manifest of `jaxsys plan "
        f"serve` (JSON); {PREFIX}PORT and the like in the environment go before it, and what is "
        f"typed before both",
    )


def with_settings(
    parser: argparse.ArgumentParser,
    argv: Sequence[str],
    environment: Mapping[str, str] | None = None,
) -> list[str]:
    """What is typed, behind what file and environment say.

    Raises:
        UsageError: if the file cannot be read, or a name or value is none of an option.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--settings", type=Path)
    environment = os.environ if environment is None else environment
    options = {
        option.removeprefix("--"): action
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--") and option.removeprefix("--") not in _NEVER
    }
    path = finder.parse_known_args(list(argv))[0].settings
    found: list[str] = []
    if path is not None:
        for name, value in _read(path).items():
            found += _typed(options, name, value, f"{path}: {name}")
    for name in sorted(environment):
        if name.startswith(PREFIX):
            plain = name.removeprefix(PREFIX).lower().replace("_", "-")
            found += _typed(options, plain, environment[name], name)
    return [*found, *argv]


def _read(path: Path) -> dict[str, Any]:
    if path.suffix == ".json":
        found = read_json(path, what="--settings", most_bytes=MIB)
        if isinstance(found, dict) and SERVE in found:
            found = found[SERVE]
        if not isinstance(found, dict):
            raise UsageError(
                f"--settings {path} must hold an object of options, or a manifest whose "
                f'"{SERVE}" is one'
            )
        return found
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"--settings {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--settings {path} is no TOML: {error}") from None


def _typed(options: Mapping[str, argparse.Action], name: str, value: Any, where: str) -> list[str]:
    """A setting as it would be typed."""
    action = options.get(name)
    if action is None:
        raise UsageError(f"{where} is no option of this command; see --help for those there are")
    if isinstance(value, dict):
        raise UsageError(f"{where} is a table; give a value")
    option = f"--{name}"
    if action.nargs == 0:  # a flag
        said = {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower())
        if said is None:
            raise UsageError(f"{where}={value!r} must be true or false")
        return [option] if said else []
    if isinstance(value, list):
        if not isinstance(action, argparse._AppendAction):
            raise UsageError(f"{where} is a list; give one value")
        return [f"{option}={one}" for one in value]
    return [f"{option}={value}"]
