"""No step comes below what is found in a few array operations a tick, and rings come near it."""

import random

import pytest

from jaxsys.schedule import Costs, Link, Placement, simulate
from jaxsys.schedule.least import LeastSchedule
from jaxsys.schedule.quick import QuickSchedule
from jaxsys.strategies import STRATEGIES, build

OWNED = [name for name, one in STRATEGIES.items() if one.placement is Placement.OWNER]
ROUNDING = 1e-12


def random_costs(rng: random.Random, chunks: int, *, places: bool) -> Costs:
    """Tasks and blocks of any size, some chunks without any time."""

    def each() -> list[float]:
        return [rng.choice([0.0, 1.0, 1.0, 1.0]) * rng.uniform(0.5, 2) for _ in range(chunks)]

    return Costs(
        forward_s=each(), backward_s=each(), input_gradient_s=each(), weight_gradient_s=each(),
        embed_s=0.1, head_s=rng.choice([0.2, 3.0]), update_s=0.3, before_s=0.4, after_s=0.5,
        weight_bytes=each(), gradient_bytes=each(), activation_bytes=rng.random(),
        join_s=rng.random() if places else 0.0, cut_s=rng.random() if places else 0.0,
    )  # fmt: skip


def random_link(rng: random.Random) -> Link:
    """From one that nothing hides to one that takes no time."""
    share = rng.choice([0.0, 0.3])
    return Link(
        latency_s=rng.choice([0.0, 0.1]), bytes_per_s=rng.choice([0.5, 2.0, 20.0, 1e9]),
        launch_s=0.02, contention=share, waiting_contention=rng.choice([0.0, share]),
    )  # fmt: skip


@pytest.mark.parametrize("name", OWNED)
def test_no_step_is_shorter(name):
    rng = random.Random(name)
    for _ in range(12):
        devices = rng.choice([2, 3, 4, 6])
        schedule = build(name, devices=devices, microbatches=devices * rng.choice([1, 2, 5]))
        costs = random_costs(rng, schedule.chunks, places=rng.random() < 0.3)
        link = random_link(rng)
        least = LeastSchedule(QuickSchedule(schedule)).step_s(costs, link)
        step_s = simulate(schedule, costs, link).step_s
        assert least <= step_s * (1 + ROUNDING)
        assert least >= 0.5 * step_s


@pytest.mark.parametrize("name", [name for name in OWNED if name != "gpipe"])
def test_no_step_of_many_microbatches_is_shorter(name):
    rng = random.Random(f"{name} many")
    for _ in range(6):
        devices = rng.choice([2, 3, 4])
        quick = QuickSchedule(
            build(name, devices=devices, microbatches=5 * devices), period=devices
        )
        costs = random_costs(rng, quick.chunks, places=rng.random() < 0.3)
        link, total = random_link(rng), (5 + rng.choice([1, 4])) * devices
        least = LeastSchedule(quick).step_s(costs, link, microbatches=total)
        many = build(name, devices=devices, microbatches=total)
        assert least <= simulate(many, costs, link).step_s * (1 + ROUNDING)


@pytest.mark.parametrize("name", [name for name in OWNED if name.startswith("weipipe")])
@pytest.mark.parametrize("bytes_per_s", [0.2, 1.0, 100.0])
def test_transfers_of_a_ring_and_its_start_and_end_are_counted(name, bytes_per_s):
    """What compute alone takes says little of a ring that waits for its hops."""
    schedule = build(name, devices=6, microbatches=24)
    costs = Costs(
        forward_s=1.0, backward_s=2.0, input_gradient_s=1.0, weight_gradient_s=1.0,
        weight_bytes=1.0, gradient_bytes=2.0,
    )  # fmt: skip
    link = Link(bytes_per_s=bytes_per_s, contention=0.3)
    least = LeastSchedule(QuickSchedule(schedule)).step_s(costs, link)
    step_s = simulate(schedule, costs, link).step_s
    assert 0.9 * step_s <= least <= step_s * (1 + ROUNDING)


def test_microbatches_that_no_turns_make_are_refused():
    quick = QuickSchedule(build("1f1b", devices=2, microbatches=8), period=2)
    costs = random_costs(random.Random(0), 2, places=False)
    with pytest.raises(ValueError, match="9 microbatches are not 8 and turns"):
        LeastSchedule(quick).step_s(costs, Link(), microbatches=9)
