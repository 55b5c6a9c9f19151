"""The training loop: steps, checkpoints, held-out losses and reports, until done or told to stop.

The loop reads each step's result one step late, so that the devices never wait for the host.
"""

import contextlib
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxsys.errors import RunError, UsageError
from jaxsys.layered import PyTree
from jaxsys.train.checkpoint import (
    FOLDER,
    CheckpointStore,
    check_names,
    check_unused,
    step_folders,
)
from jaxsys.train.energy import EnergyMeter
from jaxsys.train.flops import CONVENTION, device_peak
from jaxsys.train.interrupt import StopRequest, Watchdog
from jaxsys.train.loader import Batches
from jaxsys.train.lock import RunLock
from jaxsys.train.metrics import Meter, MetricsLog, peak_memory_bytes
from jaxsys.train.options import Ending, Saving, Telling, with_fields
from jaxsys.train.peers import PeerMonitor
from jaxsys.train.progress import Progress
from jaxsys.train.step import StepResult
from jaxsys.train.trainer import Trainer

MOST_SKIPPED_IN_A_ROW = 25
"""Under the policy "skip", this many batches in a row without a finite loss stop the run."""
SAVE_ALLOWANCE_S = 1800.0
PROFILED_STEPS = 3

Data = Batches | Callable[[int], PyTree] | Iterable[PyTree]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How a run ended."""

    step: int
    """Batches taken, over all of the run's lives."""
    loss: float | None
    """Of the last step; None if no step was taken."""
    held_out_loss: float | None
    tokens_per_s: float | None
    mfu: float | None
    skipped: int
    signal: int | None
    """The signal that ended it early, or None."""
    losses: tuple[float, ...] = field(repr=False, default=())
    """Of the steps taken now."""


def fit(
    trainer: Trainer,
    data: Data,
    *,
    steps: int,
    saving: Saving | None = None,
    telling: Telling | None = None,
    ending: Ending | None = None,
    **named: Any,
) -> Report:
    """Trains until `steps` batches are taken in all.

    Args:
        trainer: holds the state; it is changed.
        data: `Batches`; or a function from the step's number (from 0) to its batch; or an iterable
            of batches, which a resumed run reads from its start and skips through.
        steps: batches in all, those before a resume included.
        saving: where checkpoints are kept, and whether to go on from one.
        telling: held-out batches, progress, event files.
        ending: an earlier end, and how long silence may last.
        **named: any field of these three by its name, such as `folder="runs/first"`.

    Returns:
        How it ended.

    Raises:
        UsageError: if the folder holds another run or is in use by one, or the data does not fit.
        RunError: if the loss is not finite under the policy "stop", a parameter is not finite when
            it is to be saved or at the end, a checkpoint cannot be written, or a peer is lost.
    """
    if not (isinstance(steps, int) and steps >= 1):
        raise UsageError(f"steps={steps} must be a whole number, at least 1")
    given: Any = (saving or Saving(), telling or Telling(), ending or Ending())
    where: Saving
    shown: Telling
    end: Ending
    where, shown, end = with_fields(given, named)
    if (where.resume or shown.profile or shown.tensorboard) and where.folder is None:
        raise UsageError("resume, profile and tensorboard need a folder")
    loop = _Loop(
        trainer=trainer,
        steps=steps if end.stop_at is None else min(steps, end.stop_at),
        saving=where,
        telling=shown,
        folder=None if where.folder is None else Path(where.folder).absolute(),
        shown=shown.progress and jax.process_index() == 0,
    )
    with contextlib.ExitStack() as stack:
        loop.open(stack)
        peers = stack.enter_context(
            PeerMonitor(lost_after_s=end.lost_after_s, last_word=loop.last_checkpoint)
        )
        watchdog = stack.enter_context(Watchdog(end.hang_timeout_s, explain=peers.explain))
        stop = stack.enter_context(StopRequest())
        try:
            return loop.run(data, stop, watchdog)
        except (UsageError, KeyboardInterrupt):
            raise
        except Exception as error:
            # A dead peer shows as some error of the collective that waited for it.
            lost = peers.explain(peers.lost_after_s + 5) if jax.process_count() > 1 else ""
            if not lost:
                raise
            raise RunError(f"{lost}; {loop.last_checkpoint()}") from error


@dataclass(slots=True, kw_only=True)
class _Loop:
    trainer: Trainer
    steps: int
    saving: Saving
    telling: Telling
    folder: Path | None
    shown: bool
    store: CheckpointStore | None = None
    log: MetricsLog | None = None
    progress: Progress | None = None
    meter: Meter | None = None
    energy: EnergyMeter | None = None
    tokens: int = 0
    """Trained on since energy is counted, by this process's share of the devices."""
    tokens_of_step: int = 0
    losses: list[float] = field(default_factory=list)
    saved: int | None = None
    skipped: int = 0
    skipped_in_a_row: int = 0
    held_out_loss: float | None = None
    started_s: float = field(default_factory=time.monotonic)

    def open(self, stack: contextlib.ExitStack) -> None:
        trainer, saving, start = self.trainer, self.saving, None
        local = [d for d in trainer.mesh.devices.flat if d.process_index == jax.process_index()]
        self.energy = EnergyMeter(local)
        stack.callback(self.energy.close)
        if self.folder is not None:
            if jax.process_index() == 0:
                stack.enter_context(RunLock(self.folder, wait_s=saving.wait_s, notice=_warn))
            if not saving.resume:
                check_unused(self.folder)
            check_names(trainer.state)  # now, not at the first save
            self.store = CheckpointStore(self.folder / FOLDER, keep=saving.keep, notice=self.say)
            stack.callback(self.store.release)
            if saving.resume:
                start = trainer.restore(
                    self.store, accept_changes=saving.accept_changes, notice=self.say, warn=_warn
                )
                if start is None:
                    self.say(f"no checkpoint in {self.folder} yet: starting from step 0")
                self.saved = start
            if jax.process_index() == 0:
                self.log = MetricsLog(
                    self.folder / "metrics.jsonl",
                    resume_step=start,
                    tensorboard=self.folder / "tensorboard" if self.telling.tensorboard else None,
                )
                stack.callback(self.log.close)
        self.progress = Progress(start=trainer.step_number, steps=self.steps, shown=self.shown)
        stack.callback(self.progress.close)

    def run(self, data: Data, stop: StopRequest, watchdog: Watchdog) -> Report:
        trainer = self.trainer
        start = step = trainer.step_number
        signal_number: int | None = None
        pending: tuple[int, StepResult] | None = None
        profiler = _Profiler(self.folder, start + 1 if self.telling.profile else None)
        if step >= self.steps:
            self.say(f"step {step} is reached already, of {self.steps} asked for: nothing is left")
        for batch in self.batches(data, step):
            if step >= self.steps:
                break
            if self.meter is None:
                self.begin(batch, step)
            profiler.before(step)
            result = trainer.step(batch)
            step += 1
            trainer.position += data.batch_samples if isinstance(data, Batches) else 1
            if pending is not None:
                self.finish(*pending)
                watchdog.beat(pending[0])
            pending = (step, result)
            last = step >= self.steps
            if stop.after(step):
                signal_number = int(stop.signal or 15)
                last = True
            saves = self.folder is not None and (
                last or bool(self.saving.save_every and step % self.saving.save_every == 0)
            )
            every = self.telling.held_out_every
            evaluates = bool(self.telling.held_out) and (last or bool(every and step % every == 0))
            if saves or evaluates or last or profiler.ends(step):
                self.finish(*pending)
                watchdog.beat(step, extra_s=SAVE_ALLOWANCE_S)
                pending = None
                profiler.after(step)
                # Told to stop: there may be seconds left, so nothing comes before the save.
                if evaluates and signal_number is None:
                    self.evaluate(step)
                if saves:
                    self.save(step)
                self.meter.restart()  # type: ignore[union-attr]
                watchdog.beat(step)
            if last:
                break
        profiler.stop()
        if self.store is not None:
            if step < self.steps and signal_number is None and step > start:
                self.say(f"the data ended at step {step}")
                if self.saved != step:
                    self.save(step)
            watchdog.beat(step, extra_s=SAVE_ALLOWANCE_S)
            self.store.wait()
        self.check_finite(step)
        if signal_number is not None:
            self.say(f"stopped by signal {signal_number} at step {step}; {self.last_checkpoint()}")
        rates = self.meter.overall() if self.meter else None
        return Report(
            step=step,
            loss=self.losses[-1] if self.losses else None,
            held_out_loss=self.held_out_loss,
            tokens_per_s=rates.tokens_per_s if rates else None,
            mfu=rates.mfu if rates else None,
            skipped=self.skipped,
            signal=signal_number,
            losses=tuple(self.losses),
        )

    def batches(self, data: Data, step: int) -> Iterator[PyTree]:
        trainer = self.trainer
        if isinstance(data, Batches):
            return trainer.batches(data)
        if callable(data):
            return (trainer.place(data(index)) for index in itertools.count(step))
        if step and isinstance(data, Iterator):
            self.say(f"skipping the {step} batches that were taken before")
        return (trainer.place(batch) for batch in itertools.islice(data, step, None))

    def begin(self, batch: PyTree, step: int) -> None:
        trainer = self.trainer
        device = trainer.mesh.devices.flat[0]
        peak = device_peak(device, trainer.compute_dtype.name)
        tokens = self.telling.tokens_per_step
        if tokens is None:
            inputs = batch.get("inputs") if isinstance(batch, dict) else None
            leaf = jax.tree.leaves(batch)[0] if inputs is None else inputs
            tokens = math.prod(leaf.shape if inputs is not None else leaf.shape[:2])
        self.tokens_of_step = tokens
        self.meter = Meter(
            tokens_per_step=tokens,
            devices=trainer.mesh.size,
            flops_per_token=trainer.flops_per_token,
            peak_flops_per_s=peak.flops_per_s,
        )
        mfu = peak.reason if trainer.flops_per_token else "the model's FLOP per token are not given"
        self.say(
            f"{trainer.parameter_count:,} parameters, schedule {trainer.schedule.name} on "
            f"{trainer.mesh.size} {device.device_kind} device(s), {trainer.rows} microbatches, "
            f"{tokens:,} tokens a step; MFU: {mfu}; compiling"
        )
        self.write(
            "run",
            step,
            {
                "parameters": trainer.parameter_count,
                "schedule": trainer.schedule.name,
                "mesh": dict(trainer.mesh.shape),
                "device": device.device_kind,
                "processes": jax.process_count(),
                "microbatches": trainer.rows,
                "tokens_per_step": tokens,
                "compute_dtype": trainer.compute_dtype.name,
                "recompute": str(trainer.recompute),
                "flops_per_token": trainer.flops_per_token,
                "flops_convention": CONVENTION,
                "peak_flops_per_s": peak.flops_per_s,
                "mfu_is": mfu,
                "energy_is": self.energy.reason or "of process 0's GPUs",  # type: ignore[union-attr]
            },
        )

    def finish(self, step: int, result: StepResult) -> None:
        """Reads a step's result, reports it and applies the policy for losses not finite."""
        *scalars, metrics = jax.device_get(tuple(result))
        loss, norm, skipped = map(float, scalars)
        if self.store is not None:
            self.store.settle()
        rates = self.meter.step()  # type: ignore[union-attr]
        self.losses.append(loss)
        bad = int(skipped) > self.skipped
        self.skipped = int(skipped)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if bad else 0
        memory = peak_memory_bytes()
        energy_j = self.energy_per_token(first=rates is None)
        self.write(
            "step",
            step,
            {
                "loss": loss,
                "gradient_norm": norm,
                "step_time_s": rates.step_time_s if rates else None,
                "tokens_per_s": rates.tokens_per_s if rates else None,
                "tokens_per_s_per_device": rates.tokens_per_s_per_device if rates else None,
                "mfu": rates.mfu if rates else None,
                "peak_memory_bytes": memory,
                "energy_per_token_j": energy_j,
                "skipped": self.skipped,
                "elapsed_s": time.monotonic() - self.started_s,
                **{f"metrics/{name}": float(value) for name, value in metrics.items()},
            },
        )
        text = [f"loss {loss:.4f}"]
        if rates:
            text.append(f"{rates.tokens_per_s:,.0f} tokens/s")
            text.append("MFU n/a" if rates.mfu is None else f"MFU {rates.mfu:.1%}")
        if memory is not None:
            text.append(f"peak {memory / 2**30:.1f} GiB")
        if energy_j is not None:
            text.append(f"{energy_j * 1e3:.3g} mJ/token")
        if self.skipped:
            text.append(f"{self.skipped} skipped")
        self.progress.step(step, "  ".join(text))  # type: ignore[union-attr]
        if bad and self.trainer.non_finite == "stop":
            raise RunError(
                f"step {step}: loss {loss}, gradient norm {norm}; nothing was updated since step "
                f"{step - 1}; {self.written_checkpoint()}; lower the learning rate, or go on "
                "without such batches (non_finite='skip')"
            )
        if self.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise RunError(
                f"step {step}: {self.skipped_in_a_row} batches in a row had no finite loss; "
                f"{self.written_checkpoint()}"
            )

    def energy_per_token(self, *, first: bool) -> float | None:
        """Joules a token since the first step, checkpoints and evaluation included."""
        if self.energy is None:
            return None
        if first:
            self.energy.restart()
            return None
        mesh = self.trainer.mesh
        local = sum(d.process_index == jax.process_index() for d in mesh.devices.flat)
        self.tokens += self.tokens_of_step * local // mesh.size
        used_j = self.energy.read_j()
        return None if used_j is None else used_j / self.tokens

    def evaluate(self, step: int) -> None:
        self.held_out_loss = self.trainer.evaluate(self.telling.held_out)
        self.write("held_out", step, {"loss": self.held_out_loss})
        self.say(f"step {step}  held-out loss {self.held_out_loss:.4f}")

    def check_finite(self, step: int) -> None:
        """Raises RunError if a parameter is not finite: a step's own loss does not show that.

        The loss and the gradient norm of a step are of the parameters before it.
        """
        if not _all_finite(self.trainer):
            raise RunError(
                f"step {step}: the parameters are not finite; they were neither saved nor "
                f"exported; {self.written_checkpoint(good=True)}; lower the learning rate"
            )

    def save(self, step: int) -> None:
        self.check_finite(step)
        begun = time.monotonic()
        self.trainer.save(self.store)  # type: ignore[arg-type]
        self.saved = step
        self.write("checkpoint", step, {"blocked_s": time.monotonic() - begun})

    def last_checkpoint(self, *, good: bool = False) -> str:
        """The last checkpoint, in words; `good` where what came after it was not."""
        if self.store is None:
            return "no checkpoints were asked for"
        steps = [int(path.name) for path in step_folders(self.store.folder)]
        if not steps:
            return f"there is no checkpoint in {self.store.folder} yet"
        last = "last good checkpoint" if good else "last checkpoint"
        return f"the {last} is step {max(steps)} in {self.store.folder}"

    def written_checkpoint(self, *, good: bool = False) -> str:
        """The same, once a save that is under way is on disk or has failed."""
        with contextlib.suppress(RunError):
            if self.store is not None:
                self.store.wait()
        return self.last_checkpoint(good=good)

    def say(self, text: str) -> None:
        if self.progress is not None:
            self.progress.say(text)
        elif self.shown:
            Progress(start=0, steps=0).say(text)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if self.log is None:
            return
        try:
            self.log.write(kind, step, values)
        except OSError as error:
            raise RunError(
                f"step {step}: the metrics could not be written to {self.folder}: "
                f"{error.strerror or error}; {self.written_checkpoint()}; make room and resume"
            ) from None


def _warn(text: str) -> None:
    """Says it in quiet runs too."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def _all_finite(trainer: Trainer) -> bool:
    """Whether every parameter is finite; summed up on the devices, one number is fetched."""

    def finite(parameters: PyTree) -> jax.Array:
        leaves = (
            leaf for leaf in jax.tree.leaves(parameters) if jnp.issubdtype(leaf.dtype, jnp.inexact)
        )
        return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()

    everywhere = NamedSharding(trainer.mesh, PartitionSpec())
    return bool(jax.jit(finite, out_shardings=everywhere)(trainer.state.parameters))


class _Profiler:
    """Traces a few steps, the first one (which compiles) left out."""

    def __init__(self, folder: Path | None, first: int | None) -> None:
        self._folder, self._first, self._running = folder, first, False

    def before(self, step: int) -> None:
        if self._first is not None and step == self._first:
            jax.profiler.start_trace(str(self._folder / "profile"))  # type: ignore[operator]
            self._running = True

    def ends(self, step: int) -> bool:
        return self._running and step >= (self._first or 0) + PROFILED_STEPS

    def after(self, step: int) -> None:
        if self.ends(step):
            self.stop()

    def stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
        self._running = False
