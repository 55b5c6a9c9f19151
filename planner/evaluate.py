"""Step time and memory of plans, whatever their kind: one evaluator of one problem.

Plans whose devices all do the same are estimated many at once (`sharded_plans`), those whose layers
rest on owners one by one (`owned_plans`).

Legend: B plans, L layers.
"""

from collections import deque
from dataclasses import replace

import numpy as np

from jaxsys.planner.estimates import Estimates
from jaxsys.planner.owned_plans import OwnedEvaluator
from jaxsys.planner.plans import Plan
from jaxsys.planner.problem import Problem
from jaxsys.planner.sharded_plans import ShardedEvaluator

TABLES = 16
"""Common parts whose tables of what is alive are kept, a MiB each for 80 layers."""


class Evaluator:
    """Evaluates plans of one problem; what plans share is prepared once."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.evaluated = 0
        """How many plans have been evaluated."""
        self._owned = OwnedEvaluator(problem)
        self._counted = 0.0
        self._sharded: dict[Plan, ShardedEvaluator] = {}
        self._recent: deque[ShardedEvaluator] = deque()

    @property
    def work(self) -> float:
        """What has been computed, in about microseconds of a quiet core; counted, not measured."""
        return self._owned.work + self._counted

    def evaluate(self, base: Plan, codes: np.ndarray) -> Estimates:
        """Estimates plans that share everything of `base` but their layers.

        Args:
            base: the plans' common part; its own layers are not looked at.
            codes: int [B, L], indices into `PATHS`.

        Raises:
            UsageError: if the plan does not fit batch or layers.
        """
        self.evaluated += len(codes)
        if base.owners > 1:
            return self._owned.evaluate(base, codes)
        sharded = self.sharded(base)
        before = sharded.work
        found = sharded.evaluate(codes)
        self._counted += sharded.work - before
        return found

    def sharded(self, base: Plan) -> ShardedEvaluator:
        """What evaluates the plans that share a common part without stages and ring."""
        key = replace(base, layers=())
        if key not in self._sharded:
            self._sharded[key] = ShardedEvaluator(self.problem, base)
        found = self._sharded[key]
        if found in self._recent:
            self._recent.remove(found)
        self._recent.append(found)
        if len(self._recent) > TABLES:
            self._recent.popleft().forget_table()
        return found

    def plan(self, plan: Plan) -> Estimates:
        """Estimates one plan, arrays [1]."""
        return self.evaluate(plan, np.array([plan.codes]))

    def least_staged_step_s(self, plan: Plan) -> float:
        """Seconds that a step of such a plan does not come below, found much faster."""
        return self._owned.least_step_s(plan)

    def staged_step_s(self, plan: Plan) -> float:
        """Seconds of a step of a plan whose layers rest on owners; its memory takes longer."""
        return self._owned.step_s(plan)
