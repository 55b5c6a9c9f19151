"""One of several fronts, a process of its own: engine, router and HTTP over the same instances.

    python -m jaxsys.serve.processes.front_process < seat

It inherits the socket that all of them listen on, one that instances connect to, the memory they
count in (`shared`), and a channel to the process that looks after them (`fronts`). That says which
instances and adapters there are; requests and tokens never pass it. A front ends when it says so or
is gone; on SIGTERM it finishes what it has, and another takes its place.
"""

import asyncio
import dataclasses
import functools
import gc
import logging
import pickle
import secrets
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvloop

from jaxsys.errors import RunError, UsageError
from jaxsys.serve.adapters import Adapter
from jaxsys.serve.clock import WallClock
from jaxsys.serve.energy.governors import Served, make_router
from jaxsys.serve.energy.prefix_route import PrefixRouter
from jaxsys.serve.energy.slo import SharedSlo
from jaxsys.serve.engine import Engine
from jaxsys.serve.http.api import create_app
from jaxsys.serve.http.dashboard import Counts, add_pages
from jaxsys.serve.http.kept_turns import SharedTurns
from jaxsys.serve.http.listening import HttpServer, raise_descriptor_limit
from jaxsys.serve.http.metrics import Metrics
from jaxsys.serve.http.starting import Gateway, StartProgress
from jaxsys.serve.logs import log_to_stderr
from jaxsys.serve.member import Member, TokenEvent
from jaxsys.serve.processes.channel import Channel
from jaxsys.serve.processes.front import FrontSpec, read_face
from jaxsys.serve.processes.notes import Notes
from jaxsys.serve.processes.remote import RemoteInstance, Switchboard
from jaxsys.serve.processes.shared import Shared, SharedCrowd
from jaxsys.serve.requests import Request

logger = logging.getLogger("jaxsys.serve.processes.front_process")  # __name__ would be __main__

PULSE_S = 1.0
"""How often it says that it lives, and what it has counted."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """What a front is given; numbers of files are those of descriptors that it inherits."""

    number: int
    spec: FrontSpec
    drain_s: float
    """How long it finishes requests where it alone is to end."""
    listener: int
    board: int
    channel: int
    memory: int
    fronts: int
    instances: int
    adapters: int
    """As `Shared`'s."""
    turns: str
    """File of the turns that `/v1/responses` remembers."""


class ToldAdapters:
    """The adapters as the process that looks after them says; it is asked to load and unload."""

    def __init__(self, ask: Callable[..., Any], most: int):
        self.most = most
        self._ask = ask
        self._named: dict[str, Adapter] = {}

    def __iter__(self) -> Iterator[Adapter]:
        return iter(list(self._named.values()))

    def get(self, name: str) -> Adapter | None:
        return self._named.get(name)

    async def load(self, name: str, folder: str, *, in_place: bool = False) -> Adapter:
        await self._ask("load_adapter", name, folder, in_place)
        found = self._named.get(name)
        if found is None:
            raise RunError(f"adapter {name!r} was unloaded meanwhile")
        return found

    async def forget(self, name: str) -> None:
        await self._ask("unload_adapter", name)

    def join(self, member: Member, then: Callable[[], None]) -> None:
        """Nothing: instances have theirs before they come here."""

    def repeat(self, said: list[list[Any]]) -> None:
        """What there is from now on."""
        made = [Adapter(name=n, key=k, folder=f, created_s=s) for n, k, f, s in said]
        self._named = {one.name: one for one in made}


class SeatedFront:
    """A front in its seat."""

    def __init__(self, seat: Seat):
        self.seat = seat
        spec, number = seat.spec, seat.number
        worker = spec.worker
        deployment = worker.deployment
        self._shared = Shared(
            seat.memory, fronts=seat.fronts, instances=seat.instances, adapters=seat.adapters
        )
        self._channel = Channel(answer=self._asked, told=self._told, ended=self._left_alone)
        config, tokenizer = read_face(Path(worker.model))
        slo = SharedSlo(worker.slo)
        served = Served(
            model=config,
            weights=deployment.weights_named(worker.dtype or "bfloat16"),
            tensor_parallel=deployment.tensor_parallel,
        )
        make = functools.partial(make_router, gpu_name=worker.governor.gpu, served=served, slo=slo)
        self.engine = engine = Engine(
            clock=WallClock(),
            max_requests=deployment.max_requests,
            prefill_router=self._sharing(make(spec.route_prompts, option="--route-prompts")),
            decode_router=self._sharing(make(spec.route)),
        )
        engine.apart = deployment.decode > 0
        engine.healing = True
        self._crowd = engine.crowd = SharedCrowd(self._shared, number)
        # Requests of all fronts meet at instances.
        engine.prefix = f"request-{number}-{secrets.token_hex(4)}"
        self._adapters = engine.adapters = ToldAdapters(self._channel.ask, deployment.max_loras)
        self._metrics = Metrics(engine, spec.model_name)
        self._counts = Counts(slo)
        engine.on_token = self._count
        self.app = create_app(
            engine,
            tokenizer,
            spec.api(),
            self._metrics,
            exposition=lambda: self._channel.ask("metrics", timeout_s=10),
            turns=SharedTurns(Path(seat.turns)),
        )
        add_pages(self.app, lambda since_s: self._channel.ask("dashboard", since_s, timeout_s=10))
        self.progress = StartProgress()
        self._gateway = Gateway(self.progress, spec.root_path)
        self._server = HttpServer(self._gateway, tls=spec.tls, one_by_one=True)
        self._board = Switchboard(
            engine,
            worker.token,
            on_up=self._came_up,
            on_down=self._went_down,
            tally=lambda place: self._shared.instance(place, number),
        )
        self._state: dict[str, Any] = {
            "serving": False,
            "instances": [],
            "failed": [],
            "retiring": [],
        }
        self._ending: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        """The seconds that it may finish requests in, once it is to end."""

    async def serve(self) -> None:
        """Serves until it is to end."""
        seat, loop = self.seat, asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._end, seat.drain_s)
        await self._channel.open(socket.socket(fileno=seat.channel))
        await self.engine.start()
        board = socket.socket(fileno=seat.board)
        board.setblocking(False)
        await self._board.open("", board)
        gc.collect()
        gc.freeze()
        listener = socket.socket(fileno=seat.listener)
        serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        self._channel.tell("ready")
        pulse = asyncio.create_task(self._pulse())
        await asyncio.wait([self._ending, serving], return_when=asyncio.FIRST_COMPLETED)
        seconds = self._ending.result() if self._ending.done() else 0.0
        self._server.drain(seconds)
        self._server.should_exit = True
        await serving
        ended = await self.engine.drain(0.0)
        pulse.cancel()
        self.app.state.close()
        if ended:
            logger.warning("ended unfinished requests: %d", ended)
        self._report()
        await asyncio.sleep(0)  # what was told leaves
        self._channel.close()
        await self._board.close()

    # --- what it is told and asked ------------------------------------------------------------

    def _told(self, kind: str, values: list[Any]) -> None:
        if kind == "state":
            self._state = values[0]
            self._apply()
            self._channel.tell("applied", self._state["version"])
        elif kind == "end":
            self._end(values[0])

    async def _asked(self, kind: str, values: list[Any]) -> Any:
        if kind == "report":
            return self._counted()
        raise RunError(f"questions of kind {kind!r} are unknown")

    def _end(self, seconds: float) -> None:
        if not self._ending.done():
            self._ending.set_result(seconds)

    def _left_alone(self) -> None:
        if not self._ending.done():
            logger.error("whoever looks after the fronts is gone; this one ends too")
            shutil.rmtree(Path(self.seat.turns).parent, ignore_errors=True)
            self._end(0.0)

    def _apply(self) -> None:
        """Takes in what there is now."""
        state, engine = self._state, self.engine
        self._crowd.place(state["places"])
        self._adapters.repeat(state["adapters"])
        self.progress.repeat(state["progress"])
        for one in engine.instances:
            one.retiring = one.name in state["retiring"]
            there = one.name in state["instances"] or one.name in state["failed"]
            if one.failure is not None and not there:
                engine.remove(one)
        if state["hopeless"] is not None and engine.healing:
            engine.stop_healing(state["hopeless"])
        self._open()

    def _open(self) -> None:
        """Begins to serve, once all that there is to serve with is here."""
        here = {one.name for one in self.engine.instances}
        ready = self._state["serving"] and here.issuperset(self._state["instances"])
        if self._gateway.app is None and ready:
            self._gateway.app = self.app
            self._channel.tell("serves")

    # --- instances ----------------------------------------------------------------------------

    def _came_up(self, instance: RemoteInstance) -> None:
        engine = self.engine
        for old in [one for one in engine.instances if one.name == instance.name]:
            if isinstance(old, RemoteInstance) and old.failure is None:
                old.lost("it has connected anew")
            engine.remove(old)
        instance.retiring = instance.name in self._state["retiring"]
        engine.add(instance, decodes=instance.config.role == "decode")
        self._open()

    def _went_down(self, instance: RemoteInstance) -> None:
        if instance.name not in (*self._state["instances"], *self._state["failed"]):
            self.engine.remove(instance)

    def _sharing(self, router: Any) -> Any:
        """A router that knows what all fronts send where, if it remembers that."""
        if isinstance(router, PrefixRouter):
            number, all_of_them = self.seat.number, range(self.seat.fronts)
            others = [self._shared.notes(one) for one in all_of_them if one != number]
            router.index = Notes(self._shared.notes(number), others)
        return router

    # --- what it counts -----------------------------------------------------------------------

    def _count(self, request: Request, event: TokenEvent, source: str) -> None:
        self._metrics.on_token(request, event)
        self._counts.on_token(request, event, source)

    def _counted(self) -> dict[str, Any]:
        """All counts, and of those that are forgotten once told what is new."""
        return {
            "totals": [[*key, value] for key, value in self._metrics.totals().items()],
            "counts": self._counts.take(),
            "adapters": self.engine.by_adapter(),
        }

    def _report(self) -> None:
        self._channel.tell("counted", self._counted())

    async def _pulse(self) -> None:
        while True:
            await asyncio.sleep(PULSE_S)
            self._report()


async def _serve(seat: Seat) -> None:
    await SeatedFront(seat).serve()


def main() -> int:
    """Runs the front whose seat stands, pickled by the parent, on standard input."""
    seat: Seat = pickle.load(sys.stdin.buffer)
    log_to_stderr(as_json=seat.spec.worker.json_log)
    raise_descriptor_limit()
    try:
        # Whatever a front does passes sockets, which uvloop serves at half the price.
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(seat))
    except (UsageError, RunError) as error:
        logger.error("cannot serve", extra={"front": seat.number, "reason": str(error)})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
