"""A strategy from outside the package: it trains, is planned, searched for and recognised."""

import dataclasses
import math
from typing import Any

import numpy as np
import optax
import pytest

from jaxsys import strategies
from jaxsys.cli import main
from jaxsys.errors import UsageError
from jaxsys.hardware import device, link
from jaxsys.model import initial_parameters, layered, preset
from jaxsys.planner.cluster import Cluster
from jaxsys.planner.lower import to_schedule
from jaxsys.planner.named import compare
from jaxsys.planner.plans import PATHS, Plan
from jaxsys.planner.problem import Problem
from jaxsys.planner.recognise import describe, recognise, recognise_schedule
from jaxsys.planner.runs import why_not
from jaxsys.planner.search import Effort, search
from jaxsys.planner.space import Space
from jaxsys.planner.workload import decoder_workload
from jaxsys.schedule import Placement, Schedule, Task, TaskKind, check
from jaxsys.strategies import Place, Strategy
from jaxsys.strategies.stages import check_stages, pipeline_schedule
from jaxsys.train import Trainer
from jaxsys.train.cli import parser


def last_first(devices: int, microbatches: int) -> Schedule:
    """GPipe whose backward passes begin with the last microbatch, as a stack gives them back."""
    p, m = devices, microbatches
    check_stages(p, m)
    tasks = []
    for stage in range(p):
        for index in range(m):
            back = (m + p - 1) + (p - 1 - stage) + (m - 1 - index)
            for tick, kind in ((stage + index, TaskKind.FORWARD), (back, TaskKind.BACKWARD)):
                tasks.append(
                    Task(tick=tick, device=stage, kind=kind, chunk=stage, microbatch=index)
                )
    return pipeline_schedule("last-first", devices=p, chunks=p, microbatches=m, tasks=tasks)


TOY = Strategy(
    name="last-first",
    build=last_first,
    placement=Placement.OWNER,
    place=Place(axis="stages", order="last-first"),
)


@pytest.fixture
def toy():
    strategies.register(TOY)
    yield TOY
    strategies.unregister(TOY.name)


def problem(devices: int = 4) -> Problem:
    config = dataclasses.replace(preset("tiny"), num_layers=4)
    return Problem(
        workload_of=lambda size: decoder_workload(
            "tiny", config, sequence_length=64, microbatch_size=size
        ),
        cluster=Cluster(device=device("h100"), devices=devices, link=link("nvlink")),
        batch=8,
        memory_bytes=1e12,
    )


def test_it_is_built_by_its_name_and_is_a_choice_of_commands(toy, capsys):
    check(strategies.build("last-first", devices=4, microbatches=8))
    assert "last-first" in "".join(parser("jaxsys train").format_help().split())
    assert main(["plan", "--model", "tiny", "--devices", "4", "--microbatches", "8"]) == 0
    assert " last-first " in capsys.readouterr().out
    with pytest.raises(UsageError, match="there is a strategy 'last-first' already"):
        strategies.register(dataclasses.replace(toy, build=strategies.find("gpipe").build))
    with pytest.raises(UsageError, match="'dp' is part of jaxsys"):
        strategies.unregister("dp")


def test_it_trains_as_others_do(toy):
    config = dataclasses.replace(preset("tiny"), num_layers=2)
    rng = np.random.default_rng(0)
    batch = {name: rng.integers(0, 64, (4, 1, 16)) for name in ("inputs", "targets")}
    trainer = Trainer(
        layered(config),
        initial_parameters(config, seed=0),
        optax.sgd(0.1),
        schedule="last-first",
        devices=2,
        microbatches=4,
    )
    plain = math.inf
    for _ in range(2):  # before and after an update, as the model without any schedule has it
        plain = trainer.evaluate([batch])
        np.testing.assert_allclose(float(trainer.step(batch).loss), plain, rtol=1e-5)
    assert trainer.evaluate([batch]) < plain


def test_it_is_compared_searched_for_and_recognised(toy):
    here = problem()
    rows = compare(here.workload(1), here.cluster, microbatches=8).rows
    by_name = {row.strategy: row for row in rows}
    assert by_name["last-first"].not_run is None
    # The same work in another order.
    assert by_name["last-first"].compute_s == pytest.approx(by_name["gpipe"].compute_s)
    space = Space.of(here, microbatch_sizes=[1]).order("last-first")
    plan = search(space, effort=Effort(refine=0)).best.plan
    assert (recognise(plan), why_not(plan)) == ("last-first", None)
    assert describe(plan).startswith(f"last-first over {plan.stages}")
    assert Plan.from_json(plan.to_json()) == plan
    schedule = to_schedule(here, plan)
    assert recognise_schedule(schedule) == "last-first"
    # What others make is called as before.
    assert recognise_schedule(strategies.build("gpipe", devices=4, microbatches=8)) == "gpipe"


def test_without_it_its_plans_are_refused():
    plan = Plan(stages=4, order="last-first", layers=PATHS[:1] * 4)
    with pytest.raises(UsageError, match="order=last-first .* does not run stages=4"):
        to_schedule(problem(), plan)
    with pytest.raises(UsageError, match="'order' is 'last-first', and must be one of"):
        Plan.from_json(plan.to_json())


def test_a_schedule_that_is_not_lowered_is_said_to_be_so_wherever_one_asks(toy):
    def slow(devices: int, microbatches: int) -> Schedule:
        schedule = strategies.build("1f1b-overlap", devices=devices, microbatches=microbatches)
        late = [dataclasses.replace(t, tick=2 * t.tick) for t in schedule.tasks]
        moves = tuple(
            dataclasses.replace(m, start=2 * m.start - 1, arrive=2 * m.arrive)
            for m in schedule.moves
        )
        return dataclasses.replace(schedule, name="slow", tasks=tuple(late), moves=moves)

    strategies.register(Strategy(name="slow", build=slow, placement=Placement.OWNER))
    try:
        here = problem()
        rows = compare(here.workload(1), here.cluster, microbatches=8).rows
        reason = next(row.not_run for row in rows if row.strategy == "slow")
        assert reason is not None and "in flight for more than one tick" in reason
        config = dataclasses.replace(preset("tiny"), num_layers=4)
        with pytest.raises(UsageError, match="in flight for more than one tick"):
            Trainer(
                layered(config), lambda: initial_parameters(config), optax.sgd(1.0),
                schedule="slow", devices=4,
            )  # fmt: skip
    finally:
        strategies.unregister("slow")


def test_entry_points_are_read_once_and_faults_are_said(monkeypatch):
    from jaxsys.strategies import registry

    class Point:
        name, value = "last-first", "elsewhere:TOY"

        def __init__(self, loaded):
            self.loaded = loaded

        def load(self):
            if isinstance(self.loaded, Exception):
                raise self.loaded
            return self.loaded

    for loaded, fault in ((TOY, None), (3, "is no Strategy"), (ImportError("gone"), "not load")):
        monkeypatch.setattr(registry, "entry_points", lambda group, one=loaded: [Point(one)])
        fresh = registry.Registry((strategies.find("dp"),))
        if fault is None:
            assert list(fresh) == ["dp", "last-first"]
        else:
            with pytest.raises(UsageError, match=fault):
                list(fresh)


def test_every_axis_of_a_plan_is_in_the_table():
    from jaxsys.axes import AXES

    sizes = {field.name for field in dataclasses.fields(Plan)}
    assert set(AXES) <= sizes
    twos: dict[str, Any] = {name: 2 for name in AXES}
    plan = Plan(layers=(), **twos)
    assert plan.devices == 2 ** len(AXES)
