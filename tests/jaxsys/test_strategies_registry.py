"""Strategies by name, and what is said of names and options that do not exist."""

import pytest

from jaxsys.errors import UsageError, did_you_mean
from jaxsys.schedule import check
from jaxsys.strategies import NAMES, build


@pytest.mark.parametrize("name", NAMES)
def test_every_name_builds_a_legal_schedule_that_knows_its_name(name):
    schedule = build(name, devices=4, microbatches=8)
    check(schedule)
    assert schedule.name == name
    assert (schedule.devices, schedule.microbatches) == (4, 8)


def test_unknown_name_lists_the_names():
    with pytest.raises(
        UsageError, match="unknown strategy 'gpip' .did you mean 'gpipe'.*; use one of .*1f1b"
    ):
        build("gpip", devices=4, microbatches=8)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("weipe", ["weipipe-naive", "weipipe-interleave", "weipipe-wzb1", "weipipe-wzb2"]),
        ("weipipe-interlave", ["weipipe-interleave"]),
        ("zb", ["zb-h1", "zb-h2", "zb-overlap"]),
        ("zero3", ["zero-3"]),
        ("dpp", ["dp"]),
        ("abc", []),
    ],
)
def test_a_near_miss_means_what_begins_so(typed, meant):
    said = did_you_mean(typed, NAMES)
    assert [name for name in NAMES if repr(name) in said] == [n for n in NAMES if n in meant]


def test_options_reach_the_generator_and_unknown_ones_are_refused():
    assert build("dp", devices=2, microbatches=4, chunks=3).chunks == 3
    with pytest.raises(UsageError, match="'gpipe' has no option 'chunks'; it takes none"):
        build("gpipe", devices=2, microbatches=4, chunks=3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("devices", "microbatches"), [(0, 4), (4, 0), (-1, 4)])
def test_impossible_sizes_are_usage_errors(name, devices, microbatches):
    with pytest.raises(UsageError, match=f"={min(devices, microbatches)}"):
        build(name, devices=devices, microbatches=microbatches)


def test_a_near_miss_of_an_argument_means_it():
    with pytest.raises(UsageError, match=r"no option 'device' \(did you mean 'devices'\?\)"):
        build("1f1b", device=4, microbatches=4)
    with pytest.raises(UsageError, match="needs microbatches"):
        build("1f1b", devices=4)
