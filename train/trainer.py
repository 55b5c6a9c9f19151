"""The trainer: a layered model, an optax optimizer and a schedule become a state and a step.

    trainer = Trainer(model, parameters, optax.adamw(3e-4), schedule="weipipe-interleave")
    trainer.fit(batches, steps=1000, folder="runs/first")

Masters are float32 and rest where the schedule keeps them; optimizer state rests beside them.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

import jaxsys
from jaxsys.errors import RunError, UsageError
from jaxsys.hardware import GIB
from jaxsys.layered import LayeredModel, Parameters, PyTree
from jaxsys.lowering import Recompute, lower
from jaxsys.lowering.memory import tree_bytes
from jaxsys.mesh import DATA, RING, make_mesh, request_devices
from jaxsys.schedule import Schedule
from jaxsys.train import checkpoint, schedules
from jaxsys.train.evaluate import make_loss
from jaxsys.train.flops import count_parameters
from jaxsys.train.loader import Batches
from jaxsys.train.memory import Limit, StepShape, check_fits, check_state_fits, limit_of
from jaxsys.train.rules import RuleAtRest, by_name, rule_of, shape_of
from jaxsys.train.state import TrainState, layer_shardings
from jaxsys.train.step import NonFinite, StepOptions, StepResult, make_step

if TYPE_CHECKING:
    from jaxsys.train.loop import Report


class Trainer:
    """Trains one model.

    Attributes:
        mesh: axes (DATA, RING).
        schedule: of one ring.
        state: the arrays; parameters in the order at rest.
        position: the global index of the next sample, where batches count them.
    """

    def __init__(
        self,
        model: LayeredModel,
        parameters: Parameters | Callable[[], Parameters],
        optimizer: optax.GradientTransformation,
        *,
        schedule: str | Path | Schedule = "weipipe-interleave",
        mesh: Mesh | None = None,
        devices: int | None = None,
        microbatches: int | None = None,
        compute_dtype: DTypeLike = jnp.float32,
        gradient_dtype: DTypeLike = jnp.float32,
        recompute: Recompute = "block",
        unroll: bool = False,
        clip_norm: float | None = None,
        non_finite: NonFinite = "stop",
        settings: Mapping[str, Any] | None = None,
        flops_per_token: float | None = None,
        memory_gib: float | None = None,
        microbatch: PyTree | None = None,
    ) -> None:
        """Places the parameters and prepares the step; nothing is compiled yet.

        Args:
            model: the layered model.
            parameters: in layer order, or a function that makes them, which is then traced so that
                no device ever holds all of them.
            optimizer: any optax transformation; sees blocks stacked [L, ...].
            schedule: a strategy's name, a Schedule, or a plan file.
            mesh: of `jaxsys.mesh.make_mesh`; one ring over `devices` if not given.
            devices: how many form the ring; all of them if neither this nor `mesh` is given.
            microbatches: of one ring and step; twice the ring's devices if not given.
            compute_dtype: of weights in use and activations.
            gradient_dtype: of gradient sums on their way.
            recompute: what the backward pass computes again.
            unroll: write a chunk's layers out instead of looping over them: steps that keep
                residuals are faster, compiling takes longer (one body a layer). ZeRO's always are.
            clip_norm: the largest global gradient norm.
            non_finite: "stop" at a loss or gradient that is not finite, or "skip" that batch.
            settings: what else the trajectory depends on; compared when a run is resumed.
            flops_per_token: for MFU, see `jaxsys.train.flops`.
            memory_gib: what a step may need on a device; a first batch that is predicted to need
                more is refused before anything is compiled. What the device has, if not given
                (of CPU devices each its part of what the host has free); `math.inf` goes on
                whatever is predicted.
            microbatch: arrays or shapes of one, [B, ...]; with it what is predicted not to fit is
                refused here, before parameters are made, and not at the first batch.

        Raises:
            UsageError: if schedule, devices, microbatches and model do not fit together, or the
                state, or a step on `microbatch`, not the memory.
        """
        if non_finite not in ("stop", "skip"):
            raise UsageError(f"non_finite={non_finite!r} must be 'stop' or 'skip'")
        if clip_norm is not None and not clip_norm > 0:
            raise UsageError(f"clip_norm={clip_norm} must be above 0")
        if mesh is None:
            ring = len(jax.devices()) if devices is None else devices
            if isinstance(schedule, Schedule) and devices is None:
                ring = schedule.devices
            mesh = make_mesh(ring, devices=request_devices(ring))
        elif devices is not None and devices != mesh.shape[RING]:
            raise UsageError(f"devices={devices} but the mesh's ring has {mesh.shape[RING]}")
        self.mesh = mesh
        self.model = model
        self.optimizer = optimizer
        self.schedule = schedules.resolve(
            schedule, devices=mesh.shape[RING], layers=model.layers, microbatches=microbatches
        )
        if memory_gib is not None and not memory_gib > 0:
            raise UsageError(f"memory_gib={memory_gib} must be above 0")
        # Of a host's free memory the state will soon have its part: it is asked before.
        self._limit = (
            limit_of(self.mesh.local_devices[0])
            if memory_gib is None
            else Limit(bytes=memory_gib * GIB)
        )
        self._memory_checked = False
        self.compute_dtype = jnp.dtype(compute_dtype)
        self.recompute: Recompute | tuple[Recompute, ...] = recompute
        self.flops_per_token = flops_per_token
        self.non_finite: NonFinite = non_finite
        self.position = 0
        self._settings = {"clip_norm": clip_norm, **(settings or {})}
        self.unroll = unroll
        self._lowered = lower(
            self.schedule,
            model,
            mesh,
            compute_dtype=compute_dtype,
            gradient_dtype=gradient_dtype,
            recompute=recompute,
            unroll=unroll,
        )
        shapes = jax.tree.map(shape_of, jax.eval_shape(lambda: _masters(parameters)))
        rule = rule_of(optimizer, shapes, model.view)
        self._layer_shapes = _state(shapes, rule.shapes(), jax.ShapeDtypeStruct((), jnp.int32))
        at_rest = jax.eval_shape(self._lowered.to_rest, shapes)
        self._rule = RuleAtRest(rule, at_rest, _rows(self._lowered, at_rest), mesh)
        if microbatch is None:
            check_state_fits(self.schedule, self._state_bytes, self._limit)
        else:
            self._check_memory(microbatch)
        self.state = self._initial_state(parameters)
        self._step = make_step(
            self._lowered,
            self._rule,
            jax.tree.map(lambda leaf: leaf.sharding, self.state),
            StepOptions(clip_norm=clip_norm, non_finite=non_finite),
        )

    @property
    def rows(self) -> int:
        """Microbatches in a batch, over all replicas of the ring."""
        return self.mesh.shape[DATA] * self.schedule.microbatches

    @property
    def step_number(self) -> int:
        """Batches taken so far; waits for the last one."""
        return int(self.state.step)

    @cached_property
    def parameter_count(self) -> int:
        """N, padding at rest not counted."""
        return count_parameters(self._layer_shapes.parameters)

    def step(self, batch: PyTree) -> StepResult:
        """Takes one step; returns at once, the result still being computed.

        Args:
            batch: leaves [rows, B, ...], numpy or already placed by `place`.
        """
        if not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(batch)):
            batch = self.place(batch)
        if not self._memory_checked:
            self._check_memory(
                jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batch)
            )
        self.state, result = self._step(self.state, batch)
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

    def place(self, batch: PyTree, *, rows: list[int] | None = None) -> PyTree:
        """Puts a batch on the devices.

        Args:
            batch: leaves [rows, B, ...] on the host.
            rows: which rows of the whole batch these are, ascending; all if not given.
        """
        shardings = self._lowered.batch_shardings(batch)
        where = None if rows is None else {row: index for index, row in enumerate(rows)}

        def put(leaf: Any, sharding: Any) -> jax.Array:
            leaf = np.asarray(leaf)
            shape = (self.rows, *leaf.shape[1:])
            if rows is None and leaf.shape[:1] != (self.rows,):
                raise UsageError(
                    f"a batch leaf has shape {list(leaf.shape)}; its first axis must be the "
                    f"{self.rows} microbatches of the step (schedule {self.schedule.name}: "
                    f"{self.schedule.microbatches} on {self.mesh.shape[DATA]} ring(s))"
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
        sharding = jax.tree.leaves(
            self._lowered.batch_shardings({"row": jax.ShapeDtypeStruct(shape, jnp.int32)})
        )[0]
        indices = sharding.addressable_devices_indices_map(shape).values()
        return sorted({row for (index,) in indices for row in range(*index.indices(self.rows))})

    def batches(self, data: Batches) -> Iterator[PyTree]:
        """The run's next batches, placed; only this process's rows are read."""
        if data.rows != self.rows:
            raise UsageError(
                f"the data makes {data.rows} microbatches a batch, the schedule takes {self.rows}"
            )
        rows = self.local_rows()
        for batch in data.read(self.position, rows):
            yield self.place(batch, rows=rows)

    def loss_and_gradients(self, batch: PyTree) -> tuple[float, Parameters]:
        """A batch's loss and its gradients in layer order; nothing is updated. For inspection."""
        found = jax.jit(self._lowered.loss_and_gradients)(
            self.state.parameters, self._placed(batch)
        )
        return float(found.loss), self._lowered.from_rest(found.gradients)

    def evaluate(self, batches: Iterator[PyTree] | list[PyTree]) -> float:
        """The mean loss over all that counts in the batches; nothing is updated."""
        parameters = self.parameters()
        sums = [self._loss(parameters, self._placed(batch)) for batch in batches]
        if not sums:
            raise UsageError("there are no batches to evaluate on")
        losses, weights = zip(*jax.device_get(sums), strict=True)
        return float(np.sum(losses) / np.sum(weights))

    def parameters(self) -> Parameters:
        """The parameters in layer order, float32."""
        return self._parameters_from_rest(self.state.parameters)

    def host_parameters(self) -> Parameters:
        """The parameters in layer order on this host, numpy float32; every process must call it."""
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        spread = jax.jit(lambda leaf: leaf, out_shardings=everywhere)
        # One leaf at a time: only that one is ever whole on a device.
        return jax.tree.map(lambda leaf: np.asarray(spread(leaf)), self.parameters())

    def optimizer_state(self) -> PyTree:
        """The optimizer's state as a loop over the user's own tree would have it, layer order."""
        return self._rule.rule.user_state(self._layer_order_state.optimizer)

    def fit(self, data: Any, *, steps: int, **options: Any) -> "Report":
        """Trains until `steps` batches are taken; see `jaxsys.train.loop.fit` for the options."""
        from jaxsys.train.loop import fit  # which needs this module

        trainer: Any = self
        return fit(trainer, data, steps=steps, **options)

    def save(self, store: checkpoint.CheckpointStore) -> int:
        """Starts a checkpoint of the state as it is; returns its step."""
        tree = self._layer_order_state
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
                "data": self.mesh.shape[DATA],
                "jaxsys": jaxsys.__version__,
                "jax": jax.__version__,
            },
        )
        store.save(tree, record)
        return step

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
        for step in reversed(steps):
            try:
                store.check_sizes(step)
                record = store.record(step)
                self._check(record, store, accept_changes, notice)
                shapes = self._layer_shapes
                shardings = self._layer_shardings
                target = jax.tree.map(
                    lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at),
                    shapes,
                    shardings,
                )
                tree = store.arrays(step, target, record.checksums)
            except RunError as error:
                warn(f"checkpoint of {error}; trying the one before")
                broken.append(step)
                continue
            self.state = self._to_rest(tree)
            self.position = record.position
            for bad in broken:
                warn(f"step {bad} was put aside as {store.set_aside(bad)}")
            made = record.made_with
            notice(
                f"resumed from step {step} in {store.folder} (saved under {made.get('schedule')} "
                f"on {made.get('ring')} x {made.get('data')} devices)"
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
        shapes = checkpoint.shapes_of(self._layer_shapes.parameters)
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
        return tree_bytes(self._layer_shapes)

    def _check_memory(self, microbatch: PyTree) -> None:
        """Raises UsageError if the step on such microbatches is predicted not to fit."""
        if self._limit.bytes < math.inf:
            check_fits(
                StepShape(
                    schedule=self.schedule,
                    model=self.model,
                    parameters=self._layer_shapes.parameters,
                    state_bytes=self._state_bytes,
                    microbatch=jax.tree.map(
                        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), microbatch
                    ),
                    compute_dtype=self.compute_dtype,
                    gradient_dtype=self._lowered.gradient_dtype,
                    recompute=self.recompute,
                    unroll=self.unroll,
                ),
                self._limit,
            )
        self._memory_checked = True

    def _initial_state(self, parameters: Parameters | Callable[[], Parameters]) -> TrainState:
        def made() -> Parameters:
            return self._lowered.to_rest(_masters(parameters))

        shapes = jax.eval_shape(made)
        self._layer_shardings = self._shardings(
            self._layer_shapes, layer_shardings(self.mesh)(self._layer_shapes.parameters)
        )
        self._rest_shardings = self._shardings(
            _state(shapes, self._rule.state_shapes, self._layer_shapes.step),
            self._lowered.rest_shardings(shapes),
        )
        if callable(parameters):
            placed = jax.jit(made, out_shardings=self._rest_shardings.parameters)()
        else:
            given = jax.device_get(parameters) if jax.process_count() > 1 else parameters
            placed = _apart_from(given, self._lowered.to_rest(_masters(given)))

        def start(parameters: Any) -> TrainState:
            return _state(parameters, self._rule.init(parameters), jnp.int32(0))

        return jax.jit(start, out_shardings=self._rest_shardings, donate_argnums=0)(placed)

    def _shardings(self, shapes: TrainState, parameters: Parameters) -> TrainState:
        rule = self._rule.rule
        optimizer = rule.shardings(self.mesh, shapes.parameters, shapes.optimizer, parameters)
        return _state(parameters, optimizer, NamedSharding(self.mesh, PartitionSpec()))

    @property
    def _layer_order_state(self) -> TrainState:
        return self._from_rest(self.state)

    @cached_property
    def _from_rest(self) -> Callable[[TrainState], TrainState]:
        def move(state: TrainState) -> TrainState:
            at = self._layer_shardings.optimizer
            return state._replace(
                parameters=self._layer_order(state.parameters),
                optimizer=self._rule.to_layer_order(state.optimizer, at),
            )

        return jax.jit(move, out_shardings=self._layer_shardings)

    @cached_property
    def _parameters_from_rest(self) -> Callable[[Parameters], Parameters]:
        return jax.jit(self._layer_order, out_shardings=self._layer_shardings.parameters)

    def _layer_order(self, parameters: Parameters) -> Parameters:
        # Cut along another axis first: the layers' order then changes within each device.
        cut = layer_shardings(self.mesh)(parameters)
        return self._lowered.from_rest(jax.lax.with_sharding_constraint(parameters, cut))

    @cached_property
    def _to_rest(self) -> Callable[[TrainState], TrainState]:
        def move(state: TrainState) -> TrainState:
            return state._replace(
                parameters=self._lowered.to_rest(state.parameters),
                optimizer=self._rule.to_rest(state.optimizer),
            )

        return jax.jit(move, out_shardings=self._rest_shardings)

    @cached_property
    def _loss(self) -> Callable[[Parameters, PyTree], tuple[jax.Array, jax.Array]]:
        return make_loss(
            self.model,
            self.mesh,
            self._layer_shardings.parameters,
            compute_dtype=self.compute_dtype,
        )

    def _placed(self, batch: PyTree) -> PyTree:
        placed = all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(batch))
        return batch if placed else self.place(batch)


def _masters(parameters: Parameters | Callable[[], Parameters]) -> Parameters:
    """The parameters, made if they are a function, floats as float32."""

    def widen(leaf: Any) -> jax.Array:
        leaf = jnp.asarray(leaf)
        return leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(widen, parameters() if callable(parameters) else parameters)


def _state(parameters: Any, optimizer: Any, scalar: Any) -> TrainState:
    return TrainState(parameters=parameters, optimizer=optimizer, step=scalar, skipped=scalar)


def _rows(lowered: Any, at_rest: Parameters) -> dict[tuple[str, ...], tuple[np.ndarray, int]]:
    """For each stacked leaf the row at rest that holds each layer, and how many rows there are."""
    numbered = jax.tree.map(lambda leaf: jnp.arange(leaf.shape[0]), at_rest["blocks"])
    order = lowered.from_rest({"edge": {}, "blocks": numbered})
    counts = by_name({"blocks": numbered})
    return {
        name: (np.asarray(rows), len(counts[name]))
        for name, rows in by_name({"blocks": order["blocks"]}).items()
    }


def _apart_from(given: Parameters, placed: Parameters) -> Parameters:
    """`placed`, copied where it still is the caller's memory: the state will be donated."""

    def spans(leaf: Any) -> list[tuple[int, int]]:
        if isinstance(leaf, np.ndarray):
            start = leaf.__array_interface__["data"][0]
            return [(start, start + leaf.nbytes)]
        if not isinstance(leaf, jax.Array):
            return []
        parts = [shard.data for shard in leaf.addressable_shards]
        return [(p.unsafe_buffer_pointer(), p.unsafe_buffer_pointer() + p.nbytes) for p in parts]

    def apart(mine: jax.Array, theirs: Any) -> jax.Array:
        held = spans(theirs)
        shared = any(a < d and c < b for a, b in spans(mine) for c, d in held)
        return jnp.copy(mine) if shared else mine

    return jax.tree.map(apart, placed, given)
