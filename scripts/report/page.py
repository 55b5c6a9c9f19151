"""docs/RESULTS.md from result files: measured and simulated apart, what was not run by name."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from headline import Headline, origin, table

from jaxsys.results import read_result

HEAD = """# Results

Written by `scripts/reproduce --report-only` from the JSON files in `results/`; do not edit.
`scripts/reproduce` makes what the machine it runs on allows. Each section has what the source
claims, what there is, on what it was made, and the command. Measured figures ran on the hardware
named; simulated ones come from the models of the planner and the server, and say nothing about a
machine until they are measured."""


def render(headlines: Sequence[Headline], root: Path, page: Path) -> str:
    """The page's text.

    Args:
        headlines: in their order on the page.
        root: of the repository; results are in `results/`.
        page: where the text will stand, for its links.
    """
    folder = root / "results"
    up = Path(os.path.relpath(root, page.parent))
    used: set[str] = set()
    overview, sections = [], {"measured": [], "simulated": []}
    for headline in headlines:
        results = headline.results(folder)
        used |= {result.name for result in results}
        state = headline.kind if results else "not run"
        overview.append(
            [f"[{headline.title}](#{anchor(headline.title)})", state, made_by(headline)]
        )
        sections[headline.kind].append(_section(headline, root, up))
    parts = [HEAD, table(["figure", "", "made by"], overview)]
    for kind, texts in sections.items():
        parts += [f"## {kind.capitalize()}", *texts]
    others = [path for path in sorted(folder.glob("*.json")) if path.name not in used]
    if others:
        parts.append("## Other result files")
        rows = []
        for path in others:
            record = read_result(path)
            made = [record["kind"], len(record["rows"]), origin(record)]
            rows.append([_link(path.name, up), *made])
        parts.append(table(["file", "", "rows", "made on"], rows))
    return "\n\n".join(parts) + "\n"


def anchor(title: str) -> str:
    """The fragment GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def made_by(headline: Headline) -> str:
    """The programs, without their options."""
    programs = dict.fromkeys(
        command.split(" --")[0] for run in headline.runs for command in run.commands
    )
    return ", ".join(f"`{program}`" for program in programs)


def _section(headline: Headline, root: Path, up: Path) -> str:
    parts = [f"### {headline.title}", f"*Source:* {headline.claim}"]
    results = headline.results(root / "results")
    if results:
        parts.append(headline.show(results))
        parts += [
            f"![{headline.title}]({up / picture})"
            for picture in headline.pictures
            if (root / picture).exists()
        ]
        parts.append(
            "\n".join(f"- {_link(result.name, up)}: {origin(result.record)}" for result in results)
        )
        parts += [result.record["note"] for result in results if "note" in result.record]
    else:
        needs = [run.needs() for run in headline.runs]
        parts.append(f"**Not run yet**{': needs ' + '; '.join(needs) if all(needs) else ''}.")
    words = {"gpu": "GPU", "gpus": "N", "traces": "TRACES"}
    commands = [command.format_map(words) for run in headline.runs for command in run.commands]
    if commands:
        parts.append("```console\n" + "\n".join(f"$ {command}" for command in commands) + "\n```")
    return "\n\n".join(parts)


def _link(name: str, up: Path) -> str:
    return f"[{name}]({up / 'results' / name})"
