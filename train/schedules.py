"""What `schedule=` may be: a strategy's name, a Schedule, or a file that holds one or a plan."""

from pathlib import Path

from jaxsys.errors import UsageError, did_you_mean
from jaxsys.files import MIB, read_text
from jaxsys.schedule import Schedule
from jaxsys.strategies import STRATEGIES, for_layers
from jaxsys.train.plan_file import is_plan_file, read_plan


def resolve(
    schedule: str | Path | Schedule,
    *,
    devices: int,
    layers: int,
    microbatches: int | None = None,
) -> Schedule:
    """Makes or reads the schedule of one ring.

    Args:
        schedule: a name of `jaxsys.strategies.STRATEGIES`, a Schedule, or the path of a `.json`
            file: a plan from `jaxsys plan`, or what `Schedule.to_json` returned.
        devices: P, how many devices the ring has.
        layers: L, of the model.
        microbatches: M over the ring; 2 P unless the schedule says.

    Raises:
        UsageError: if there is no such name or file, or the schedule is for other sizes.
    """
    if isinstance(schedule, str) and schedule in STRATEGIES:
        return for_layers(
            schedule,
            devices=devices,
            microbatches=2 * devices if microbatches is None else microbatches,
            layers=layers,
        )
    if not isinstance(schedule, Schedule):
        if is_plan_file(schedule):
            schedule = read_plan(schedule, layers=layers).schedule
        else:
            schedule = _read(schedule)
    if schedule.devices != devices:
        raise UsageError(
            f"schedule {schedule.name} is for {schedule.devices} devices, the ring has {devices}; "
            f"use devices={schedule.devices}"
        )
    if microbatches not in (None, schedule.microbatches):
        raise UsageError(
            f"schedule {schedule.name} takes {schedule.microbatches} microbatches, "
            f"not microbatches={microbatches}; leave it out, or plan again"
        )
    return schedule


def _read(path: str | Path) -> Schedule:
    file = Path(path)
    if file.suffix != ".json":
        names = ", ".join(STRATEGIES)
        is_what = "is no .json file" if file.exists() else "is not known"
        is_what += did_you_mean(str(path), STRATEGIES)
        raise UsageError(
            f"schedule {str(path)!r} {is_what}; use {names}, or a file that `jaxsys plan` wrote"
        )
    text = read_text(file, what="plan", most_bytes=64 * MIB)
    try:
        return Schedule.from_json(text)
    except ValueError as error:
        raise UsageError(
            f"schedule {str(path)!r} is neither a plan nor a schedule that `jaxsys plan` wrote: "
            f"{error}"
        ) from None
