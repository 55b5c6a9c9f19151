"""What the host takes to dispatch: noted, kept in profiles, drawn again."""

import dataclasses
import json
import random
import types
from typing import Any

import numpy as np
import pytest

from jaxsys.errors import UsageError
from jaxsys.serve.energy.dispatch_times import KINDS, POINTS, DispatchTimes, kind_of_step
from jaxsys.serve.energy.gpu_model import simulated_gpu
from jaxsys.serve.energy.profile import load_profile, simulated_profile

TIMES = DispatchTimes(alike=(0.001, 0.002), changed=(0.004,), piece=(0.003,))


def iteration(decodes: str = "", pieces: int = 0) -> Any:
    return types.SimpleNamespace(decodes=tuple(decodes), prefills=(None,) * pieces)


def test_draws_have_the_distribution_that_was_noted():
    noted = np.random.default_rng(3).lognormal(-6.0, 0.4, 2000)
    times = DispatchTimes.of({kind: noted.tolist() for kind in KINDS})
    assert times is not None and len(times.alike) == POINTS
    source = random.Random(1)
    drawn = [times.draw("alike", source) for _ in range(4000)]
    for percent in (10, 50, 90, 99):
        assert np.percentile(drawn, percent) == pytest.approx(
            np.percentile(noted, percent), rel=0.05
        )
    assert min(noted) <= min(drawn) and max(drawn) <= max(noted)
    again = random.Random(1)
    assert [times.draw("alike", again) for _ in range(9)] == drawn[:9]


def test_a_kind_that_never_came_makes_none():
    assert DispatchTimes.of({"alike": [0.1], "changed": [0.1], "piece": []}) is None
    assert DispatchTimes.of({}) is None


def test_a_step_is_alike_only_behind_one_of_the_same_requests():
    assert kind_of_step(iteration("ab"), iteration("ab")) == "alike"
    for now, before in (
        (iteration("ab"), None),
        (iteration("ab"), iteration("abc")),
        (iteration("ab"), iteration("ac")),
        (iteration("ab"), iteration("ab", pieces=1)),
        (iteration("ab", pieces=1), iteration("ab")),
    ):
        assert kind_of_step(now, before) == "changed"


def test_an_iteration_takes_its_pieces_and_its_step():
    source = random.Random(0)
    before = iteration("ab")
    assert TIMES.iteration_s(iteration("", pieces=2), before, source) == pytest.approx(0.006)
    assert TIMES.iteration_s(iteration("ab", pieces=1), before, source) == pytest.approx(0.007)
    assert 0.001 <= TIMES.iteration_s(iteration("ab"), before, source) <= 0.002


def test_profiles_keep_them_and_refuse_what_is_none(tmp_path):
    profile = simulated_profile(simulated_gpu("h100", "llama-3-8b"), clocks_mhz=[1980])
    path = tmp_path / "p.json"
    profile.save(path)
    assert load_profile(path).dispatch is None
    dataclasses.replace(profile, samples=profile.samples[:3], dispatch=TIMES).save(path)
    assert load_profile(path).dispatch == TIMES
    record = json.loads(path.read_text())
    for wrong in ([], [-0.1], [0.2, 0.1], ["a"], None):
        record["dispatch_s"]["alike"] = wrong
        path.write_text(json.dumps(record))
        with pytest.raises(UsageError, match=r"dispatch_s\.alike"):
            load_profile(path)
    with pytest.raises(UsageError, match="changed"):
        dataclasses.replace(TIMES, changed=(0.2, 0.1))
