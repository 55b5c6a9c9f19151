"""The plan language that training, planning and pictures share."""

from .check import check, peak_live
from .inside import Inside, Transfer, attention_transfers, why_not_divided
from .schedule import (
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
)
from .simulate import Costs, Event, Link, Simulation, alive_bytes, simulate
from .trace import Copy, Trace, gradient_block, task_inputs, task_outputs, trace

__all__ = [
    "ALL",
    "Block",
    "Copy",
    "Costs",
    "Data",
    "Event",
    "Inside",
    "Link",
    "Move",
    "MoveKind",
    "Placement",
    "Schedule",
    "ScheduleError",
    "Simulation",
    "Task",
    "TaskKind",
    "Trace",
    "Transfer",
    "alive_bytes",
    "attention_transfers",
    "check",
    "gradient_block",
    "peak_live",
    "simulate",
    "task_inputs",
    "task_outputs",
    "trace",
    "why_not_divided",
]
