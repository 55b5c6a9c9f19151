"""The trainer: a layered model, an optax optimizer and a schedule become a state and a step.

    trainer = Trainer(model, parameters, optax.adamw(3e-4), schedule="weipipe-interleave")
    trainer.fit(batches, steps=1000, folder="runs/first")

Masters are float32 and rest where the schedule keeps them; optimizer state rests beside them.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxsys
from jaxsys.axes import AROUND, RING
from jaxsys.errors import RunError, UsageError
from jaxsys.files import shown
from jaxsys.hardware import GIB
from jaxsys.layered import LayeredModel, Parameters, PyTree, part_shapes, parts_of
from jaxsys.lowering import RECOMPUTE_POLICIES, Recompute, lower
from jaxsys.lowering.memory import tree_bytes
from jaxsys.mesh import batch_axes, batch_parts, inner_sizes, make_mesh, sizes_around
from jaxsys.schedule import Schedule
from jaxsys.train import auto, checkpoint, schedules
from jaxsys.train.at_rest import Given, StateAtRest, shapes_of
from jaxsys.train.derivatives import check_derivatives
from jaxsys.train.evaluate import make_loss
from jaxsys.train.flops import count_parameters
from jaxsys.train.keys import Keys
from jaxsys.train.loader import Batches
from jaxsys.train.memory import StepShape, check_fits, check_state_fits, in_dtype
from jaxsys.train.options import About, Compute, Memory, with_fields
from jaxsys.train.own_mesh import are_typed, on_own_mesh, without_axis_types
from jaxsys.train.rules import shape_of
from jaxsys.train.state import AveragedState
from jaxsys.train.step import NonFinite, StepResult, Updates, make_step

if TYPE_CHECKING:
    from jaxsys.planner import Planned
    from jaxsys.train.loop import Report


class Trainer:
    """Trains one model.

    Attributes:
        mesh: of `jaxsys.mesh.make_mesh`.
        schedule: of one ring.
        state: the arrays; parameters in the order at rest.
        position: the global index of the next sample, where batches count them.
        chosen: what `schedule="auto"` took and why, in words; None where it was not asked.
    """

    chosen: str | None = None

    def __init__(
        self,
        model: LayeredModel,
        parameters: Given,
        optimizer: optax.GradientTransformation,
        *,
        schedule: str | Path | Schedule | None = None,
        plan: "Planned | str | Path | None" = None,
        mesh: Mesh | None = None,
        devices: int | None = None,
        microbatches: int | None = None,
        compute: Compute | None = None,
        updates: Updates | None = None,
        memory: Memory | None = None,
        about: About | None = None,
        **named: Any,
    ) -> None:
        """Places the parameters and prepares the step; nothing is compiled yet.

        Args:
            model: the layered model.
            parameters: in layer order; or a function that makes them, which is then traced, or
                `jaxsys.train.at_rest.Stored` of files, so that no device ever holds all of them.
            optimizer: any optax transformation that takes (updates, state, params); it sees the
                tree that `model.view` makes, each layer's leaf by itself.
            schedule: a strategy's name, a Schedule, a plan file, or "auto": what the planner finds
                fastest for the first batch; "weipipe-interleave" if not given.
            plan: what `jaxsys.planner.plan` found for the model, or a plan file: run as planned.
            mesh: of `jaxsys.mesh.make_mesh`; one ring over `devices` if not given, with a plan its
                replicas too.
            devices: how many form the ring; all of them, or as many as a plan is for, if neither
                this nor `mesh` is given.
            microbatches: of one ring and step; twice the ring's devices if not given.
            compute: dtypes and recompute; of a plan, if not given.
            updates: clipping, what is not finite, averages, a step of one's own.
            memory: the limit, and a microbatch to see by.
            about: settings to remember, and FLOP to count.
            **named: any field of these four by its name, such as `clip_norm=1.0`; and how many
                devices there are along an axis of `jaxsys.axes.AROUND`, by what that is asked for:
                `replicas=2` rings side by side, `tensor=2` devices that share every block's
                features, `expert`, `members`, and `context`, which may be a
                `jaxsys.context.ContextSplit` that says what travels. 1 if not given, or as a plan
                or schedule says. `features_by="ring"` has those that share features join them
                piece by piece beside their products.

        Raises:
            UsageError: if schedule, devices, microbatches and model do not fit together, or the
                state, or a step on `memory.microbatch`, not the memory; if the optimizer needs
                more than gradients; if a plan is not run, or is for something else than is asked.
        """
        if not isinstance(model, LayeredModel):
            raise UsageError(
                f"the model is a {type(model).__name__}; take it apart first: from_nnx, from_linen "
                "or from_function of jaxsys.train give model and parameters"
            )
        if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
            raise UsageError(
                f"the optimizer is {shown(optimizer)}; give a transformation of optax, such as "
                "optax.adamw(3e-4)"
            )
        around, split = schedules.taken_from(named)
        features_by = named.pop("features_by", None)
        given: Any = (compute or Compute(), updates or Updates(), memory or Memory())
        groups: Any = with_fields((*given, about or About()), named, beside=schedules.ASKED_AROUND)
        chosen_compute, self._updates, self._memory, self._about = groups
        if plan is not None and schedule is not None:
            raise UsageError(f"plan and schedule={schedule!r} are both given; leave one out")
        asked = schedules.Asked(
            schedule=plan if plan is not None else schedule or schedules.USUAL,
            mesh=mesh,
            devices=devices,
            around=around,
            split=split,
            microbatches=microbatches,
            compute=chosen_compute,
            named=frozenset(named),
            features_by=features_by,
        )
        if callable(parameters) and are_typed(jax.eval_shape(parameters)):
            parameters = parameters()  # made on a mesh of explicit axes, it is traced on no other
        self.model = model
        self.optimizer = optimizer
        self.position = 0
        self._asked, self._parameters = asked, parameters
        self._settings = {**self._updates.settings, **self._about.settings}
        self._keys, self._counted = Keys(model, self._about.seed), None
        if model.draws is not None:
            self._settings["seed"] = self._about.seed
        self._memory_checked = False
        if asked.schedule == schedules.AUTO:
            self.mesh = schedules.mesh_of(asked)
            # Of a host's free memory the state will soon have its part: it is asked before.
            self._limit = self._memory.limit(self.mesh.local_devices[0])
            if self._memory.microbatch is not None:
                self._choose(self._memory.microbatch)
            return
        chosen = schedules.choose(asked, layers=model.layers)
        self.mesh = chosen.mesh
        self._limit = self._memory.limit(self.mesh.local_devices[0])
        self._set_up(chosen)

    @on_own_mesh
    def _choose(self, microbatch: PyTree) -> None:
        """Asks the planner for a schedule, once there is a microbatch to plan for."""
        asked = self._asked
        policy: Any = asked.compute.recompute if "recompute" in asked.named else None
        if policy not in (None, *RECOMPUTE_POLICIES):
            legal = ", ".join(RECOMPUTE_POLICIES)
            raise UsageError(f"schedule 'auto' takes one recompute of {legal}, not {policy!r}")
        shapes = shapes_of(self._parameters)
        choice = auto.choose_layered(
            self.model,
            shapes,
            jax.tree.map(shape_of, self._keys.with_shape(microbatch)),
            list(self.mesh.devices.reshape(-1, self.mesh.shape[RING])[0]),
            microbatches=asked.microbatches or 2 * self.mesh.shape[RING],
            memory_gib=self._limit.bytes / GIB,
            compute=asked.compute,
            recompute=policy,
            # A mesh that was given, or on which a step has begun, stays as it is.
            shared=asked.mesh is None and self._memory.microbatch is not None,
        )
        self.chosen = choice.reason
        if choice.around:
            devices, sizes = list(self.mesh.devices.flat), {**self.mesh.shape, **choice.around}
            ring = sizes.pop(RING) // math.prod(choice.around.values())
            self.mesh = make_mesh(ring, devices=devices, **sizes)
        self._set_up(
            schedules.Chosen(
                schedule=choice.schedule,
                mesh=self.mesh,
                compute=replace(asked.compute, recompute=choice.recompute),
            )
        )

    @on_own_mesh
    def _set_up(self, chosen: schedules.Chosen) -> None:
        compute = chosen.compute
        self.schedule = chosen.schedule
        self.compute_dtype = jnp.dtype(compute.compute_dtype)
        self.recompute: Recompute | tuple[Recompute, ...] = compute.recompute
        self.unroll = compute.unroll
        options: Any = {
            "compute_dtype": compute.compute_dtype,
            "gradient_dtype": compute.gradient_dtype,
            "recompute": compute.recompute,
            "unroll": compute.unroll,
            "context": chosen.split,
        }
        self._lowered = lower(self.schedule, self.model, self.mesh, **options)
        self._rest = StateAtRest(
            self._lowered,
            self.mesh,
            self.optimizer,
            self.model.view,
            self._parameters,
            averaged=self._updates.average_decay is not None,
        )
        if self._memory.microbatch is None:
            needed = self._state_bytes * self._share
            around = sizes_around(self.mesh)
            check_state_fits(self.schedule, needed, self._limit, around=around)
        else:
            self._check_memory(self._memory.microbatch)
        self.state = self._rest.initial(self._parameters)
        del self._parameters
        self._step = make_step(self._lowered, self._rest.rule, self._rest.shardings, self._updates)

    def __getattr__(self, name: str) -> Any:
        if name in _AFTER_CHOICE and "_parameters" in self.__dict__:
            raise UsageError(
                f"schedule 'auto' is chosen for the first batch, and {name.strip('_')} is known "
                "after it; give Trainer a microbatch to choose for (microbatch=, arrays or shapes)"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _seen(self, batch: PyTree) -> None:
        """Sees a batch [rows, B, ...], for which schedule "auto" may still have to choose."""
        if "schedule" not in self.__dict__:
            self._choose(
                jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batch)
            )

    @property
    def non_finite(self) -> NonFinite:
        """What a loss or gradient that is not finite does."""
        return self._updates.non_finite

    @property
    def flops_per_token(self) -> float | None:
        """For MFU."""
        return self._about.flops_per_token

    @property
    def rows(self) -> int:
        """Microbatches in a batch, over all replicas of the ring."""
        if "schedule" in self.__dict__:
            return batch_parts(self.mesh) * self.schedule.microbatches
        each = self._asked.microbatches or 2 * self.mesh.shape[RING]
        return batch_parts(self.mesh) * each

    @property
    def step_number(self) -> int:
        """Batches taken so far; waits for the last one."""
        return int(self.state.step) if "state" in self.__dict__ else 0

    @cached_property
    def parameter_count(self) -> int:
        """N, padding at rest not counted."""
        return count_parameters(self._rest.layer_shapes.parameters)

    @on_own_mesh
    def step(self, batch: PyTree) -> StepResult:
        """Takes one step; returns at once, the result still being computed.

        Args:
            batch: leaves [rows, B, ...], numpy or already placed by `place`.
        """
        batch = self._with_keys(self._placed(batch))
        if not self._memory_checked:
            self._check_memory(
                jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batch)
            )
        self.state, result = self._step(self.state, batch)
        if self._counted is not None:
            self._counted = (self.state, self._counted[1] + 1)
        return result

    def split(self, batch: PyTree) -> PyTree:
        """A batch [G, ...] cut into the step's microbatches, [rows, G / rows, ...]."""

        def cut(leaf: Any) -> Any:
            if not leaf.ndim or leaf.shape[0] % self.rows:
                raise UsageError(
                    f"a batch leaf of shape {list(leaf.shape)} cannot be cut into "
                    f"{self.rows} microbatches; its first axis must be a multiple of {self.rows}"
                )
            return leaf.reshape(self.rows, -1, *leaf.shape[1:])

        return jax.tree.map(cut, batch)

    @on_own_mesh
    def place(self, batch: PyTree, *, rows: list[int] | None = None) -> PyTree:
        """Puts a batch on the devices.

        Args:
            batch: leaves [rows, B, ...] on the host.
            rows: which rows of the whole batch these are, ascending; all if not given.
        """
        self._seen(batch)
        shardings = self._lowered.batch_shardings(batch)
        where = None if rows is None else {row: index for index, row in enumerate(rows)}

        def put(leaf: Any, sharding: Any) -> jax.Array:
            # Copied: CPU devices may share the memory they are given, and a caller may fill its
            # buffer with the next batch while this step runs.
            leaf = np.array(leaf)
            shape = (self.rows, *leaf.shape[1:])
            if rows is None and leaf.shape[:1] != (self.rows,):
                raise UsageError(
                    f"a batch leaf has shape {list(leaf.shape)}; its first axis must be the "
                    f"{self.rows} microbatches of the step (schedule {self.schedule.name}: "
                    f"{self.schedule.microbatches} on {batch_parts(self.mesh)} ring(s))"
                )

            def part(index: Any) -> np.ndarray:
                if where is None:
                    return leaf[index]
                first = [where[row] for row in range(*index[0].indices(self.rows))]
                return leaf[first][(slice(None), *index[1:])]

            return jax.make_array_from_callback(shape, sharding, part)

        return jax.tree.map(put, batch, shardings)

    def local_rows(self) -> list[int]:
        """The rows of a batch that this process's devices need."""
        shape = (self.rows,)
        sharding = NamedSharding(self.mesh, PartitionSpec(batch_axes(self.mesh)))
        indices = sharding.addressable_devices_indices_map(shape).values()
        parts = [index[0] for index in indices if index is not None]
        return sorted({row for part in parts for row in range(*part.indices(self.rows))})

    def batches(self, data: Batches) -> Iterator[PyTree]:
        """The run's next batches, placed; only this process's rows are read."""
        if data.rows != self.rows:
            raise UsageError(
                f"the data makes {data.rows} microbatches a batch, the schedule takes {self.rows}"
            )
        rows = self.local_rows()
        for batch in data.read(self.position, rows):
            yield self.place(batch, rows=rows)

    @on_own_mesh
    def loss_and_gradients(self, batch: PyTree) -> tuple[float, Parameters]:
        """A batch's loss and its gradients in layer order; nothing is updated. For inspection."""
        found = jax.jit(self._lowered.loss_and_gradients)(
            self.state.parameters, self._with_keys(self._placed(batch))
        )
        return float(found.loss), self._lowered.from_rest(found.gradients)

    @on_own_mesh
    def evaluate(self, batches: Iterable[PyTree], *, averaged: bool = False) -> float:
        """The loss over the batches, each as much as it weighs; nothing is updated.

        A batch weighs what the model's head says: of a mean over a mask, what counts in it, so that
        this is the mean over all that counts. What an adapted loss divides by inside its sum, or
        keeps from zero though it is no count (`(loss * m / m.sum()).sum()`, `maximum(m.sum(), 1)`
        of a float m), is of one batch: such batches weigh as many samples as they have. Return
        `(sum, weight)` to have others.

        Args:
            batches: leaves [R, B, ...], any number R of microbatches of any size B.
            averaged: of the averaged parameters.
        """
        sums = []
        for batch in batches:
            self._seen(batch)
            if (self.model.evaluation or self.model).draws is not None:
                batch = self._with_keys(batch)
            sums.append(self._loss(self.parameters(averaged=averaged), self._spread(batch)))
        if not sums:
            raise UsageError("there are no batches to evaluate on")
        losses, weights = zip(*jax.device_get(sums), strict=True)
        return float(np.sum(losses) / np.sum(weights))

    @on_own_mesh
    def parameters(self, *, averaged: bool = False) -> Parameters:
        """The parameters in layer order, float32; or their average, if `average_decay` is set."""
        parameters = self.state.parameters
        if averaged:
            if not isinstance(self.state, AveragedState):
                raise UsageError("no average is kept; give Trainer average_decay=, such as 0.999")
            parameters = self.state.average
        return self._rest.parameters_in_layer_order(parameters)

    @on_own_mesh
    def host_parameters(self, *, averaged: bool = False) -> Parameters:
        """The parameters in layer order on this host, numpy float32; every process must call it."""
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        spread = jax.jit(lambda leaf: leaf, out_shardings=everywhere)
        row = jax.jit(lambda stack, index: stack[index], out_shardings=everywhere)

        def by_layer(stack: jax.Array) -> np.ndarray:
            """Only one layer's leaf is ever whole on a device."""
            whole = np.empty(stack.shape, stack.dtype)
            for index in range(stack.shape[0]):
                whole[index] = row(stack, index)
            return whole

        parameters = self.parameters(averaged=averaged)
        return {
            "edge": jax.tree.map(lambda leaf: np.asarray(spread(leaf)), parameters["edge"]),
            "blocks": jax.tree.map(by_layer, parameters["blocks"]),
        }

    @on_own_mesh
    def optimizer_state(self) -> PyTree:
        """The optimizer's state as a loop over the user's own tree would have it, layer order."""
        return self._rest.rule.rule.user_state(self._rest.in_layer_order(self.state).optimizer)

    def fit(self, data: Any, *, steps: int, **options: Any) -> "Report":
        """Trains until `steps` batches are taken.

        Args:
            data: `Batches`, a function from the step's number to its batch, or an iterable.
            steps: batches in all, those before a resume included.
            **options: `saving`, `telling` and `ending` of `jaxsys.train.loop.fit`, or any of their
                fields by name, such as `folder="runs/first"`.
        """
        from jaxsys.train.loop import fit  # which needs this module

        trainer: Any = self
        return fit(trainer, data, steps=steps, **options)

    @on_own_mesh
    def save(self, store: checkpoint.CheckpointStore) -> int:
        """Starts a checkpoint of the state as it is; returns its step."""
        tree = self._rest.in_layer_order(self.state)
        step = int(tree.step)
        record = checkpoint.Record(
            step=step,
            position=self.position,
            settings=self._settings,
            shapes=checkpoint.shapes_of(tree.parameters),
            checksums=checkpoint.checksums_of(tree),
            made_with={
                "schedule": self.schedule.name,
                "ring": self.mesh.shape[RING],
                **{name: self.mesh.shape.get(name, 1) for name in AROUND},
                "jaxsys": jaxsys.__version__,
                "jax": jax.__version__,
            },
        )
        store.save(tree, record)
        return step

    @on_own_mesh
    def restore(
        self,
        store: checkpoint.CheckpointStore,
        *,
        accept_changes: bool = False,
        notice: Callable[[str], None] = print,
        warn: Callable[[str], None] | None = None,
    ) -> int | None:
        """Goes on from the last checkpoint that can be read whole.

        Args:
            store: the run's checkpoints.
            accept_changes: go on though settings differ from those it was made with.
            notice: told which step is loaded.
            warn: told which ones could not be read; `notice` if not given.

        Returns:
            The step, or None if there is no checkpoint.

        Raises:
            UsageError: if the checkpoint is of another model, or settings changed unaccepted.
            RunError: if there are checkpoints but none can be read.
        """
        steps, warn = store.steps(), warn or notice
        broken: list[int] = []
        unread = ""
        for step in reversed(steps):
            try:
                store.check_sizes(step)
                record = store.record(step)
                self._check(record, store, accept_changes, notice)
                shapes = self._rest.layer_shapes
                shardings = self._rest.layer_shardings
                target = jax.tree.map(
                    lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at),
                    shapes,
                    shardings,
                )
                tree = store.arrays(step, target, record.checksums)
            except RunError as error:
                warn(f"checkpoint of {error}; trying the one before")
                broken.append(step)
                unread = unread or f"checkpoint of {error}; of those before, "
                continue
            except UsageError as error:
                # What the user is told of an older step begins with why it was looked at.
                raise UsageError(f"{unread}{error}") from None
            self.state = self._rest.to_rest(tree)
            self.position = record.position
            for bad in broken:
                warn(f"step {bad} was put aside as {store.set_aside(bad)}")
            made = record.made_with
            notice(
                f"resumed from step {step} in {store.folder} (saved under {made.get('schedule')} "
                f"on {_devices_in_words(made)}; goes on under {self.schedule.name} on "
                f"{_devices_in_words(self.mesh.shape)})"
            )
            return step
        if steps:
            raise RunError(
                f"none of the checkpoints {steps} in {store.folder} can be read; "
                f"use another folder, or remove {store.folder} to start anew"
            )
        return None

    def _check(
        self,
        record: checkpoint.Record,
        store: checkpoint.CheckpointStore,
        accept_changes: bool,
        notice: Callable[[str], None],
    ) -> None:
        shapes = checkpoint.shapes_of(self._rest.layer_shapes.parameters)
        checkpoint.check_same_model(record, shapes, store.folder)
        changed = checkpoint.changed_settings(record, self._settings)
        if changed and not accept_changes:
            raise UsageError(
                f"{store.folder} step {record.step} was made with other settings: "
                f"{'; '.join(changed)}; give the old ones, or accept the change "
                "(accept_changes=True)"
            )
        if changed:
            notice(f"accepted changed settings: {'; '.join(changed)}")

    @property
    def _state_bytes(self) -> float:
        return tree_bytes(self._rest.layer_shapes)

    @property
    def _share(self) -> float:
        """The part of the parameters that a device has of what devices share."""
        sizes, whole = inner_sizes(self.mesh), self._rest.layer_shapes.parameters
        parts = parts_of(self.model, sizes)
        if parts is None:
            return 1.0
        return tree_bytes(part_shapes(whole, parts, sizes)) / tree_bytes(whole)

    def _check_memory(self, microbatch: PyTree) -> None:
        """Raises UsageError if the step on such microbatches is predicted not to fit, or if the
        model's own derivatives are others in it."""
        microbatch = jax.tree.map(shape_of, self._keys.with_shape(microbatch))
        shapes = self._rest.layer_shapes.parameters
        check_derivatives(self.model, in_dtype(shapes, self.compute_dtype), microbatch)
        if self._limit.bytes < math.inf:
            check_fits(
                StepShape(
                    schedule=self.schedule,
                    model=self.model,
                    parameters=shapes,
                    state_bytes=self._state_bytes,
                    microbatch=microbatch,
                    compute_dtype=self.compute_dtype,
                    gradient_dtype=self._lowered.gradient_dtype,
                    recompute=self.recompute,
                    unroll=self.unroll,
                    looped=getattr(self._lowered, "looped", False),
                    sizes=sizes_around(self.mesh),
                    context=self._lowered.context,
                ),
                self._limit,
            )
        self._memory_checked = True

    @cached_property
    def _loss(self) -> Callable[[Parameters, PyTree], tuple[jax.Array, jax.Array]]:
        return make_loss(
            self.model.evaluation or self.model,
            self.mesh,
            self._rest.layer_shardings.parameters,
            compute_dtype=self.compute_dtype,
            context=self._lowered.context,
        )

    def _placed(self, batch: PyTree) -> PyTree:
        if not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(batch)):
            return self.place(batch)
        self._seen(batch)
        return without_axis_types(batch)

    def _with_keys(self, batch: PyTree) -> PyTree:
        """The batch with the step's keys, if the model draws and it has none of its own."""
        if not self._keys.lacks(batch):
            return batch
        # Counted here: to ask the devices would wait for the last step.
        if self._counted is None or self._counted[0] is not self.state:
            self._counted = (self.state, int(self.state.step))
        rows = np.shape(jax.tree.leaves(batch)[0])[0]
        keys = self._keys.of_step(self._counted[1], rows)
        placed = isinstance(jax.tree.leaves(batch)[0], jax.Array)
        return {**batch, **(self.place(keys) if placed else keys)}

    def _spread(self, batch: PyTree) -> PyTree:
        """A batch of any cut on the devices, as the step's own batches lie where it is one."""
        leaves = jax.tree.leaves(batch)
        if all(isinstance(leaf, jax.Array) for leaf in leaves):
            return without_axis_types(batch)
        counts = {np.shape(leaf)[:1] for leaf in leaves}
        if len(counts) != 1 or not all(counts):
            raise UsageError("a batch's leaves must have one leading axis, its microbatches")
        if counts == {(self.rows,)}:
            return self.place(batch)
        everywhere = NamedSharding(self.mesh, PartitionSpec())

        def put(leaf: Any) -> jax.Array:
            leaf = np.array(leaf)  # as in `place`
            return jax.make_array_from_callback(leaf.shape, everywhere, lambda at: leaf[at])

        return jax.tree.map(put, batch)


_AFTER_CHOICE = (
    "schedule", "state", "compute_dtype", "recompute", "unroll", "_lowered", "_rest", "_step"
)  # fmt: skip
"""Attributes that `schedule="auto"` has after the first batch."""


def _devices_in_words(sizes: Mapping[str, Any]) -> str:
    """How many devices there are along each mesh axis of more than one, and in all."""
    along = {RING: sizes.get(RING, 1), **{name: sizes.get(name, 1) for name in AROUND}}
    total = math.prod(along.values())
    parts = [
        f"{name if name == RING else AROUND[name].asked} {size}"
        for name, size in along.items()
        if size != 1
    ]
    if len(parts) < 2 and along[RING] == total:
        return f"{total} device{'s' if total > 1 else ''}"
    return f"{total} devices: {' x '.join(parts)}"
