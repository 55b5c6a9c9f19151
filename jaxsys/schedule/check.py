"""Proves a schedule before anything is compiled.

Every task once, every input present where and when it is used, every gradient contribution counted
once (see `trace`), and live copies within a bound.
"""

from collections import Counter
from collections.abc import Mapping

from .schedule import Data, Schedule, ScheduleError, TaskKind
from .trace import Trace, trace


def check(schedule: Schedule, *, max_live: Mapping[Data, int] | None = None) -> Trace:
    """Checks a schedule and returns its trace.

    Args:
        schedule: the schedule.
        max_live: the most copies of a kind of data that any device may hold at once.

    Raises:
        ScheduleError: names the first task, move or bound at fault.
    """
    _check_tasks(schedule)
    _check_moves(schedule)
    result = trace(schedule)
    for data, bound in (max_live or {}).items():
        for device, count in enumerate(peak_live(schedule, result, data)):
            if count > bound:
                raise ScheduleError(
                    f"{schedule.name}: device {device} holds {count} {data} copies; bound {bound}"
                )
    return result


def peak_live(schedule: Schedule, result: Trace, *data: Data) -> list[int]:
    """The most copies of some kinds of data, counted together, that each device holds at once."""
    peaks = []
    for device in range(schedule.devices):
        change: Counter[int] = Counter()
        for copy in result.on_device(device):
            if copy.block.data in data:
                change[copy.born] += 1
                change[copy.last_use + 1] -= 1
        live = peak = 0
        for tick in sorted(change):
            live += change[tick]
            peak = max(peak, live)
        peaks.append(peak)
    return peaks


def _check_tasks(schedule: Schedule) -> None:
    seen: set[tuple[TaskKind, int, int]] = set()
    busy: set[tuple[int, int, TaskKind]] = set()
    for task in schedule.tasks:
        in_range = (
            0 <= task.device < schedule.devices
            and 0 <= task.chunk < schedule.chunks
            and 0 <= task.microbatch < schedule.microbatches
            and task.tick >= 0
        )
        if not in_range:
            raise ScheduleError(
                f"{task} is outside {schedule.devices} devices, {schedule.chunks} chunks, "
                f"{schedule.microbatches} microbatches"
            )
        name = (task.kind, task.chunk, task.microbatch)
        if name in seen:
            raise ScheduleError(f"{task} is done twice")
        seen.add(name)
        slot = (task.tick, task.device, task.kind)
        if slot in busy:
            raise ScheduleError(f"{task}: the device already runs a {task.kind} in this tick")
        busy.add(slot)
    for chunk in range(schedule.chunks):
        for m in range(schedule.microbatches):
            if (TaskKind.FORWARD, chunk, m) not in seen:
                raise ScheduleError(f"F(chunk={chunk}, microbatch={m}) is never done")
            whole = (TaskKind.BACKWARD, chunk, m) in seen
            halves = [
                (kind, chunk, m) in seen
                for kind in (TaskKind.INPUT_GRADIENT, TaskKind.WEIGHT_GRADIENT)
            ]
            if whole and any(halves) or not whole and not all(halves):
                raise ScheduleError(
                    f"chunk={chunk}, microbatch={m} needs either B, or both I and W"
                )


def _check_moves(schedule: Schedule) -> None:
    for move in schedule.moves:
        group = move.source == -1
        devices_ok = (group and move.target == -1) or (
            0 <= move.source < schedule.devices and 0 <= move.target < schedule.devices
        )
        # The input of chunk C, the head's, is one past the last chunk.
        last = schedule.chunks if move.block.data is Data.ACTIVATION else schedule.chunks - 1
        if not devices_ok or not 0 <= move.block.chunk <= last or move.start < 0:
            raise ScheduleError(f"{move} is outside the schedule")
