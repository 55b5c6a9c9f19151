"""Makes the headline figures that this machine allows, and docs/RESULTS.md from all result files.

A run that is done leaves a note in out/reproduce, so that a second call goes on where the first
stopped; what it replaced in results/ shows in `git diff`.
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from headline import Run
from headlines import HEADLINES
from page import render

from jaxsys.results import hardware, table

ROOT = Path(__file__).resolve().parents[2]
NOTES = ROOT / "out/reproduce"


def runs() -> list[Run]:
    """Each run once."""
    return list({run.name: run for headline in HEADLINES for run in headline.runs}.values())


def hindered(run: Run, gpus: int, traces: Path | None) -> str:
    """Why a run cannot be made here; empty if it can."""
    reasons = {
        f"needs {run.gpus} GPUs, has {gpus}": run.gpus > gpus,
        "needs root": run.root and os.geteuid() != 0,
        "needs --traces": run.traces and traces is None,
        "needs a server: start it, then run the command yourself": run.server,
    }
    return "; ".join(reason for reason, holds in reasons.items() if holds)


def command_lines(run: Run, gpu_names: list[str], traces: Path | None) -> Iterator[list[str]]:
    """The run's commands for this machine, in this interpreter."""
    name = gpu_names[0].split(",")[0] if gpu_names else "cpu"
    short = next((word.lower() for word in name.split() if any(c.isdigit() for c in word)), name)
    values = {"gpu": short, "gpus": len(gpu_names), "traces": shlex.quote(str(traces))}
    for command in run.commands:
        program, *rest = shlex.split(command.format_map(values))
        where = ["-m", "jaxsys.cli"] if program == "jaxsys" else [str(ROOT / program)]
        yield [sys.executable, *where, *rest]


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/reproduce", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=[run.name for run in runs()])
    parser.add_argument("--list", action="store_true", help="show the runs; make nothing")
    parser.add_argument("--again", action="store_true", help="also runs that are done")
    parser.add_argument("--report-only", action="store_true", help="write docs/RESULTS.md only")
    parser.add_argument("--traces", type=Path, help="folder of the public traces and tables")
    options = parser.parse_args()
    gpus = hardware()["gpus"]
    chosen = [run for run in runs() if not options.only or run.name in options.only]
    if options.list:
        rows = [
            {"run": run.name, "here": hindered(run, len(gpus), options.traces) or "yes",
             "command": command} for run in chosen for command in run.commands
        ]  # fmt: skip
        print(table(rows))
        return 0
    failed = []
    NOTES.mkdir(parents=True, exist_ok=True)
    for run in [] if options.report_only else chosen:
        done = NOTES / f"{run.name}.done"
        if reason := hindered(run, len(gpus), options.traces):
            print(f"{run.name}: {reason}", flush=True)
        elif done.exists() and not options.again:
            print(f"{run.name}: done before; --again repeats it", flush=True)
        else:
            print(f"{run.name}: running", flush=True)
            lines = command_lines(run, gpus, options.traces)
            if all(subprocess.run(line, cwd=ROOT, check=False).returncode == 0 for line in lines):
                done.touch()
            else:
                failed.append(run.name)
    target = ROOT / "docs/RESULTS.md"
    target.write_text(render(HEADLINES, ROOT, target))
    print(f"wrote {target.relative_to(ROOT)}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
