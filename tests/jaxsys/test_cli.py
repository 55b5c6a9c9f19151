"""The command's own behaviour: finding subcommands, exit codes, one line for a fault."""

import argparse
import dataclasses
import errno
import importlib
import subprocess
import sys

import pytest

from jaxsys import cli
from jaxsys.errors import RunError, UsageError
from jaxsys.fields import Fields
from jaxsys.options import in_options, said_of


class Subcommand:
    def __init__(self, outcome):
        self.outcome = outcome

    def main(self, argv, prog):
        self.seen = (list(argv), prog)
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


@pytest.fixture
def subcommand(monkeypatch):
    def install(outcome):
        made = Subcommand(outcome)
        monkeypatch.setattr(cli.importlib, "import_module", lambda name: made)
        return made

    return install


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in cli.SUBCOMMANDS)


def test_no_command_is_a_usage_fault(capsys):
    assert cli.main([]) == 2
    assert "usage: jaxsys" in capsys.readouterr().out


def test_unknown_command_is_named(capsys):
    assert cli.main(["fly"]) == 2
    assert "'fly' is not a command; use one of plan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("outcome", "code", "line"),
    [
        (None, 0, ""),
        (3, 3, ""),
        (
            UsageError("devices=0 must be at least 1"),
            2,
            "jaxsys plan: devices=0 must be at least 1\n",
        ),
        (RunError("link is down"), 1, "jaxsys plan: link is down\n"),
        (KeyboardInterrupt(), 130, ""),
        (
            RuntimeError("RESOURCE_EXHAUSTED: no 5 bytes\nmore"),
            1,
            "jaxsys plan: out of memory: no 5 bytes; ask for smaller sizes\n",
        ),
    ],
)
def test_exit_codes(subcommand, capsys, outcome, code, line):
    made = subcommand(outcome)
    assert cli.main(["plan", "--model", "x"]) == code
    assert made.seen == (["--model", "x"], "jaxsys plan")
    assert capsys.readouterr().err == line


def test_other_faults_keep_their_traceback(subcommand):
    subcommand(RuntimeError("a fault of our own"))
    with pytest.raises(RuntimeError, match="of our own"):
        cli.main(["plan"])


def test_debug_shows_the_traceback(subcommand):
    subcommand(UsageError("no"))
    with pytest.raises(UsageError, match="no"):
        cli.main(["plan", "--debug"])


def test_messages_name_options_instead_of_parameters():
    parser = argparse.ArgumentParser()
    parser.add_argument("--pages", dest="page_count")
    parser.add_argument("--max-length")
    parser.add_argument("--model")
    parser.add_argument("--resume", action="store_true")
    said = "page_count=1 and top_pages=2 hold under max_length=9; lower max_length, or resume=True"
    assert in_options(said, parser) == (
        "--pages 1 and top_pages=2 hold under --max-length 9; lower --max-length, or --resume"
    )
    other = "the model in /tmp/max_length/page_count.json is not known; x.page_count=2"
    assert in_options(other, parser) == other


@dataclasses.dataclass(frozen=True)
class Said:
    context_by: str = "ring"


def test_fields_of_files_keep_their_names():
    parser = argparse.ArgumentParser()
    parser.add_argument("--context-by")
    with pytest.raises(UsageError) as raised:
        try:
            Fields({"context_bi": 1}, name="plan p.json").record(Said)
        except UsageError as error:
            raise UsageError(f"context_by='ring' is in vain: {error}") from None
    assert said_of(raised.value, parser) == (
        "--context-by ring is in vain: plan p.json: its field 'context_bi' is not known "
        "(did you mean 'context_by'?); known: context_by"
    )


def test_quotes_that_are_not_typed_are_left_out():
    parser = argparse.ArgumentParser()
    parser.add_argument("--non-finite")
    said = "go on without such batches (non_finite='skip')"
    assert in_options(said, parser) == "go on without such batches (--non-finite skip)"


@pytest.mark.parametrize("name", cli.SUBCOMMANDS)
def test_an_option_that_is_not_known_is_said_in_one_line(name, capsys):
    needed = {"clocks": ["show"], "plan": ["--model", "tiny", "--devices", "2"],
              "plan serve": ["tiny"], "profile cluster": ["--out", "x"],
              "convert": ["--model", "x", "--out", "y"]}.get(name, [])  # fmt: skip
    assert cli.main([*name.split(), *needed, "--fly"]) == 2
    prog = f"jaxsys {name}"
    assert capsys.readouterr().err == f"{prog}: unrecognized arguments: --fly; see {prog} --help\n"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--modle tiny --devices 2", "required: --model (--modle: did you mean --model?)"),
        ("--model tiny --devices 2 --lnk x", "arguments: --lnk x (did you mean --link?)"),
        ("--model tiny --devices 2 --lnk=x", "arguments: --lnk=x (did you mean --link?)"),
        ("--model tiny --devices 2 --gradients bfloat1", ") (did you mean 'bfloat16'?)"),
        ("--mod tiny --devices 2 --link nvlnk", "(did you mean 'nvlink'?)"),
    ],
)
def test_what_may_have_been_meant_is_said(typed, said, capsys):
    assert cli.main(["plan", *typed.split()]) == 2
    assert said in capsys.readouterr().err


def whole_options():
    for name, (module, _) in cli.SUBCOMMANDS.items():
        make = getattr(importlib.import_module(module), "parser", None)
        for action in [] if make is None else make(name)._actions:
            assert action.type is not int, f"{name} {action.option_strings}: use whole()"
            if "whole" in getattr(action.type, "__qualname__", ""):
                yield name, action.option_strings[0]


@pytest.mark.parametrize(("name", "option"), list(whole_options()))
def test_a_whole_number_out_of_range_names_its_option(name, option, capsys):
    for value in ("-1", "1.5", ""):
        assert cli.main([*name.split(), option, value]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"jaxsys {name}: {option} {value} must be ")
        assert error.endswith(f"; see jaxsys {name} --help\n") and error.count("\n") == 1


def test_python_m_jaxsys_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "jaxsys", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("jaxsys ")


def test_every_subcommand_can_be_imported():
    for module, _ in cli.SUBCOMMANDS.values():
        assert callable(importlib.import_module(module).main)


def test_a_full_disk_is_one_line(subcommand, capsys):
    """A write, unlike an open, does not say which file."""
    subcommand(OSError(errno.ENOSPC, "No space left on device"))
    assert cli.main(["train"]) == 1
    assert capsys.readouterr().err == "jaxsys train: No space left on device\n"
