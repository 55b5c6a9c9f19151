"""The event simulation against timelines worked out by hand."""

import pytest

from jaxsys.errors import UsageError
from jaxsys.schedule import (
    Block,
    Costs,
    Data,
    Link,
    Move,
    MoveKind,
    Placement,
    Schedule,
    Task,
    TaskKind,
    gradient_block,
    simulate,
)
from jaxsys.strategies.data_parallel import data_parallel
from jaxsys.strategies.pipeline import gpipe, one_f_one_b, one_f_one_b_overlap
from jaxsys.strategies.weipipe import interleave

MODES = ({}, {"lockstep": True}, {"eager_sends": True})


def compute_times(result, device):
    rows = [e for e in result.events if e.stream == "compute" and e.device == device]
    return [(e.label, e.start_s, e.end_s) for e in rows]


@pytest.mark.parametrize("mode", MODES)
def test_one_microbatch_through_two_stages(mode):
    costs = Costs(forward_s=2.0, backward_s=3.0, activation_bytes=4.0)
    result = simulate(gpipe(2, 1), costs, Link(latency_s=0.5, bytes_per_s=1.0), **mode)
    # F0, hop of 0.5 + 4 s, F1, B1, hop, B0.
    assert compute_times(result, 0) == [("F0,0", 0.0, 2.0), ("B0,0", 16.0, 19.0)]
    assert compute_times(result, 1) == [("F1,0", 6.5, 8.5), ("B1,0", 8.5, 11.5)]
    assert result.step_s == 19.0
    assert result.busy_s == (5.0, 5.0)
    assert result.sent_bytes == (4.0, 4.0)
    assert result.bubble == pytest.approx(14 / 19)
    assert result.spans_s == ((0.0, 19.0), (6.5, 11.5))
    assert result.inner_bubble == pytest.approx(14 / 19)


def test_sends_that_block_and_sends_that_do_not():
    costs = Costs(forward_s=1.0, backward_s=1.0, activation_bytes=10.0)
    schedule, link = gpipe(2, 2), Link(bytes_per_s=1.0)
    coupled = simulate(schedule, costs, link)
    # Both ends wait for each exposed hop of 10 s, so device 0 starts its second F at 11.
    assert compute_times(coupled, 0)[1] == ("F0,1", 11.0, 12.0)
    assert compute_times(coupled, 1)[2] == ("B1,0", 23.0, 24.0)
    assert coupled.step_s == 46.0
    eager = simulate(schedule, costs, link, eager_sends=True)
    # Device 0 goes on at once, but its sends leave one after the other: 1-11 and 11-21.
    assert compute_times(eager, 0)[1] == ("F0,1", 1.0, 2.0)
    assert compute_times(eager, 1)[:2] == [("F1,0", 11.0, 12.0), ("F1,1", 21.0, 22.0)]
    assert compute_times(eager, 0)[2:] == [("B0,0", 33.0, 34.0), ("B0,1", 43.0, 44.0)]
    assert eager.step_s == 44.0


@pytest.mark.parametrize(
    "schedule", [one_f_one_b_overlap(3, 6), interleave(3, 6)], ids=lambda s: s.name
)
def test_compute_is_slowed_beside_what_is_sent_and_what_waits_to_be(schedule):
    """The work done in each moment of a task adds up to the task."""
    sending, waiting = 1.0, 0.5
    costs = Costs(
        forward_s=(2.0, 3.0, 5.0),
        backward_s=(6.0, 4.0, 3.0),
        weight_bytes=1.0,
        gradient_bytes=1.0,
        activation_bytes=1.0,
    )
    link = Link(bytes_per_s=0.5, contention=sending, waiting_contention=waiting)
    result = simulate(schedule, costs, link)
    waited = 0.0
    for device in range(schedule.devices):
        mine = [event for event in result.events if event.device == device]
        slowed, free = [], 0.0
        for event in mine:
            if event.stream == "send":
                assert isinstance(event.work, Move)
                opened = max(free, result.tick_start_s[device][event.work.start])
                slowed.append((opened, event.start_s, waiting))
                slowed.append((event.start_s, event.end_s, sending))
                free = event.end_s
        for event in mine:
            if isinstance(event.work, Task):
                done = event.end_s - event.start_s
                for start, end, share in slowed:
                    beside = max(0.0, min(end, event.end_s) - max(start, event.start_s))
                    done -= beside * share / (1 + share)
                    waited += beside * (share == waiting)
                assert done == pytest.approx(costs.task_s(event.work, schedule.chunks))
    assert waited > 1.0
    alone = simulate(schedule, costs, Link(bytes_per_s=0.5))
    assert result.step_s > alone.step_s


def test_lockstep_makes_a_mixed_tick_as_long_as_its_longest_task():
    costs = Costs(forward_s=1.0, backward_s=2.0)
    # Ticks: F | F | F and B | B and F | B | B ... : with P=2, M=2 the six ticks of 1F1B are
    # F0 | F0 F1 | B1 | F1 B0 | B1 | B0, of which the fourth lasts as long as its B.
    assert simulate(one_f_one_b(2, 2), costs, Link(), lockstep=True).step_s == 1 + 1 + 2 + 2 + 2 + 2
    assert simulate(one_f_one_b(2, 2), costs, Link(), eager_sends=True).step_s == 9


def test_lockstep_and_eager_sends_exclude_each_other():
    with pytest.raises(ValueError, match="exclude"):
        simulate(
            gpipe(2, 1), Costs(forward_s=1, backward_s=1), Link(), lockstep=True, eager_sends=True
        )


@pytest.mark.parametrize("mode", MODES)
def test_collectives_run_as_rings_and_the_step_waits_for_them(mode):
    costs = Costs(forward_s=1.0, backward_s=2.0, gradient_bytes=8.0, update_s=0.25, after_s=0.5)
    result = simulate(data_parallel(4, 4), costs, Link(latency_s=0.1, bytes_per_s=2.0), **mode)
    # All-reduce of 8 bytes on 4 devices: 6 messages, 2 * 3/4 * 8 = 12 bytes.
    assert result.step_s == pytest.approx(3 + (6 * 0.1 + 12 / 2) + 0.5 + 0.25)
    assert result.sent_bytes == (12.0,) * 4


def test_sizes_and_times_of_single_chunks_and_of_edges():
    costs = Costs(
        forward_s=[1.0, 2.0], backward_s=[3.0, 4.0], embed_s=10.0, head_s=100.0, before_s=1000.0
    )
    result = simulate(gpipe(2, 1), costs, Link())
    assert result.busy_s == (1 + 3 + 2 * 10, 2 + 4 + 100)
    assert result.step_s == 1000 + 24 + 106


def test_memory_over_time():
    costs = Costs(
        forward_s=1.0,
        backward_s=1.0,
        weight_bytes=1000.0,
        gradient_bytes=100.0,
        residual_bytes=10.0,
        activation_bytes=1.0,
        static_bytes=5.0,
    )
    result = simulate(gpipe(2, 1), costs, Link())
    first, second = result.memory
    # Device 0: F makes a residual and the activation it sends at tick 1; its B is at tick 3, where
    # the cotangent lands and the gradient appears.
    want = {Data.WEIGHT: 1000.0, Data.RESIDUAL: 10.0}
    assert first[0] == {**want, Data.ACTIVATION: 1.0}
    assert first[1] == {**want, Data.ACTIVATION: 1.0}
    assert first[2] == want
    assert first[3] == {**want, Data.COTANGENT: 1.0, Data.GRADIENT: 100.0}
    # Device 1: the activation lands at tick 1, F makes another, which its B reads at tick 2.
    assert second[0] == {Data.WEIGHT: 1000.0}
    assert second[1] == {**want, Data.ACTIVATION: 2.0}
    assert second[2] == {
        **want,
        Data.ACTIVATION: 1.0,
        Data.COTANGENT: 1.0,
        Data.GRADIENT: 100.0,
    }
    assert result.peak_bytes == (5 + 1111, 5 + 1112)


def test_a_travelling_sum_is_ready_when_its_last_part_is():
    def task(tick, device, kind, chunk, microbatch):
        return Task(tick=tick, device=device, kind=kind, chunk=chunk, microbatch=microbatch)

    weight = Block(data=Data.WEIGHT, chunk=0)
    schedule = Schedule(
        name="hand-made",
        devices=2,
        chunks=2,
        microbatches=2,
        placement=Placement.OWNER,
        owners=(1, 0),
        starts=((Block(data=Data.WEIGHT, chunk=1), 0), (weight, 1)),
        tasks=(
            *(task(1, d, TaskKind.FORWARD, 0, d) for d in range(2)),
            *(task(2, d, TaskKind.FORWARD, 1, d) for d in range(2)),
            *(task(3, d, TaskKind.BACKWARD, 1, d) for d in range(2)),
            *(task(4, d, TaskKind.BACKWARD, 0, d) for d in range(2)),
        ),
        moves=(
            Move(kind=MoveKind.PERMUTE, block=weight, source=1, target=0, start=0, arrive=1),
            Move(
                kind=MoveKind.PERMUTE,
                block=Block(data=Data.WEIGHT, chunk=1),
                source=0,
                target=1,
                start=0,
                arrive=1,
            ),
            # Chunk 1's sum goes home at once, chunk 0's from device 0 meets device 1's.
            Move(
                kind=MoveKind.PERMUTE,
                block=gradient_block(1),
                source=1,
                target=0,
                start=4,
                arrive=5,
            ),
            Move(
                kind=MoveKind.PERMUTE,
                block=gradient_block(0),
                source=0,
                target=1,
                start=5,
                arrive=6,
            ),
        ),
    )
    costs = Costs(forward_s=1.0, backward_s=2.0, weight_bytes=3.0, gradient_bytes=7.0)
    # Weights 3 s, F 2 s, B of chunk 1 until 7; its sum travels 7-14. B of chunk 0 ends at 9; its
    # sum travels 9-16 the other way.
    eager = simulate(schedule, costs, Link(bytes_per_s=1.0), eager_sends=True)
    assert eager.step_s == 16.0
    # Where both ends wait at the head of tick 5, chunk 0's sum leaves at 14.
    assert simulate(schedule, costs, Link(bytes_per_s=1.0)).step_s == 21.0


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Link(bytes_per_s=0), "bytes_per_s=0 must be above 0"),
        (lambda: Link(latency_s=-1), "latency_s=-1 must not be below 0"),
        (lambda: Costs(forward_s=-1, backward_s=1), "forward_s=-1 must not be below 0"),
        (lambda: Costs(forward_s=1, backward_s=(1, -2)), "backward_s=-2 must not be below 0"),
    ],
)
def test_amounts_below_nothing(make, says):
    with pytest.raises(UsageError, match=says):
        make()
