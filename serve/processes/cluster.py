"""A server over a Ray cluster: Ray places, holds and ends its processes.

The front is an actor on the machine of the command, each instance an actor with as many GPUs as it
asks for, or none where the cluster has none. What they say to each other goes over connections of
their own (`wire`), pages too (`page_transfer`): the same as without Ray, and quicker than by calls
of actors. All machines must reach each other, and see the model under the same path.
"""

import concurrent.futures
import contextlib
import logging
import socket
from typing import Any

import ray  # pyright: ignore[reportMissingImports]
import ray.exceptions  # pyright: ignore[reportMissingImports]
from ray.util.scheduling_strategies import (  # pyright: ignore[reportMissingImports]
    NodeAffinitySchedulingStrategy,
)

from jaxsys.errors import RunError, UsageError
from jaxsys.serve.logs import log_to_stderr
from jaxsys.serve.processes.fleet import Launched
from jaxsys.serve.processes.front import Front, FrontSpec
from jaxsys.serve.processes.worker import Worker, WorkerSpec

NAMESPACE = "jaxsys"


class RayFront(Front):
    """The front as an actor."""

    def __init__(self, spec: FrontSpec):
        log_to_stderr(as_json=spec.worker.json_log)
        super().__init__(spec, RayLauncher(), reached_at=ray.util.get_node_ip_address())


class RayInstance:
    """An instance as an actor."""

    def serve(self, specification: str) -> None:
        """Serves until the front ends it."""
        spec = WorkerSpec.from_json(specification)
        log_to_stderr(as_json=spec.json_log)
        Worker(spec, ray.util.get_node_ip_address()).serve()


class RayLauncher:
    """Starts instances as actors, owned by whoever launches them."""

    def launch(self, spec: WorkerSpec) -> Launched:
        gpus = spec.deployment.tensor_parallel if ray.cluster_resources().get("GPU") else 0
        # Instances on CPUs share what cores there are.
        placed = ray.remote(RayInstance).options(num_cpus=0, num_gpus=gpus)
        return _Actor(placed.remote(), spec)


class _Actor:
    def __init__(self, actor: Any, spec: WorkerSpec):
        self.actor = actor
        self._end: concurrent.futures.Future[None] = actor.serve.remote(spec.to_json()).future()

    def death(self) -> str | None:
        if not self._end.done():
            return None
        error = self._end.exception()
        return "it ended" if error is None else f"it ended: {_reason(error)}"

    def kill(self) -> None:
        ray.kill(self.actor)


def connect(address: str) -> None:
    """Joins a cluster.

    Args:
        address: of its head; "auto" takes the one that runs here or, where none does, starts one.

    Raises:
        RunError: if none answers there.
    """
    if address != "auto":
        _check_answers(address)  # Ray itself would try for minutes
    settings: dict[str, Any] = {"namespace": NAMESPACE, "logging_level": logging.WARNING}
    try:
        ray.init(address=address, **settings)
    except ConnectionError:
        if address != "auto":
            raise
        # Only small values pass through Ray's own store.
        ray.init(
            address="local", include_dashboard=False, object_store_memory=100 << 20, **settings
        )


def _check_answers(address: str) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), 5).close()
    except ValueError:
        raise UsageError(f"--cluster {address!r} must be local, auto or host:port") from None
    except OSError as error:
        raise RunError(
            f"no Ray cluster answers at {address}: {error}; start one with `ray start --head`, or "
            f"use --cluster auto"
        ) from None


class ServerOnCluster:
    """A server that runs on the cluster joined, and ends with this object's process."""

    def __init__(self, spec: FrontSpec):
        """Starts front and instances and waits until they serve.

        Raises:
            UsageError: if the cluster has too few GPUs, or the front finds something wrong.
            RunError: if an instance does not come up.
        """
        deployment = spec.worker.deployment
        wanted = len(deployment.roles) * deployment.tensor_parallel
        present = int(ray.cluster_resources().get("GPU", 0))
        if 0 < present < wanted:
            raise UsageError(
                f"{len(deployment.roles)} instances of {deployment.tensor_parallel} GPU(s) need "
                f"{wanted}; the cluster has {present}: use fewer instances"
            )
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(RayFront).options(
            num_cpus=0,
            max_concurrency=1000,
            scheduling_strategy=here,
            name=f"front-{spec.port}" if spec.port else None,
        )
        try:
            self.front: Any = actor.remote(spec)
            self.host, self.port = ray.get(self.front.start.remote())
        except (UsageError, RunError) as error:  # Ray's are of these types too
            raise type(error)(_reason(error)) from None
        except ray.exceptions.RayError as error:
            raise RunError(f"the front did not start: {_reason(error)}") from None

    def scale(self, prefill: int, decode: int) -> None:
        """Brings the numbers of instances to these while serving."""
        ray.get(self.front.scale.remote(prefill, decode))

    def describe(self) -> list[dict[str, Any]]:
        """As `Front.describe`."""
        return ray.get(self.front.describe.remote())

    def failure(self) -> str | None:
        """As `Front.failure`; also where the front itself is gone."""
        try:
            return ray.get(self.front.failure.remote())
        except ray.exceptions.RayError as error:
            return f"the front is gone: {_reason(error)}"

    def stop(self, drain_s: float) -> None:
        """Finishes open requests for `drain_s` seconds and ends everything."""
        with contextlib.suppress(ray.exceptions.RayError):  # it may be gone
            ray.get(self.front.stop.remote(drain_s))
        ray.kill(self.front)


def _reason(error: BaseException) -> str:
    """What went wrong, without Ray's account of where."""
    cause = getattr(error, "cause", None)
    return str(cause) if isinstance(cause, Exception) else str(error).strip().splitlines()[-1]
