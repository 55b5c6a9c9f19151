"""The `jaxsys` command: finds the subcommand, imports only that one, and reports its faults.

A subcommand has a name of one word or two, and is a module with `main(argv, prog) -> int | None`,
and with `parser(prog)` where the library's messages are to name its options.
Exit codes: 0 done, 1 the run failed, 2 the request was wrong, 130 or 143 interrupted.
"""

import errno
import importlib
import os
import re
import sys
from collections.abc import Sequence

from jaxsys import __version__
from jaxsys.errors import RunError, UsageError, did_you_mean
from jaxsys.interrupt import Interruptible
from jaxsys.options import said_of

SUBCOMMANDS: dict[str, tuple[str, str]] = {
    "plan": ("jaxsys.planner.cli", "compare parallel plans for a model on a cluster"),
    "plan serve": ("jaxsys.serve.simulation.plan_serve", "search deployments: cost, energy, SLO"),
    "profile cluster": ("jaxsys.planner.profile", "measure links and devices for `plan`"),
    "train": ("jaxsys.train.cli", "train a model with a schedule"),
    "serve": ("jaxsys.serve.cli", "serve a model over an OpenAI-compatible API"),
    "convert": ("jaxsys.model.convert", "write a model's folder or .gguf file as a folder"),
    "clocks": ("jaxsys.nvml", "read or reset GPU clocks"),
    "replay": ("jaxsys.serve.simulation.replay", "replay a request trace on simulated GPUs"),
    "profile serving": ("jaxsys.serve.energy.profile_cli", "measure latency and power for `serve`"),
}


def usage() -> str:
    """The text of `jaxsys --help`."""
    width = max(len(name) for name in SUBCOMMANDS)
    rows = [f"  {name:<{width}}  {what}" for name, (_, what) in SUBCOMMANDS.items()]
    return "\n".join(
        [
            "usage: jaxsys COMMAND [options]",
            "",
            "commands:",
            *rows,
            "",
            "`jaxsys COMMAND --help` lists a command's options; --debug shows tracebacks.",
        ]
    )


def split_name(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The subcommand's name, of one word or two, and the words behind it."""
    words = 2 if " ".join(arguments[:2]) in SUBCOMMANDS else 1
    return " ".join(arguments[:words]), list(arguments[words:])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit code; the process's own if `argv` is None."""
    if argv is None:
        with Interruptible():
            return _run(sys.argv[1:])
    try:
        return _run(list(argv))
    except KeyboardInterrupt:
        return 130


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"jaxsys {__version__}")
        return 0
    name, rest = split_name(arguments)
    if name not in SUBCOMMANDS:
        longer = [known for known in SUBCOMMANDS if known.startswith(f"{name} ")]
        known = ", ".join(longer or SUBCOMMANDS)
        near = did_you_mean(" ".join(arguments[:2]), SUBCOMMANDS) or did_you_mean(name, SUBCOMMANDS)
        print(f"jaxsys: {name!r} is not a command{near}; use one of {known}", file=sys.stderr)
        return 2
    debug = "--debug" in rest
    rest = [word for word in rest if word != "--debug"]
    prog = f"jaxsys {name}"
    module = None
    try:
        module = importlib.import_module(SUBCOMMANDS[name][0])
        return int(module.main(rest, prog=prog) or 0)
    except (UsageError, RunError) as error:
        if debug:
            raise
        parser = getattr(module, "parser", None)
        text = str(error) if parser is None else said_of(error, parser(prog))
        print(f"{prog}: {text}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except BrokenPipeError:  # the reader of a pipe left; nothing is wrong with us
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if debug or (error.filename is None and error.errno not in _OF_A_DISK):
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"{prog}: {where}{error.strerror}", file=sys.stderr)
        return 1
    except Exception as error:
        if debug or (short := _out_of_memory(error)) is None:
            raise
        print(f"{prog}: {short}", file=sys.stderr)
        return 1


_OF_A_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
"""Of writes, which do not name their file."""


def _out_of_memory(error: Exception) -> str | None:
    """One line if memory has run out, on the host or on a device."""
    first = next(iter(str(error).splitlines()), "")
    if isinstance(error, MemoryError) or re.search("RESOURCE_EXHAUSTED|[Oo]ut of memory", first):
        return f"out of memory: {first.removeprefix('RESOURCE_EXHAUSTED: ')}; ask for smaller sizes"
    return None


if __name__ == "__main__":
    raise SystemExit(main())
