"""A server's instances as processes: launched, watched, replaced, more of them or fewer.

A `Launcher` starts processes, on this machine (`LocalProcesses`) or wherever Ray finds room
(`cluster`); each connects to the front's switchboard by itself. An instance that is lost is
replaced under a new name, unless instances die faster than they come up.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import os
import secrets
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from jaxsys.errors import RunError, UsageError
from jaxsys.serve.deployment import instance_name
from jaxsys.serve.engine import Engine
from jaxsys.serve.iterations import Role
from jaxsys.serve.member import Member
from jaxsys.serve.processes.gpus import visible_gpus
from jaxsys.serve.processes.remote import RemoteInstance, Switchboard
from jaxsys.serve.processes.worker import WorkerSpec

logger = logging.getLogger(__name__)

LAUNCH_S = 900.0
"""How long an instance may take to load its model, compile and connect."""
MAX_LOSSES = 5
"""Lost instances in a row, none of which served for `LAUNCH_S`, after which none is replaced."""


class Launched(Protocol):
    """A process that was started."""

    def death(self) -> str | None:
        """How it died; None while it lives."""
        ...

    def kill(self) -> None:
        """Ends it at once, if it has not ended."""
        ...


class Launcher(Protocol):
    """Starts processes."""

    def launch(self, spec: WorkerSpec) -> Launched:
        """Starts a process that runs `Worker(spec)`."""
        ...


class LocalProcesses:
    """Processes of this machine, each with GPUs of its own where there are any."""

    def __init__(self, gpus: Sequence[str] | None = None):
        """
        Args:
            gpus: what processes may be given; all that are visible if None.
        """
        self.gpus = visible_gpus() if gpus is None else list(gpus)
        self._processes: list[_LocalProcess] = []

    def launch(self, spec: WorkerSpec) -> "_LocalProcess":
        """Starts a process.

        Raises:
            UsageError: if too few GPUs are free.
        """
        self._processes = [one for one in self._processes if one.death() is None]
        process = _LocalProcess(spec, self._free(spec.deployment.tensor_parallel))
        self._processes.append(process)
        return process

    def _free(self, count: int) -> list[str]:
        if not self.gpus:
            return []
        taken = {gpu for process in self._processes for gpu in process.gpus}
        free = [gpu for gpu in self.gpus if gpu not in taken]
        if len(free) < count:
            raise UsageError(
                f"an instance needs {count} GPU(s) of its own; of {len(self.gpus)}, {len(free)} "
                f"are free: use fewer instances, or leave --cluster out to share GPUs"
            )
        return free[:count]


class _LocalProcess:
    def __init__(self, spec: WorkerSpec, gpus: list[str]):
        self.gpus = gpus
        command = [sys.executable, "-m", "jaxsys.serve.processes.worker"]
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})
        # In a session of its own: an interrupt from the terminal is the front's to deal with.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, text=True, start_new_session=True, env=environment
        )
        assert self.process.stdin is not None
        with self.process.stdin as pipe, contextlib.suppress(BrokenPipeError):
            pipe.write(spec.to_json() + "\n")

    def death(self) -> str | None:
        status = self.process.poll()
        return None if status is None else f"its process ended with status {status}"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@dataclasses.dataclass(slots=True)
class _Place:
    """An instance from its launch on."""

    role: Role
    launched: Launched
    up: asyncio.Future[RemoteInstance]
    going: bool = False
    """Whether its end is wanted."""


class Fleet:
    """All instances of one engine; everything runs on the event loop's thread."""

    def __init__(
        self,
        engine: Engine,
        launcher: Launcher,
        template: WorkerSpec,
        *,
        host: str,
    ):
        """
        Args:
            template: what instances have in common; name, role, address and token are filled in.
            host: where instances reach this process.
        """
        self.engine = engine
        self.launcher = launcher
        self.host = host
        self.template = dataclasses.replace(template, token=secrets.token_hex(16))
        self.places: dict[str, _Place] = {}
        self.board = Switchboard(
            engine, self.template.token, on_up=self._came_up, on_down=self._went_down
        )
        self.on_up: Callable[[str], None] = lambda _: None
        """Told the name of each instance that has come up."""
        self._numbers: dict[Role, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._losses: deque[float] = deque(maxlen=MAX_LOSSES)

    async def start(self, *, prefill: int, decode: int) -> None:
        """Launches instances and waits until all are up; the engine must have been started.

        Raises:
            RunError: if one of them dies or takes too long.
        """
        port = await self.board.open(self.host)
        self.template = dataclasses.replace(self.template, front_host=self.host, front_port=port)
        first: Role = "prefill" if decode else "both"
        roles: list[Role] = [*(first for _ in range(prefill)), *("decode" for _ in range(decode))]
        try:
            await self._launch_all(roles)
        except BaseException:
            await self.close()
            raise
        self.engine.healing = True

    async def scale(self, *, prefill: int, decode: int, timeout_s: float = 300.0) -> None:
        """Brings the numbers of instances to these while serving.

        Those that go get no more requests and finish what they have, for `timeout_s` at most.
        """
        apart = self.engine.apart
        if prefill < 1 or decode < 0 or (decode > 0) != apart:
            rule = "at least 1 each" if apart else "prefill at least 1 and decode 0, as started"
            raise UsageError(f"prefill={prefill}, decode={decode} must be {rule}")
        wanted: list[tuple[Role, int]] = [("prefill" if apart else "both", prefill)]
        if apart:
            wanted.append(("decode", decode))
        coming: list[Role] = []
        going: list[str] = []
        for role, count in wanted:
            names = [
                n for n, place in self.places.items() if place.role == role and not place.going
            ]
            coming.extend(itertools.repeat(role, count - len(names)))
            going += names[count:]
        await asyncio.gather(
            self._launch_all(coming), *[self._retire(name, timeout_s) for name in going]
        )

    async def close(self) -> None:
        """Ends every process; requests still there are lost."""
        self.engine.healing = False
        for place in self.places.values():
            place.going = True
        for task in list(self._tasks):
            task.cancel()
        await self.board.close()
        deadline = asyncio.get_running_loop().time() + 5
        living = list(self.places.values())
        while living and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
            living = [place for place in living if place.launched.death() is None]
        for place in living:
            place.launched.kill()

    # --- inside -------------------------------------------------------------------------------

    async def _launch_all(self, roles: Sequence[Role]) -> None:
        await asyncio.gather(*[self._launch(role) for role in roles])

    async def _launch(self, role: Role) -> None:
        """Launches an instance and waits until it serves."""
        number = self._numbers[role] = self._numbers.get(role, -1) + 1
        name = instance_name(role, number)
        loop = asyncio.get_running_loop()
        spec = dataclasses.replace(self.template, name=name, role=role)
        place = _Place(role, self.launcher.launch(spec), loop.create_future())
        self.places[name] = place
        logger.info("launched", extra={"instance": name})
        deadline_s = loop.time() + LAUNCH_S
        while not place.up.done():
            await asyncio.wait([place.up], timeout=0.1)
            death = place.launched.death()
            if not place.up.done() and (death is not None or loop.time() > deadline_s):
                del self.places[name]
                place.launched.kill()
                reason = death or f"it was not up after {LAUNCH_S:g} s"
                raise RunError(f"instance {name} did not come up: {reason}")

    async def _retire(self, name: str, timeout_s: float) -> None:
        place = self.places[name]
        place.going = True
        if place.up.done():
            await self.engine.retire(place.up.result(), timeout_s)
        place.launched.kill()
        self.places.pop(name, None)
        logger.info("retired", extra={"instance": name})

    def _came_up(self, instance: RemoteInstance) -> None:
        place = self.places.get(instance.name)
        if place is None or place.up.done():
            instance.lost("no such instance is expected")
            return
        place.up.set_result(instance)
        self.engine.add(instance, decodes=place.role == "decode")
        logger.info("up", extra={"instance": instance.name})
        self.on_up(instance.name)

    def _went_down(self, instance: RemoteInstance) -> None:
        place = self.places.get(instance.name)
        if place is None or place.going or self.engine.draining:
            return
        del self.places[instance.name]
        place.launched.kill()
        logger.error(
            "lost an instance", extra={"instance": instance.name, "reason": instance.failure}
        )
        task = asyncio.create_task(self._replace(place.role, instance))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _replace(self, role: Role, lost: Member) -> None:
        """Launches instances until one comes up in place of a lost one, which shows until then."""
        loop = asyncio.get_running_loop()
        while True:
            self._losses.append(loop.time())
            if len(self._losses) == MAX_LOSSES and loop.time() - self._losses[0] < LAUNCH_S:
                reason = f"{MAX_LOSSES} instances were lost within {LAUNCH_S:g} s"
                logger.error("no longer replacing", extra={"reason": reason})
                self.engine.stop_healing(f"{reason}; they are no longer replaced")
                return
            try:
                await self._launch(role)
            except RunError as error:
                logger.error("no replacement", extra={"reason": str(error)})
                await asyncio.sleep(1.0)
                continue
            self.engine.remove(lost)
            logger.info("replaced a lost instance", extra={"instance": lost.name})
            return
