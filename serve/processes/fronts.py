"""Several fronts behind one port, each a process (`front_process`), and what looks after them.

    clients  ->  one listening socket, inherited by every front  ->  whichever front is free
    front    <-> every instance, over a line of its own: requests, tokens, hand-over
    front    <-> this process: which instances and adapters there are; what was counted

No request and no token passes this process: it launches instances (`Fleet`) and fronts, loads and
unloads adapters, replaces whoever is lost, adds up what fronts have counted, and ends them. What
fronts decide by, they count in memory that all of them map (`shared`). A front that is killed takes
its open requests with it, whose pages instances free; another is started in its place. When this
process is gone, all of it ends.
"""

import asyncio
import contextlib
import dataclasses
import logging
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jaxsys.errors import RunError, UsageError
from jaxsys.serve.adapters import Adapters
from jaxsys.serve.clock import WallClock
from jaxsys.serve.energy.governors import Served, make_router
from jaxsys.serve.energy.slo import SharedSlo
from jaxsys.serve.engine import Engine
from jaxsys.serve.http.dashboard import Dashboard
from jaxsys.serve.http.listening import BACKLOG
from jaxsys.serve.http.metrics import Metrics, Totals
from jaxsys.serve.http.starting import StartProgress
from jaxsys.serve.member import Member
from jaxsys.serve.processes.channel import Channel
from jaxsys.serve.processes.fleet import Fleet, Launcher
from jaxsys.serve.processes.front import FrontSpec, bind, load_adapters, name_of, read_face
from jaxsys.serve.processes.front_process import Seat
from jaxsys.serve.processes.remote import RemoteInstance
from jaxsys.serve.processes.shared import Shared, SharedCrowd

logger = logging.getLogger(__name__)

ROUTES = frozenset(
    {"fewest", "round-robin", "random", "queue", "gather", "prefix", "ecoroute", "energy"}
)
"""Routers that decide by what all fronts count."""
UP_S = 120.0
"""How long a front may take to start."""
SILENCE_S = 30.0
"""A front of which nothing was heard for so long is killed: it reports every second."""
REPORT_S = 2.0
"""How long fronts are waited for when somebody asks what they have counted."""
MAX_LOSSES = 5
"""Fronts lost in a row, none of which served for `UP_S`, after which none is replaced."""
LOOK_S = 0.1
END_S = 10.0
"""How long a front may take to end beyond the time for its requests."""


class _Front:
    """A front's place, which stays when its process is another."""

    def __init__(self, number: int, board: socket.socket):
        self.number = number
        self.board = board
        """Where instances connect to it."""
        self.process: subprocess.Popen[bytes] | None = None
        self.channel: Channel | None = None
        self.heard_s = 0.0
        self.up = asyncio.Event()
        """It answers, if only that it is too early."""
        self.serves = asyncio.Event()
        self.told: list[tuple[int, frozenset[str]]] = []
        """Versions of the state that it has or will have, and the adapters that are in them: the
        first is the one that it has last said to have."""
        self.totals: Totals = {}
        self.adapters: Mapping[str, Sequence[int]] = {}

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None


class _Everything(Engine):
    """Instances and adapters, as the process that looks after the fronts knows them; it has no
    requests of its own."""

    fronts: "Fronts"

    def by_adapter(self) -> dict[str, tuple[int, int]]:
        found: dict[str, tuple[int, int]] = {}
        for front in self.fronts.fronts:
            for name, (fresh, begun) in front.adapters.items():
                before = found.get(name, (0, 0))
                found[name] = before[0] + fresh, before[1] + begun
        return found

    def uses(self, key: str) -> int:
        """Requests with an adapter, counting a front that may still take some as one."""
        told = any(key in keys for front in self.fronts.fronts for _, keys in front.told)
        return max(int(told), self.fronts.crowd.uses(key))

    def remove(self, instance: Member) -> None:
        super().remove(instance)
        self.fronts.publish()

    def lose(self, instance: Member, message: str) -> None:
        super().lose(instance, message)
        self.fronts.publish()

    async def retire(self, instance: Member, timeout_s: float) -> bool:
        instance.retiring = True
        await self.fronts.published()
        return await super().retire(instance, timeout_s)

    def stop_healing(self, message: str) -> None:
        super().stop_healing(message)
        self.fronts.publish(hopeless=message)

    def _place_waiting(self) -> None:
        self.fronts.introduce()


class _OfFronts(Collector):
    """How many there are, beside what they have counted."""

    def __init__(self, fronts: "Fronts"):
        self._fronts = fronts

    def collect(self) -> Iterable[Metric]:
        serving = sum(one.alive and one.serves.is_set() for one in self._fronts.fronts)
        lost = self._fronts.losses
        yield GaugeMetricFamily("jaxsys_fronts", "Fronts that serve.", serving)
        yield CounterMetricFamily("jaxsys_front_losses", "Fronts that were lost.", lost)


class Fronts:
    """Starts, serves, scales and stops, as `Front` does."""

    def __init__(
        self, spec: FrontSpec, launcher: Launcher, *, count: int, drain_s: float, reached_at: str
    ):
        """
        Args:
            count: fronts.
            drain_s: how long a front finishes requests that alone is told to end.
            reached_at: this machine's address, as instances reach it.

        Raises:
            UsageError: for a router that would know one front's requests only.
        """
        for option, route in (("--route", spec.route), ("--route-prompts", spec.route_prompts)):
            if route not in ROUTES:
                raise UsageError(
                    f"--fronts {count} with {option} {route}: what that router remembers is one "
                    f"front's own; use one of {', '.join(sorted(ROUTES))}, or --fronts 1"
                )
        worker = spec.worker
        deployment = worker.deployment
        config, _ = read_face(Path(worker.model))
        slo = SharedSlo(worker.slo)
        served = Served(
            model=config,
            weights=deployment.weights_named(worker.dtype or "bfloat16"),
            tensor_parallel=deployment.tensor_parallel,
        )
        # What is wrong with them is said before anything starts.
        make_router(spec.route_prompts, worker.governor.gpu, served, slo, option="--route-prompts")
        make_router(spec.route, worker.governor.gpu, served, slo)
        places = max(64, 4 * len(deployment.roles))
        self.shared = Shared.create(fronts=count, instances=places, adapters=deployment.max_loras)
        self.crowd = SharedCrowd(self.shared, 0)
        self.engine = engine = _Everything(clock=WallClock(), max_requests=deployment.max_requests)
        engine.fronts = self
        engine.crowd = self.crowd
        self._adapters = Adapters(engine, deployment.max_loras)
        engine.adapters = self._adapters
        self.fleet = Fleet(engine, launcher, worker, host=reached_at)
        self.fleet.on_up = self._came_up
        self.spec = dataclasses.replace(spec, worker=self.fleet.template)
        self._gone: Totals = {}
        """Counts of fronts that are no more."""
        self.metrics = Metrics(engine, spec.model_name, self._counted)
        self.metrics.watch()
        self.metrics.registry.register(_OfFronts(self))
        self.dashboard = Dashboard(
            engine, slo, model_name=spec.model_name, refused=self.metrics.count_refused
        )
        engine.on_watch = self.dashboard.tick
        self.progress = StartProgress()
        self.drain_s = drain_s
        self.fronts: list[_Front] = []
        self._count = count
        self._host = reached_at
        self._places: dict[str, int] = {}
        self._introduced: set[str] = set()
        self._version = 0
        self._serving = False
        self._hopeless: str | None = None
        self._failure: str | None = None
        self._ending = False
        self._losses: list[float] = []
        self.losses = 0
        """Fronts that were lost since the start."""
        self._applied = asyncio.Condition()
        self._listener: socket.socket | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Future[Any]] = set()
        self._turns = Path(tempfile.mkdtemp(prefix="jaxsys-turns-"))

    # --- as a server --------------------------------------------------------------------------

    async def listen(self) -> tuple[str, int]:
        """Listens and starts the fronts, which say how far the rest is; returns host and port.

        Raises:
            UsageError: if the address cannot be listened on.
            RunError: if a front does not come up.
        """
        try:
            self._listener = listener = bind(self.spec.host, self.spec.port)
            listener.listen(BACKLOG)
            for number in range(self._count):
                self.fronts.append(_Front(number, socket.create_server((self._host, 0))))
            for front in self.fronts:
                await self._launch(front)
        except BaseException:
            await self._end(0.0)
            raise
        self._watcher = asyncio.create_task(self._watched())
        return name_of(listener)

    async def start(self) -> tuple[str, int]:
        """Brings the instances up, then serves; returns host and port.

        Raises:
            UsageError, RunError: as `Front.start`, or if a front does not come up.
        """
        if self._listener is None:
            await self.listen()
        assert self._listener is not None
        deployment = self.spec.worker.deployment
        self.progress.enter("instances that are up", len(deployment.roles))
        try:
            await self.engine.start()
            await asyncio.gather(*[self._until(front, front.up) for front in self.fronts])
            await self.fleet.start(prefill=deployment.prefill, decode=deployment.decode)
            await load_adapters(self.engine, self.spec)
            self._serving = True
            self.publish()
            await asyncio.gather(*[self._until(front, front.serves) for front in self.fronts])
        except BaseException:
            await self._end(0.0)
            raise
        return name_of(self._listener)

    async def scale(self, prefill: int, decode: int) -> None:
        """Brings the numbers of instances to these while serving."""
        await self.fleet.scale(prefill=prefill, decode=decode)

    async def until_failure(self) -> str:
        """Waits until nothing can be served any more, and says why."""
        while self.failure is None:
            await asyncio.sleep(LOOK_S)
        return self.failure or ""

    @property
    def failure(self) -> str | None:
        """Why nothing can be served any more; None while something can."""
        return self._failure or self.engine.failure

    async def stop(self, drain_s: float) -> None:
        """Has fronts finish open requests for `drain_s` seconds, then ends all processes."""
        await self._end(drain_s)

    # --- what fronts are told -----------------------------------------------------------------

    def publish(self, *, hopeless: str | None = None) -> int:
        """Tells all fronts how things stand; returns the number of this state."""
        self._hopeless = hopeless or self._hopeless
        self._version += 1
        self.crowd.place(self._adapters.places)
        for front in self.fronts:
            self._tell(front)
        return self._version

    async def published(self) -> None:
        """The same, and waits until all of them have taken it in, or are gone."""
        version = self.publish()

        def applied() -> bool:
            return all(
                not front.alive or front.channel is None or front.told[0][0] >= version
                for front in self.fronts
            )

        async with self._applied:
            while not applied():
                with contextlib.suppress(TimeoutError):  # one may end without a word
                    await asyncio.wait_for(self._applied.wait(), LOOK_S)

    def _tell(self, front: _Front) -> None:
        if front.channel is None:
            return
        engine = self.engine
        adapters = list(self._adapters)
        front.told.append((self._version, frozenset(one.key for one in adapters)))
        front.channel.tell(
            "state",
            {
                "version": self._version,
                "serving": self._serving,
                "progress": self.progress.body(),
                "instances": [
                    one.name
                    for one in engine.instances
                    if one.name in self._introduced and one.failure is None
                ],
                "failed": [one.name for one in engine.instances if one.failure is not None],
                "retiring": [one.name for one in engine.instances if one.retiring],
                "hopeless": self._hopeless,
                "adapters": [[one.name, one.key, one.folder, one.created_s] for one in adapters],
                "places": self._adapters.places,
            },
        )

    def introduce(self) -> None:
        """Sends instances that are ready to the fronts, once each."""
        engine = self.engine
        names = {one.name for one in engine.instances}
        self._places = {name: place for name, place in self._places.items() if name in names}
        self._introduced &= names
        addresses = [list(front.board.getsockname()[:2]) for front in self.fronts]
        for one in engine.instances:
            if one.name in self._introduced or not one.open:
                continue
            assert isinstance(one, RemoteInstance)
            free = set(range(self.shared.instances)) - set(self._places.values())
            if not free:
                one.lost(f"there are {self.shared.instances} instances, as many as fronts count")
                continue
            place = self._places[one.name] = min(free)
            one.tally = self.shared.instance(place, 0)
            self._introduced.add(one.name)
            one.send(["fronts", place, addresses])
        self.publish()

    def _came_up(self, _: str) -> None:
        self.progress.advance()
        self.publish()

    # --- what fronts say and ask --------------------------------------------------------------

    def _told(self, front: _Front, kind: str, values: list[Any]) -> None:
        front.heard_s = asyncio.get_running_loop().time()
        if kind == "ready":
            front.up.set()
        elif kind == "serves":
            front.serves.set()
        elif kind == "applied":
            front.told = [one for one in front.told if one[0] >= values[0]]
            self._run(self._notify())
        elif kind == "counted":
            self._take_in(front, values[0])

    async def _notify(self) -> None:
        async with self._applied:
            self._applied.notify_all()

    async def _answer(self, kind: str, values: list[Any]) -> Any:
        if kind == "metrics":
            await self._collect()
            return self.metrics.text()
        if kind == "dashboard":
            await self._collect()
            return self.dashboard.data(values[0])
        if kind == "load_adapter":
            name, folder, in_place = values
            await self._adapters.load(name, folder, in_place=in_place)
            await self.published()
        elif kind == "unload_adapter":
            self._adapters.unload(values[0])
            await self.published()
        else:
            raise RunError(f"questions of kind {kind!r} are unknown")
        return None

    async def _collect(self) -> None:
        """Has all fronts say what they have counted."""

        async def ask(front: _Front) -> None:
            if front.channel is not None and front.alive:
                with contextlib.suppress(RunError):  # what it said last stands
                    found = await front.channel.ask("report", timeout_s=REPORT_S)
                    self._take_in(front, found)

        await asyncio.gather(*[ask(front) for front in self.fronts])

    def _take_in(self, front: _Front, found: dict[str, Any]) -> None:
        front.totals = {
            (family, sample, tuple((key, value) for key, value in labels)): count
            for family, sample, labels, count in found["totals"]
        }
        front.adapters = found["adapters"]
        self.dashboard.absorb(found["counts"])

    def _counted(self) -> list[Totals]:
        return [self._gone, *(front.totals for front in self.fronts)]

    # --- processes ----------------------------------------------------------------------------

    async def _launch(self, front: _Front) -> None:
        """Starts a process in a front's place."""
        ours = self._spawn(front)
        front.heard_s = asyncio.get_running_loop().time()
        front.up.clear()
        front.serves.clear()
        front.told.clear()
        front.channel = await Channel(
            answer=self._answer,
            told=lambda kind, values: self._told(front, kind, values),
            ended=lambda: None,
        ).open(ours)
        self._tell(front)

    def _spawn(self, front: _Front) -> socket.socket:
        """Starts it; returns our end of its channel."""
        assert self._listener is not None
        ours, theirs = socket.socketpair()
        memory = self.shared
        files = (self._listener.fileno(), front.board.fileno(), theirs.fileno(), memory.file)
        seat = Seat(
            number=front.number,
            spec=self.spec,
            drain_s=self.drain_s,
            listener=files[0],
            board=files[1],
            channel=files[2],
            memory=files[3],
            fronts=memory.fronts,
            instances=memory.instances,
            adapters=memory.adapters,
            turns=str(self._turns / "turns.sqlite"),
        )
        # In a session of its own: an interrupt from the terminal is this process's to deal with.
        front.process = subprocess.Popen(
            [sys.executable, "-m", "jaxsys.serve.processes.front_process"],
            stdin=subprocess.PIPE,
            pass_fds=files,
            start_new_session=True,
        )
        theirs.close()
        assert front.process.stdin is not None
        with front.process.stdin as pipe, contextlib.suppress(BrokenPipeError):
            pipe.write(pickle.dumps(seat))
        return ours

    async def _until(self, front: _Front, event: asyncio.Event) -> None:
        """Waits until a front is so far.

        Raises:
            RunError: if it ends before, or takes too long.
        """
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + UP_S
        while not event.is_set():
            if not front.alive or loop.time() > deadline_s:
                raise RunError(f"front {front.number} did not come up: {_death(front)}")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(event.wait(), LOOK_S)

    async def _watched(self) -> None:
        try:
            await self._watch()
        except Exception as error:
            logger.exception("fronts are not looked after any more")
            self._failure = f"fronts are not looked after any more: {error}"

    async def _watch(self) -> None:
        """Puts another process where a front is gone."""
        loop = asyncio.get_running_loop()
        while True:
            before_s = loop.time()
            await asyncio.sleep(LOOK_S)
            held_up_s = loop.time() - before_s - LOOK_S
            for front in self.fronts:
                front.heard_s += held_up_s  # what it said meanwhile is still unread
                silent_s = loop.time() - front.heard_s
                most_s = SILENCE_S if front.up.is_set() else UP_S
                if front.alive and silent_s > most_s:
                    assert front.process is not None
                    logger.error("a front says nothing", extra={"front": front.number})
                    front.process.kill()
                    front.process.wait()
                if front.alive or self._ending or self._failure is not None:
                    continue
                if front.channel is not None:
                    self._lost(front)
                if len(self._losses) < MAX_LOSSES:
                    await self._launch(front)
                    logger.info("started another front", extra={"front": front.number})
                elif not any(one.alive for one in self.fronts):
                    self._failure = f"{MAX_LOSSES} fronts were lost within {UP_S:g} s"

    def _lost(self, front: _Front) -> None:
        """Keeps what a front that is gone has counted for good, and takes out its requests."""
        now_s = asyncio.get_running_loop().time()
        if len(self._losses) < MAX_LOSSES:
            self._losses = [one for one in self._losses if now_s - one < UP_S] + [now_s]
        logger.error("lost a front", extra={"front": front.number, "reason": _death(front)})
        if len(self._losses) == MAX_LOSSES:
            reason = f"{MAX_LOSSES} fronts were lost within {UP_S:g} s"
            logger.error("fronts are no longer replaced", extra={"reason": reason})
        self.losses += 1
        for key, value in front.totals.items():
            self._gone[key] = self._gone.get(key, 0.0) + value
        front.totals, front.adapters = {}, {}
        front.told.clear()
        self.shared.clear(front.number)
        if front.channel is not None:
            front.channel.close()
            front.channel = None

    async def _end(self, drain_s: float) -> None:
        self._ending = True
        self.engine.draining = True
        loop = asyncio.get_running_loop()
        for front in self.fronts:
            if front.channel is not None:
                front.channel.tell("end", drain_s)
            if front.process is not None and not front.up.is_set():
                front.process.kill()  # it has nothing yet
        if self._listener is not None:
            self._listener.close()
        deadline_s = loop.time() + drain_s + END_S
        while any(front.alive for front in self.fronts) and loop.time() < deadline_s:
            await asyncio.sleep(0.02)
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        for front in self.fronts:
            if front.alive and front.process is not None:
                logger.error("a front did not end", extra={"front": front.number})
                front.process.kill()
                front.process.wait()
            if front.channel is not None:
                front.channel.close()
            front.board.close()
        if self.engine._loop is not None:
            await self.engine.drain(0.0)
        await self.fleet.close()
        shutil.rmtree(self._turns, ignore_errors=True)

    def _run(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _death(front: _Front) -> str:
    status = None if front.process is None else front.process.poll()
    if status is None:
        return f"it was not up after {UP_S:g} s"
    if status < 0:
        return f"it was ended by {signal.Signals(-status).name}"
    return f"its process ended with status {status}"
