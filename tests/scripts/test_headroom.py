"""Where headroom lies: every part held, and of each kind what saves most at equal attainment."""

from dataclasses import replace

import pytest

from studies.calibration import dataset_trace, scenario
from studies.headroom import MOST_LOST, decomposed, mark_best


def row(what: str, headroom_pct: float, lost_points: float) -> dict:
    return {"what": what, "headroom_pct": headroom_pct, "lost_points": lost_points}


def test_the_best_keeps_attainment_where_one_does():
    rows = [row("a", 90, 4.0), row("a", 60, 0.5), row("a", 50, 0.0), row("b", 90, 4.0)]
    rows.append(row("b", 95, 3.0))
    mark_best(rows)
    assert [one["best"] for one in rows] == [False, True, False, False, True]


def test_each_part_is_held_and_the_whole_is_between_its_ends():
    setting = replace(scenario(), clocks_mhz=(1005, 1200, 1410))
    rows = decomposed(dataset_trace("lmsys", 20, 3, duration_s=2.0), setting)
    assert rows[0]["headroom_pct"] == 0 and rows[1]["headroom_pct"] == pytest.approx(100)
    by_what = {one["what"]: one for one in rows if one["best"]}
    assert len(by_what) == len({one["what"] for one in rows})
    parts = [by_what[f"{role} at the sweet spot"]["headroom_pct"] for role in ("prefill", "decode")]
    assert all(0 < part < 100 for part in parts) and sum(parts) == pytest.approx(100, abs=10)
    assert all(one["lost_points"] <= MOST_LOST for one in by_what.values())
