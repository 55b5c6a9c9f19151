"""Pipelines whose stages run some forward passes, then a backward and a forward pass in turn.

How many first, whether the backward pass is split and how far its second half W is put off are
choices; the known pipelines are some of them:

    order              forwards first, stage i of P, v chunks        W behind its I
    earliest-backward  P - i; with v > 1 2 (P - 1 - i) + (v - 1) P + 1   delay x i
    eager-forward      2 (P - i) - 1                                     delay x i
    all-forward        all                                               at once
"""

from jaxsys.errors import UsageError
from jaxsys.schedule import Schedule, TaskKind

from .choices import Backward, Choices, Order
from .stages import earliest_ticks, pipeline_schedule
from .strategy import Signs

ORDERS = (Order.EARLIEST_BACKWARD, Order.EAGER_FORWARD, Order.ALL_FORWARD)


class InTurn:
    """All of them, and what those are called that have no strategy of their own."""

    def covers(self, choices: Choices) -> bool:
        """Whether stages can run in this order."""
        if choices.axis != "stages" or choices.order not in ORDERS:
            return False
        if choices.chunks > 1 and choices.order is not Order.EARLIEST_BACKWARD:
            return False
        if choices.order is Order.ALL_FORWARD or choices.backward is Backward.WHOLE:
            return choices.delay == 0
        return True

    def called(self, choices: Choices) -> str:
        """By whether the backward pass is split, how early it runs, and the chunks of a stage."""
        if choices.backward is Backward.SPLIT:
            return "zero-bubble" if choices.chunks == 1 else "zero-bubble-interleaved"
        return "1f1b-eager" if choices.chunks == 1 else "1f1b-interleaved"

    def recognised(self, signs: Signs) -> str | None:
        """Likewise, of what no strategy knows for its own."""
        if not signs.staged:
            return None
        interleaved = signs.schedule.chunks > signs.schedule.devices
        if signs.split:
            return "zero-bubble-interleaved" if interleaved else "zero-bubble"
        return "1f1b-interleaved" if interleaved else "1f1b-eager"

    def schedule(self, choices: Choices, microbatches: int) -> Schedule:
        """Every stage's tasks, in the earliest ticks.

        Raises:
            UsageError: if several chunks a stage do not divide the microbatches.
        """
        p, v, m = choices.devices, choices.chunks, microbatches
        if v > 1 and m % p:
            raise UsageError(f"chunks={v} need microbatches={m} to be a multiple of stages={p}")
        split = choices.backward is Backward.SPLIT
        kind = TaskKind.INPUT_GRADIENT if split else TaskKind.BACKWARD
        orders = []
        for stage in range(p):
            # Microbatches pass a stage's chunks in groups of P (of all M, with one chunk).
            turns = [(turn // p % v, turn // (v * p) * p + turn % p) for turn in range(v * m)]
            down = [(TaskKind.FORWARD, chunk * p + stage, at) for chunk, at in turns[: v * m]]
            up = [((v - 1 - chunk) * p + stage, at) for chunk, at in turns]
            first, lag = _forwards_first(choices, stage, v * m), choices.delay * stage
            # With few microbatches a long lag would leave W for when nothing is left to fill.
            lag = min(lag, stage + max(0, m - p))
            order = down[:first]
            for turn, (chunk, at) in enumerate(up):
                order.append((kind, chunk, at))
                if split and turn >= lag:
                    order.append((TaskKind.WEIGHT_GRADIENT, *up[turn - lag]))
                order += down[first + turn : first + turn + 1]
            if split:
                order += [(TaskKind.WEIGHT_GRADIENT, *task) for task in up[max(0, v * m - lag) :]]
            orders.append(order)
        return pipeline_schedule(
            f"{choices.order}-{choices.backward}-{choices.delay}-{v}",
            devices=p,
            chunks=v * p,
            microbatches=m,
            tasks=earliest_ticks(orders, chunks=v * p),
        )


def _forwards_first(choices: Choices, stage: int, everything: int) -> int:
    p, v = choices.devices, choices.chunks
    if choices.order is Order.ALL_FORWARD:
        return everything
    if choices.order is Order.EAGER_FORWARD:
        return min(everything, 2 * (p - stage) - 1)
    return min(everything, p - stage if v == 1 else 2 * (p - 1 - stage) + (v - 1) * p + 1)
