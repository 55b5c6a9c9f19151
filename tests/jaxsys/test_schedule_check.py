"""The checker against schedules worked out by hand, and every strategy with a fault put in."""

import dataclasses

import pytest

from jaxsys.schedule import (
    ALL,
    Block,
    Data,
    Move,
    MoveKind,
    Placement,
    Schedule,
    ScheduleError,
    Task,
    TaskKind,
    check,
    gradient_block,
    peak_live,
    task_inputs,
    trace,
)
from jaxsys.strategies import NAMES, build
from jaxsys.strategies.pipeline import gpipe

F, B = TaskKind.FORWARD, TaskKind.BACKWARD
I, W = TaskKind.INPUT_GRADIENT, TaskKind.WEIGHT_GRADIENT
STILL = (Data.ACTIVATION, Data.COTANGENT, Data.RESIDUAL, Data.TAP)


def task(tick, kind, *, device=0, chunk=0, microbatch=0):
    return Task(tick=tick, device=device, kind=kind, chunk=chunk, microbatch=microbatch)


def weight(chunk=0, lane=""):
    return Block(data=Data.WEIGHT, chunk=chunk, lane=lane)


def permute(block, source, target, start, arrive):
    return Move(
        kind=MoveKind.PERMUTE, block=block, source=source, target=target, start=start, arrive=arrive
    )


def lone(*tasks, **changes):
    """One chunk on one device."""
    parts = {
        "name": "hand-made",
        "devices": 1,
        "chunks": 1,
        "microbatches": 1,
        "placement": Placement.OWNER,
        "owners": (0,),
        "starts": ((weight(), 0),),
        "tasks": tasks,
    }
    return Schedule(**{**parts, **changes})


def ring_of_two(**changes):
    """Chunk 0 rests on device 0; device 1 borrows it, runs a microbatch, and sends its sum back."""
    parts = {
        "name": "hand-made",
        "devices": 2,
        "chunks": 2,
        "microbatches": 1,
        "placement": Placement.OWNER,
        "owners": (0, 1),
        "starts": ((weight(0), 0), (weight(1), 1)),
        "tasks": (
            task(1, F, device=1),
            task(2, F, device=1, chunk=1),
            task(3, B, device=1, chunk=1),
            task(4, B, device=1, chunk=0),
        ),
        "moves": (permute(weight(0), 0, 1, 0, 1), permute(gradient_block(0), 1, 0, 5, 6)),
    }
    return Schedule(**{**parts, **changes})


def test_copies_of_a_hand_made_schedule():
    schedule = lone(task(0, F), task(1, I), task(3, W))
    copies = {c.block.data: c for c in check(schedule).copies}
    spans = {data: (c.made_at, c.born, c.last_use) for data, c in copies.items()}
    assert spans == {
        Data.WEIGHT: (0, 0, 1),
        Data.ACTIVATION: (0, 1, 1),
        Data.RESIDUAL: (0, 1, 1),
        Data.TAP: (1, 2, 3),
        # The sum stays until the end, which is after the last tick.
        Data.GRADIENT: (3, 4, 4),
    }


def test_a_borrowed_chunk_and_its_sum():
    found = check(ring_of_two())
    borrowed = [c for c in found.copies if c.block == weight(0)]
    assert [(c.device, c.born, c.last_use) for c in borrowed] == [(0, 0, 0), (1, 1, 4)]
    sums = [c for c in found.copies if c.block == gradient_block(0)]
    assert [(c.device, c.born, c.last_use) for c in sums] == [(0, 6, 6), (1, 5, 5)]
    assert all(c.fresh for c in found.contributions)
    assert found.merges == frozenset()
    assert peak_live(ring_of_two(), found, Data.WEIGHT) == [1, 2]
    assert peak_live(ring_of_two(), found, Data.WEIGHT, Data.RESIDUAL) == [1, 4]


def exchange(**changes):
    """Two devices lend each other their chunk, run a microbatch each, and add up their sums."""
    parts = {
        "name": "hand-made",
        "devices": 2,
        "chunks": 2,
        "microbatches": 2,
        "placement": Placement.OWNER,
        "owners": (0, 1),
        "starts": ((weight(0), 0), (weight(1), 1)),
        "tasks": tuple(
            task(tick, kind, device=device, chunk=chunk, microbatch=device)
            for device in range(2)
            for tick, kind, chunk in ((1, F, 0), (2, F, 1), (3, B, 1), (4, B, 0))
        ),
        "moves": (
            permute(weight(0), 0, 1, 0, 1),
            permute(weight(1), 1, 0, 0, 1),
            permute(gradient_block(1), 0, 1, 4, 5),
            permute(gradient_block(0), 1, 0, 5, 6),
        ),
    }
    return Schedule(**{**parts, **changes})


def test_sums_that_meet_are_merged():
    found = check(exchange())
    assert found.merges == set(exchange().moves[2:])
    assert all(c.fresh for c in found.contributions)
    homes = [c for c in found.copies if c.block == gradient_block(0) and c.device == 0]
    assert [(c.born, c.last_use) for c in homes] == [(5, 6)]


def test_a_sum_that_lands_in_the_tick_that_adds_to_it():
    # Device 0 runs its B of chunk 0 a tick later, when device 1's sum arrives: what lands first is
    # no merge, and the tick's own part is added to it.
    tasks = tuple(
        dataclasses.replace(t, tick=5) if (t.device, t.tick) == (0, 4) else t
        for t in exchange().tasks
    )
    found = check(exchange(tasks=tasks))
    assert found.merges == {exchange().moves[2]}
    fresh = {(c.task.device, c.task.chunk): c.fresh for c in found.contributions}
    assert fresh == {(0, 1): True, (1, 1): True, (1, 0): True, (0, 0): False}


ERRORS = {
    "out of range": (lone(task(0, F, chunk=1)), "is outside 1 devices, 1 chunks"),
    "twice": (lone(task(0, F), task(1, F), task(2, B)), "done twice"),
    "two at once": (
        lone(task(0, F), task(0, F, microbatch=1), microbatches=2),
        "already runs a F in this tick",
    ),
    "never": (lone(task(0, B)), r"F\(chunk=0, microbatch=0\) is never done"),
    "half": (lone(task(0, F), task(1, I)), "needs either B, or both I and W"),
    "whole and half": (lone(task(0, F), task(1, B), task(2, W)), "needs either B, or both"),
    "too early": (lone(task(0, B), task(1, F)), "needs residual.* where it is not"),
    "same tick": (lone(task(0, F), task(0, B)), "needs residual.* where it is not"),
    "tap of the same tick": (lone(task(0, F), task(1, I), task(1, W)), "needs tap.*not"),
    "no weights": (lone(task(0, F), task(1, B), starts=()), "needs weight.* where it is not"),
    "start elsewhere": (ring_of_two(starts=((weight(0), 1),)), "does not rest on device 1"),
    "start of a sum": (
        lone(task(0, F), task(1, B), starts=((gradient_block(0), 0),)),
        "only weights can",
    ),
    "sum never sent": (
        ring_of_two(moves=(permute(weight(0), 0, 1, 0, 1),)),
        r"gradient\(0\) is left behind on devices \[1\]",
    ),
    "sum sent too early": (
        ring_of_two(moves=(permute(weight(0), 0, 1, 0, 1), permute(gradient_block(0), 1, 0, 4, 5))),
        r"needs gradient\(0\) on device 1, where it is not",
    ),
    "late weights": (
        ring_of_two(moves=(permute(weight(0), 0, 1, 0, 2), permute(gradient_block(0), 1, 0, 5, 6))),
        r"needs weight\(0\) on device 1, where it is not",
    ),
    "to itself": (ring_of_two(moves=(permute(weight(0), 0, 0, 0, 1),)), "another device"),
    "backwards in time": (ring_of_two(moves=(permute(weight(0), 0, 1, 1, 0),)), "before it starts"),
    "no such device": (ring_of_two(moves=(permute(weight(0), 0, 2, 0, 1),)), "outside"),
    "sum counted twice": (
        exchange(
            moves=(*exchange().moves[:2], *(permute(gradient_block(c), 0, 1, 5, 6) for c in (1, 1)))
        ),
        r"needs gradient\(1\) on device 0, where it is not",
    ),
    "sum that stays away": (
        exchange(moves=exchange().moves[:3]),
        r"gradient\(0\) is left behind on devices \[1\]",
    ),
    "residual on the move": (
        ring_of_two(
            moves=(
                permute(weight(0), 0, 1, 0, 1),
                permute(Block(data=Data.RESIDUAL, chunk=0, microbatch=0), 1, 0, 2, 3),
            )
        ),
        "residual never moves",
    ),
    "gather of whole chunks": (
        lone(
            task(0, F),
            task(1, B),
            moves=(
                Move(
                    kind=MoveKind.ALL_GATHER,
                    block=weight(),
                    source=ALL,
                    target=ALL,
                    start=0,
                    arrive=1,
                ),
            ),
        ),
        "only sharded weights are gathered",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_faults_are_named(name):
    schedule, message = ERRORS[name]
    with pytest.raises(ScheduleError, match=message):
        check(schedule)


def test_bound_on_live_copies():
    check(gpipe(2, 3), max_live={Data.RESIDUAL: 3})
    with pytest.raises(ScheduleError, match="gpipe: device 0 holds 3 residual copies; bound 2"):
        check(gpipe(2, 3), max_live={Data.RESIDUAL: 2})


def mutants(schedule):
    """Faults that no schedule survives, as (what was done, the faulty schedule)."""
    replace = dataclasses.replace
    for at, one in enumerate(schedule.tasks):
        rest = schedule.tasks[:at] + schedule.tasks[at + 1 :]
        yield f"without {one}", replace(schedule, tasks=rest)
        again = replace(one, tick=schedule.ticks)
        yield f"{one} again", replace(schedule, tasks=(*schedule.tasks, again))
        # Another chunk, in exchange with another of the device's tasks of the kind.
        for other_at, other in enumerate(schedule.tasks):
            twin = (other.device, other.kind, other.microbatch)
            if twin == (one.device, one.kind, one.microbatch) and other.chunk > one.chunk:
                tasks = list(schedule.tasks)
                tasks[at] = replace(one, chunk=other.chunk)
                tasks[other_at] = replace(other, chunk=one.chunk)
                # Sums may be made in any order, so a W may stand for another whose tap is there.
                if one.kind is not W:
                    yield f"{one} for {other}", replace(schedule, tasks=tuple(tasks))
                break
    reads = {
        (block, t.device, t.tick) for t in schedule.tasks for block in task_inputs(schedule, t)
    }
    arrived = {block: device for block, device in schedule.starts}
    been = {(block, device) for block, device in arrived.items()}
    moves = sorted(schedule.moves, key=lambda m: m.arrive)
    last = {move.block.chunk: move for move in moves if move.block.data is Data.GRADIENT}
    for move in moves:
        if move.source == ALL:
            continue
        landed = move.landed
        first = (landed, move.target) not in been
        been.add((landed, move.target))
        # A worker could use the copy of a weight that it had a lap before, if it kept it.
        if landed.data is Data.WEIGHT and not first:
            continue
        # A sum may rest on its way and go on with the next one that passes, but not the last time.
        if landed.data is Data.GRADIENT and move != last[landed.chunk]:
            continue
        rest = [m for m in schedule.moves if m is not move]
        yield f"without {move}", replace(schedule, moves=tuple(rest))
        wrong = replace(move.block, chunk=(move.block.chunk + 1) % schedule.chunks)
        if wrong != move.block and landed.data in STILL:
            faulty = replace(move, block=wrong)
            yield f"{move} with {wrong}", replace(schedule, moves=(*rest, faulty))
        if (landed, move.target, move.arrive) in reads:
            late = replace(move, arrive=move.arrive + 1)
            yield f"late {move}", replace(schedule, moves=(*rest, late))


@pytest.mark.parametrize("name", NAMES)
def test_every_fault_put_into_a_strategy_is_found(name):
    schedule = build(name, devices=3, microbatches=6)
    check(schedule)
    count = 0
    for what, faulty in mutants(schedule):
        count += 1
        with pytest.raises(ScheduleError):
            check(faulty)
            print(f"not found: {what}")
    assert count >= 2 * len(schedule.tasks)


def test_trace_of_a_strategy_is_the_same_through_json():
    for name in NAMES:
        schedule = build(name, devices=2, microbatches=4)
        again = Schedule.from_json(schedule.to_json())
        assert again == schedule
        assert trace(again) == trace(schedule)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "not a schedule in JSON"),
        ("[]", "not a schedule in JSON"),
        ("{}", "not a schedule in JSON"),
        ('{"format": 99}', "schedule format 99, but this version reads 1"),
        ('{"format": 1}', "^its field 'devices' is missing"),
    ],
)
def test_json_that_is_no_schedule(text, message):
    with pytest.raises(ScheduleError, match=message):
        Schedule.from_json(text)


def test_owners_must_be_as_many_on_every_device():
    with pytest.raises(ScheduleError, match="2 owners for 1 chunks"):
        lone(task(0, F), owners=(0, 0))
    with pytest.raises(ScheduleError, match="must give each of 2 devices as many chunks"):
        ring_of_two(owners=(0, 0))
