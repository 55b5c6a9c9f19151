"""Joins the processes of a run: one process a host, or several, through `jax.distributed`.

JAX itself recognises Slurm, Open MPI, MPICH and Kubernetes; elsewhere the coordinator's address,
the number of processes and this one's place among them are given.
"""

import sys
from dataclasses import dataclass
from typing import Any

import jax

from jaxsys.errors import RunError, UsageError
from jaxsys.mesh import own_cpu_devices, request_devices
from jaxsys.train.meeting import meet


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosts:
    """How this process finds the others."""

    automatic: bool = False
    """Ask the cluster's environment, as JAX does."""
    coordinator: str | None = None
    """host:port of process 0."""
    processes: int | None = None
    process: int | None = None

    def __post_init__(self) -> None:
        given = [self.coordinator, self.processes, self.process]
        if any(value is not None for value in given) and None in given:
            raise UsageError(
                "--coordinator, --processes and --process go together; "
                "under Slurm, MPI or Kubernetes use --distributed alone"
            )
        if self.coordinator is not None and self.automatic:
            raise UsageError("--distributed finds the coordinator; leave out --coordinator")
        if self.processes is not None and not 0 <= (self.process or 0) < self.processes:
            raise UsageError(f"process={self.process} must be from 0 to {self.processes - 1}")

    @property
    def many(self) -> bool:
        """Whether there are others at all."""
        return self.automatic or self.coordinator is not None


def join(hosts: Hosts, *, devices: int | None, timeout_s: int = 300) -> None:
    """Connects to the other processes; must come before anything else JAX does.

    Args:
        hosts: where they are.
        devices: of the whole run; where there is no accelerator each process makes its share of
            virtual CPU devices.
        timeout_s: how long to wait for all of them.

    Raises:
        RunError: if they do not all come; where the coordinator is given, by number.
    """
    if not hosts.many:
        return
    if devices is not None and hosts.processes is not None:
        if devices % hosts.processes:
            raise UsageError(
                f"devices={devices} cannot be shared evenly by processes={hosts.processes}"
            )
        own_cpu_devices(devices // hosts.processes)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if hosts.coordinator is not None and hosts.processes is not None:
        meet(
            hosts.coordinator,
            processes=hosts.processes,
            process=hosts.process or 0,
            timeout_s=timeout_s,
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )
    try:
        jax.distributed.initialize(
            coordinator_address=hosts.coordinator,
            num_processes=hosts.processes,
            process_id=hosts.process,
            initialization_timeout=timeout_s,
            # `jaxsys.train.peers` is faster and says who; this is for what it cannot see.
            heartbeat_timeout_seconds=60,
            shutdown_timeout_seconds=30,
        )
    except (RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise RunError(f"the processes of the run could not be joined: {first}") from error


def choose_devices(count: int | None, hosts: Hosts, *, preferred: int = 4) -> list[Any]:
    """The devices to train on: `count`, or all accelerators, or `preferred` virtual CPU devices.

    Raises:
        UsageError: if there are fewer.
    """
    if hosts.many:
        everything = jax.devices()
        if count is not None and count != len(everything):
            raise UsageError(
                f"devices={count}, but the {jax.process_count()} processes have {len(everything)}"
            )
        return everything
    if count is not None:
        return request_devices(count)
    try:
        found = request_devices(preferred)
    except UsageError:
        return list(jax.devices())
    return found if found[0].platform == "cpu" else list(jax.devices())
