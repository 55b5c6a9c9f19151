"""Rings that keep: legal for every size and count kept, with the traffic and room they say."""

from collections import Counter

import pytest

from jaxsys.errors import UsageError
from jaxsys.planner.recognise import recognise_schedule
from jaxsys.schedule import Costs, Data, Link, check, peak_live, simulate
from jaxsys.strategies import build
from jaxsys.strategies.keeping import keep, keep_weights
from jaxsys.strategies.weipipe import interleave

SIZES = [(2, 2), (2, 8), (3, 9), (4, 8), (4, 16), (8, 16)]


def sent(schedule) -> Counter:
    """Chunks that a worker sends in a step, on average."""
    hops = Counter(move.block.data for move in schedule.moves if move.source != move.target)
    return Counter({data: count / schedule.devices for data, count in hops.items()})


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_every_count_kept_is_legal_and_has_the_tasks_of_interleave(p, m):
    ring = interleave(p, m)
    for weights in range(p + 1):
        for gradients in range(p + 1):
            schedule = keep(p, m, weights, gradients)
            check(schedule)  # no input missing, every contribution counted once and brought home
            assert schedule.tasks == ring.tasks


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_all_kept_sends_each_chunk_once_however_many_microbatches(p, m):
    kept = keep(p, m)
    assert sent(kept)[Data.WEIGHT] == p - 1
    assert sent(kept)[Data.GRADIENT] == p - 1  # as few as a reduce-scatter
    ends = max(task.tick for task in kept.tasks)
    late = [move for move in kept.moves if move.start > ends]
    assert {move.start for move in late} == {ends + 1}  # one hop that nothing hides
    links = [(move.source, move.target) for move in late]
    assert len(set(links)) == len(links) <= 2  # and no link carries two
    trace = check(kept)
    assert max(peak_live(kept, trace, Data.WEIGHT)) == p
    assert max(peak_live(kept, trace, Data.GRADIENT)) == p


@pytest.mark.parametrize(("p", "m"), [(2, 8), (4, 16), (8, 32)])
def test_each_chunk_kept_sends_less_and_takes_room(p, m):
    by_weights = [sent(keep(p, m, kept, 0))[Data.WEIGHT] for kept in range(p + 1)]
    assert by_weights == sorted(by_weights, reverse=True)
    assert len(set(by_weights)) == p + 1
    by_sums = [sent(keep(p, m, 0, kept))[Data.GRADIENT] for kept in range(p + 1)]
    assert by_sums == sorted(by_sums, reverse=True)
    room = [
        max(peak_live(one, check(one), Data.WEIGHT))
        for one in (interleave(p, m), keep(p, m, 1, 0), keep_weights(p, m))
    ]
    assert room == [2, 4, p]


def test_nothing_kept_is_interleave():
    assert keep(4, 8, 0, 0) == interleave(4, 8)


def test_a_slow_link_is_waited_for_once_and_not_in_every_turn():
    costs = Costs(forward_s=1.0, backward_s=2.0, weight_bytes=4.0, gradient_bytes=8.0)
    slow = Link(bytes_per_s=1.0)
    ring, kept = (simulate(one(4, 32), costs, slow) for one in (interleave, keep))
    assert ring.step_s > 3 * kept.step_s
    free = Link(bytes_per_s=1e9)
    # A worker that waits for nobody's chunks does not wait for the others' pace either.
    assert (
        simulate(keep(4, 32), costs, free).step_s < simulate(interleave(4, 32), costs, free).step_s
    )


def test_they_are_recognised_by_what_they_do():
    for name in ("weipipe-keep", "weipipe-keep-weights", "weipipe-interleave"):
        assert recognise_schedule(build(name, devices=4, microbatches=8)) == name


@pytest.mark.parametrize("counts", [{"weights": 5}, {"gradients": -1}])
def test_more_than_there_is_cannot_be_kept(counts):
    with pytest.raises(UsageError, match="are not of a ring of 4 chunks; keep 0 to 4"):
        keep(4, 8, **counts)
