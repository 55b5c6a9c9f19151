"""What a library says of its parameters, said of a command's options.

Library code names parameters (`memory_gib=0 must be above 0`), as they are written in Python. Who
typed an option reads its name (`--memory-gib 0 must be above 0`). An option that is named otherwise
than the parameter it sets says which one that is by argparse's `dest`.
"""

import argparse
import re


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
