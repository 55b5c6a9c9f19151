"""What a command says of its options: faults in one line, and the names that were typed.

Library code names parameters (`memory_gib=0 must be above 0`), as they are written in Python. Who
typed an option reads its name (`--memory-gib 0 must be above 0`). An option that is named otherwise
than the parameter it sets says which one that is by argparse's `dest`.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from jaxsys.errors import FileError, UsageError, did_you_mean


class Parser(argparse.ArgumentParser):
    """A parser whose faults are UsageErrors: the cause and where help is, not all usage before."""

    typed: Sequence[str] = ()
    """What is being parsed."""

    def parse_known_args(self, *args: Any, **named: Any) -> Any:
        typed = args[0] if args else named.get("args")
        self.typed = sys.argv[1:] if typed is None else typed
        return super().parse_known_args(*args, **named)

    def error(self, message: str) -> NoReturn:
        cause = re.sub(r"^argument ([^:]+): (?=\S* must be )", r"\1 ", message)
        cause = cause.removeprefix("argument ") + self._meant(message)
        raise UsageError(f"{cause}; see {self.prog} --help")

    def _meant(self, message: str) -> str:
        """ " (did you mean --link?)" where the fault may be a name that is near a known one."""
        choice = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)$", message, re.DOTALL)
        if choice is not None:
            return did_you_mean(choice[1], [one.strip(" '") for one in choice[2].split(",")])
        missing = message.startswith("the following arguments are required")
        if not missing and not message.startswith("unrecognized arguments"):
            return ""
        known = [option for action in self._actions for option in action.option_strings]
        names = [text.partition("=")[0] for text in self.typed if text.startswith("--")]
        for name in names:
            if any(option.startswith(name) for option in known):
                continue  # whole, or as far as argparse needs it
            near = did_you_mean(name[2:], [option[2:] for option in known if option[:2] == "--"])
            if near:
                near = re.sub(r"'([^']+)'", r"--\1", near)
                return near.replace("(", f"({name}: ") if missing else near
        return ""


def whole(least: int = 1, most: int | None = None) -> Callable[[str], int]:
    """A type of options: a whole number from `least` to `most`."""
    span = f"at least {least}" if most is None else f"from {least} to {most}"

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text} must be a whole number, {span}") from None
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{text} must be {span}")
        return value

    return convert


def said_of(error: Exception, parser: argparse.ArgumentParser) -> str:
    """An error's message as `in_options`, but for what it says of a file's fields."""
    message = str(error)
    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:
        if isinstance(cause, FileError) and str(cause) in message:
            before, of_file, after = message.partition(str(cause))
            return in_options(before, parser) + of_file + in_options(after, parser)
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
    return in_options(message, parser)


def in_options(message: str, parser: argparse.ArgumentParser) -> str:
    """A message with the parser's own options in place of the parameters they set."""
    for action in parser._actions:
        if not action.option_strings:
            continue
        option, name = action.option_strings[-1], re.escape(action.dest)
        if action.nargs == 0:  # a flag takes no value
            message = re.sub(rf"(?<![\w.]){name}=True\b", option, message)
        # Python's quotes around a plain word are not typed.
        message = re.sub(rf"(?<![\w.]){name}='([\w.-]+)'", rf"{option} \1", message)
        message = re.sub(rf"(?<![\w.]){name}=(?=\S)", f"{option} ", message)
        if "_" in name:  # a plain word may be meant as one, and a path is left alone
            message = re.sub(rf"(?<![\w./=-]){name}(?![\w/=-]|\.\w)", option, message)
    return message
