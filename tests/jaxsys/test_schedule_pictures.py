"""The page of schedules has a picture of every strategy it names, and the simulated figures."""

import json
import re
from pathlib import Path

import pytest

from jaxsys.strategies import NAMES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/schedules.md").read_text()
RESULT = json.loads((ROOT / "results/schedules.json").read_text())


def test_every_picture_exists_and_is_a_png():
    shown = re.findall(r"\]\(schedules/(.*?)\.png\)", PAGE)
    drawn = [n for n in NAMES if n.startswith(("gpipe", "1f1b", "zb-", "weipipe"))]
    assert sorted(shown) == sorted([*drawn, "nodes"])
    for name in shown:
        assert (ROOT / f"docs/schedules/{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("row", RESULT["rows"], ids=lambda row: row["schedule"])
def test_the_table_shows_the_result_file(row):
    line = next(
        line
        for line in PAGE.splitlines()
        if line.startswith(f"| `{row['schedule']}`") and re.search(r"\| \d+\.\d \|", line)
    )
    figures = [float(cell) for cell in line.split("|")[2:-1]]
    want = [value for key, value in row.items() if key.endswith("_pct")]
    assert figures[:-1] == [pytest.approx(value, abs=0.051) for value in want]
    assert figures[-1] == row["held_stages"]


def test_the_table_of_links_shows_the_result_file():
    start = PAGE.index("## What a link must carry")
    lines = [line for line in PAGE[start:].split("\n## ")[0].splitlines() if line.startswith("|")]
    shown = [[float(cell) for cell in line.split("|")[3:-1]] for line in lines[2:]]
    want = [[v for key, v in row.items() if key.startswith("hop_")] for row in RESULT["links"]]
    assert shown == [[pytest.approx(value, abs=0.0051) for value in row] for row in want]
