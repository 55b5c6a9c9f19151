"""The learning rates of `jaxsys train`, against their formula."""

import math

import numpy as np
import pytest

from jaxsys.train.recipe import Recipe

PEAK = 3e-3


def rates(steps: int, warm_up: int) -> list[float]:
    recipe = Recipe(
        model="tiny",
        steps=steps,
        batch_sequences=1,
        sequence_length=8,
        learning_rate=PEAK,
        warm_up_steps=warm_up,
    )
    rate = recipe.rates()
    return [float(np.asarray(rate(count))) for count in range(steps)]


@pytest.mark.parametrize(("steps", "warm_up"), [(40, 4), (10, 1), (2, 1)])
def test_the_first_step_trains_and_the_last_has_a_tenth(steps, warm_up):
    found = rates(steps, warm_up)
    for step, rate in enumerate(found, start=1):
        turn = math.pi * (step - warm_up) / (steps - warm_up)
        after = 0.1 + 0.9 * (1 + math.cos(turn)) / 2
        right = step / warm_up if step <= warm_up else after
        assert rate == pytest.approx(right * PEAK, rel=1e-5), step  # of float32
    assert found[0] == pytest.approx(PEAK / warm_up)
    assert found[-1] == pytest.approx(PEAK / 10)


def test_a_run_of_one_step_has_the_full_rate():
    assert rates(1, 1) == [pytest.approx(PEAK)]
