"""Takes any function of parameters and a microbatch apart into embed, blocks, head and loss."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.core import ShapedArray, Tracer

from jaxsys.errors import UsageError
from jaxsys.layered import ALIKE, TOTALS, LayeredModel, Parameters, PyTree
from jaxsys.layered import Layer as LayerInfo
from jaxsys.train.adapt.places import (
    Edge,
    Fixed,
    InBlock,
    Names,
    Place,
    Stack,
    is_array,
    leaf_of,
    names_of,
    nested,
    places,
    trains,
)
from jaxsys.train.adapt.plan import CutProgram
from jaxsys.train.adapt.program import trace
from jaxsys.train.adapt.states import OUTPUT
from jaxsys.train.adapt.sums import FORMS, sums_of
from jaxsys.train.adapt.values import (
    BatchLeaf,
    BlockLeaf,
    EdgeLeaf,
    Layer,
    StackedLeaf,
    Value,
)
from jaxsys.train.own_mesh import on_automatic_axes, without_axis_types

Loss = Callable[[Any, PyTree], Any]
"""(the model's output, microbatch) -> (summed loss, weight), scalars, or what else `LossFunction`
may return."""

Inputs = Callable[[PyTree], tuple[Any, ...]]
"""Microbatch -> the model's positional arguments."""

Aliases = Mapping[Names, Sequence[Names]]

KEY = "key"
"""The microbatch's leaf that holds its random key, see `jaxsys.layered.microbatch_keys`."""

LossFunction = Callable[[PyTree, PyTree], Any]
"""(parameters, microbatch) -> one of

    summed loss, weight             a step's loss is sum(losses) / sum(weights)
    summed loss, weight, metrics    a dict of sums beside it; also summed loss, (weight, metrics)
    mean                            over samples, or over a mask that the microbatch gives
    mean, metrics                   and a dict of means; one that is not seen to be a mean is
                                    averaged over microbatches

A mean is taken apart into sum and weight if it is seen to be one, else refused: see `mean`. What is
divided by must not depend on parameters.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapted:
    """A user's model in the form schedules run."""

    model: LayeredModel
    parameters: Parameters
    rebuild: Callable[[Parameters], Any]
    """Trained parameters back in the user's own form: Linen variables, or the NNX model."""
    draws: bool = False
    """Whether the model draws random numbers: a microbatch then has its own key in `KEY`."""
    numbers: Mapping[Layer, int] | None = field(default=None, repr=False)
    """Each block's number among the kinds of blocks, for another adaptation to keep to."""


def next_token_loss(logits: jax.Array, microbatch: PyTree) -> tuple[jax.Array, jax.Array]:
    """Summed cross-entropy of logits [B, T, V] with microbatch["targets"] [B, T], -1 ignored."""
    if not isinstance(logits, jax.Array):
        raise UsageError(
            f"the model returns a {type(logits).__name__}, not logits alone; give the loss that is "
            "computed from it (loss=)"
        )
    targets = microbatch["targets"]
    counted = targets >= 0
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, jnp.where(counted, targets, 0)[..., None], axis=-1)
    losses = jax.nn.logsumexp(logits, axis=-1) - chosen[..., 0]
    return jnp.sum(jnp.where(counted, losses, 0.0)), jnp.sum(counted).astype(jnp.float32)


def named_output(output: PyTree) -> PyTree:
    """A model's output, its arrays marked: from there on a mean over samples is looked for."""
    return jax.tree.map(
        lambda leaf: checkpoint_name(leaf, OUTPUT) if isinstance(leaf, jax.Array) else leaf, output
    )


def first_argument(microbatch: PyTree) -> tuple[Any, ...]:
    """The usual `inputs`: the microbatch's "inputs" alone."""
    return (microbatch["inputs"],)


def from_function(
    loss: LossFunction,
    parameters: PyTree,
    example: PyTree,
    *,
    blocks: str | Sequence[str],
    aliases: Aliases | None = None,
    numbers: Mapping[Layer, int] | None = None,
) -> Adapted:
    """Adapts a function of parameters and a microbatch.

    Args:
        loss: (parameters, microbatch) -> (summed loss, weight), scalars. If it draws random
            numbers, from the microbatch's leaf "key".
        parameters: any tree of arrays; integers and booleans among them are constants.
        example: one microbatch, arrays or shapes; a key need not be in it.
        blocks: where blocks are among the parameters, see `places`; one path a group of blocks.
        aliases: other paths of a leaf, by its path; what several blocks hold is theirs together.
        numbers: of another adaptation of the same parameters, whose kinds of blocks are kept.

    Raises:
        UsageError: if the model cannot be cut; says why.
    """
    paths = (blocks,) if isinstance(blocks, str) else tuple(blocks)
    if isinstance(example, Mapping) and KEY not in example:
        drawing = {**example, KEY: jax.eval_shape(lambda: jax.random.key(0))}
        adapter = _Adapter(loss, parameters, drawing, paths, aliases, numbers)
        if adapter.draws:
            return adapter.adapted()
    adapter = _Adapter(loss, parameters, example, paths, aliases, numbers)
    return adapter.adapted()


def with_evaluation(adapted: Adapted, evaluation: Adapted) -> Adapted:
    """A model that is evaluated as another adaptation of it is: without dropout.

    Raises:
        UsageError: if that one holds its parameters otherwise.
    """
    shapes = [
        jax.tree_util.tree_flatten_with_path(jax.tree.map(np.shape, one.parameters))
        for one in (adapted, evaluation)
    ]
    if shapes[0] != shapes[1] or adapted.model.pattern != evaluation.model.pattern:
        raise UsageError(
            "as it is evaluated, the model's blocks are alike in another way than in training; "
            "call it so that evaluation only switches random numbers off"
        )
    still = evaluation.model.evaluation or evaluation.model
    model = dataclasses.replace(adapted.model, evaluation=still)
    return dataclasses.replace(adapted, model=model)


class _Adapter:
    """One model; plans of it are made for each shape of microbatch, and kept."""

    def __init__(
        self,
        loss: LossFunction,
        parameters: PyTree,
        example: PyTree,
        paths: Sequence[str],
        aliases: Aliases | None,
        numbers: Mapping[Layer, int] | None,
    ) -> None:
        self.loss, self.example, self.numbers = loss, example, numbers
        self.mesh = jax.sharding.get_abstract_mesh()
        leaves, self.structure = jax.tree.flatten(parameters)
        self.leaves = _of_one_dtype(_as_arrays(leaves))
        whole = jax.tree.unflatten(self.structure, self.leaves)
        self.places: list[Place] = places(whole, paths, aliases)
        self.plans: dict[Any, CutProgram] = {}
        self.draws_if_known = False
        self.plan = self._plan(None, example)
        self.numbers = dict(zip(self.plan.layers, self.plan.pattern, strict=True))
        self.draws_if_known = self.draws
        self.members = self._kinds_of_roles()
        kind_of = {role: n for n, roles in enumerate(self.members) for role in roles}
        self.pattern = tuple(kind_of[role] for role in self.plan.pattern)
        self.kinds = [f"kind_{n}" for n in range(len(self.members))]
        if len(self.kinds) == 1:
            self.kinds = [ALIKE]

    def _kinds_of_roles(self) -> list[list[int]]:
        """The roles that each kind of the layered model has.

        One each, but all of a user's stack together: an optimizer's rule by rank, norm or shape
        must see it whole, as the user's own loop has it, so it is one stack here too.

        Raises:
            UsageError: if a stack's layers do not run in its order.
        """
        members = [[role] for role in range(len(self.plan.roles))]
        pattern = dict(zip(self.plan.layers, self.plan.pattern, strict=True))
        for place in {p.group: p for p in self.places if isinstance(p, Stack)}.values():
            ordered = [layer for layer in self.plan.layers if layer[0] == place.group]
            if ordered != sorted(ordered):
                raise UsageError(
                    f"the blocks of the stacked parameter {'/'.join(place.names)} do not run in "
                    "its order, so it cannot be kept as one array, and an optimizer that reads "
                    "ranks or norms would see another: hand over a list of blocks instead"
                )
            mine = sorted({pattern[layer] for layer in ordered})
            members = [roles for roles in members if roles[0] not in mine] + [mine]
        return sorted(members)

    @property
    def draws(self) -> bool:
        """Whether the loss depends on the example's key."""
        if not (isinstance(self.example, Mapping) and KEY in self.example):
            return False
        leaves = jax.tree_util.tree_flatten_with_path(self.example)[0]
        number = next(n for n, (path, _) in enumerate(leaves) if names_of(path) == (KEY,))
        return any(
            isinstance(value, BatchLeaf) and value.number == number
            for operation in self.plan.program.operations
            for value in operation.inputs
        )

    def adapted(self) -> Adapted:
        plan, draws = self.plan, self.draws

        def embed(edge: PyTree, microbatch: PyTree) -> PyTree:
            dtype, leaves = self._edge(edge)
            mine, flat, _ = self._planned(dtype, microbatch)
            return mine.embed(leaves, flat)

        def block(roles: Sequence[int]) -> Callable[..., PyTree]:
            first = roles[0]
            which = np.array([roles.index(n) if n in roles else 0 for n in plan.pattern], np.int32)

            def run(own: PyTree, x: PyTree, microbatch: PyTree, layer: LayerInfo) -> PyTree:
                leaves = {name: leaf_of(own, name) for name in plan.roles[first].kind.leaves}
                dtype = _compute_dtype(
                    [(leaf.dtype, dtypes[first][name]) for name, leaf in leaves.items()]
                )
                mine, flat, _ = self._planned(dtype, microbatch)
                if len(roles) == 1:
                    return mine.block(first)(leaves, x, flat, layer)
                branches = [
                    lambda leaves, x, n=n: mine.block(n)(leaves, x, flat, layer) for n in roles
                ]
                return jax.lax.switch(jnp.asarray(which)[layer.index], branches, leaves, x)

            return run

        def head_loss(divide: bool) -> Callable[..., tuple[Any, ...]]:
            def score(edge: PyTree, x: PyTree, microbatch: PyTree) -> tuple[Any, ...]:
                dtype, leaves = self._edge(edge)
                mine, flat, totals = self._planned(dtype, microbatch)
                outputs = mine.head(leaves, x, flat)
                loss, weight, *metrics = mine.sums.of(outputs, totals, divide)
                loss, weight = jnp.asarray(loss, jnp.float32), jnp.asarray(weight, jnp.float32)
                if not self.metrics:
                    return loss, weight
                return loss, weight, dict(zip(self.metrics, metrics, strict=True))

            return score

        def totals_in(number: int) -> Callable[[PyTree], list[Any]]:
            def totals(microbatch: PyTree) -> list[Any]:
                microbatch, found = _without_totals(microbatch)
                mine = self._plan(None, microbatch)
                return mine.totals(number, jax.tree.leaves(microbatch), found or ())

            return totals

        totals = tuple(totals_in(number) for number in range(plan.sums.rounds))

        shapes = self._shapes_of_layers(plan.program.stack_axes)
        dtypes = [
            {
                name: dtype
                for name, (_, dtype, *_) in shapes[plan.layers[role.stages[0] - 1]].items()
            }
            for role in plan.roles
        ]
        alike = len(self.kinds) == 1
        model = LayeredModel(
            embed=embed,
            block=block(self.members[0])
            if alike
            else {name: block(self.members[n]) for n, name in enumerate(self.kinds)},
            head_loss=head_loss(divide=False),
            layers=len(plan.layers),
            pattern=None if alike else tuple(self.kinds[n] for n in self.pattern),
            view=self._user_tree,
            draws=KEY if draws else None,
            totals=totals if plan.sums.needs else None,
        )
        if plan.sums.whole_weight is not None:
            # Evaluated, nothing is derived: batches then weigh as much as counts in them.
            model = dataclasses.replace(
                model, head_loss=head_loss(divide=True), totals=totals, evaluation=model
            )
        return Adapted(
            model=model,
            parameters=self._cut(),
            rebuild=self._rebuilt,
            draws=draws,
            numbers=self.numbers,
        )

    def _edge(self, edge: PyTree) -> tuple[Any, list[Any]]:
        leaves = [
            leaf_of(edge, place.names) if isinstance(place, Edge) else None for place in self.places
        ]
        dtypes = [
            (leaf.dtype, own.dtype)
            for leaf, own in zip(leaves, self.leaves, strict=True)
            if leaf is not None
        ]
        return _compute_dtype(dtypes), leaves

    def _plan(self, dtype: Any, microbatch: PyTree) -> CutProgram:
        if self.draws_if_known and KEY not in microbatch:
            raise UsageError(
                f"the model draws random numbers, but the batch has no leaf {KEY!r}: one key a "
                "microbatch, jaxsys.layered.microbatch_keys(step_key(key, step), trainer.rows)"
            )
        lacks = _check_batch(microbatch, self.example)
        leaves, structure = jax.tree.flatten(microbatch)
        shapes = [jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype) for leaf in leaves]
        key = (dtype, structure, tuple((s.shape, s.dtype) for s in shapes))
        if key not in self.plans:
            example = jax.tree.unflatten(structure, shapes)
            try:
                self.plans[key] = self._on_no_mesh(lambda: self._made(dtype, example))
            except (KeyError, IndexError, TypeError, ValueError) as error:
                if lacks is None or isinstance(error, UsageError):
                    raise
                raise UsageError(lacks) from error
        return self.plans[key]

    def _planned(
        self, dtype: Any, microbatch: PyTree
    ) -> tuple[CutProgram, list[Any], list[Any] | None]:
        """The plan for a microbatch; what its program reads of it, and totals of the whole batch.

        Raises:
            UsageError: see `_plan`.
        """
        microbatch, totals = _without_totals(microbatch)
        plan = self._plan(dtype, microbatch)
        return plan, plan.with_whole(jax.tree.leaves(microbatch), totals), totals

    def _on_no_mesh(self, make: Callable[[], CutProgram]) -> CutProgram:
        """Traces on no mesh: the caller's would be written into every operation's types.

        Where the model constrains shardings by the names of the mesh that it was adapted on, on
        automatic axes of these names; constraints themselves are left out.

        Raises:
            UsageError: if it does so on no mesh.
        """
        try:
            with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
                return make()
        except RuntimeError as error:
            if "non-empty mesh" not in str(error):
                raise
        if self.mesh.empty:
            raise UsageError(
                "the model constrains shardings by names of axes (with_sharding_constraint), and "
                "there is no mesh that has them; adapt it under jax.set_mesh, or leave the "
                "constraints out: a schedule lays arrays out itself"
            )
        types = (jax.sharding.AxisType.Auto,) * len(self.mesh.axis_names)
        automatic = jax.sharding.AbstractMesh(self.mesh.axis_sizes, self.mesh.axis_names, types)
        with jax.sharding.use_abstract_mesh(automatic):
            return make()

    def _made(self, dtype: Any, microbatch: PyTree) -> CutProgram:
        avals, values = [], []
        for number, (place, leaf) in enumerate(zip(self.places, self.leaves, strict=True)):
            if isinstance(place, Fixed):
                continue
            aval = ShapedArray(np.shape(leaf), dtype or leaf.dtype)
            avals.append(jax.ShapeDtypeStruct(aval.shape, aval.dtype))
            values.append(_value(place, aval, number))

        def whole(leaves: Sequence[Any], microbatch: PyTree) -> Any:
            given = iter(leaves)
            mine = [
                next(given) if not isinstance(place, Fixed) else _as_it_is(leaf)
                for place, leaf in zip(self.places, self.leaves, strict=True)
            ]
            return self._outputs(self.loss(jax.tree.unflatten(self.structure, mine), microbatch))

        program = trace(whole, values, avals, microbatch)
        sums = sums_of(
            program,
            microbatch,
            lambda m: trace(whole, values, avals, m),
            mean=self.mean,
            key=(KEY,),
        )
        layers = sorted(
            {(p.group, p.number) for p in self.places if isinstance(p, InBlock)}
            | {(g, n) for g, length in program.lengths.items() for n in range(length)}
        )
        for place in self.places:
            if isinstance(place, Stack) and place.group not in program.lengths:
                raise UsageError(
                    f"the blocks' parameters ({'/'.join(place.names)}, ...) are neither numbered "
                    "nor taken apart by a scan over layers"
                )
        shapes = self._shapes_of_layers(program.stack_axes)
        try:
            plan = CutProgram(program, layers, shapes, self.numbers)
        except UsageError:
            if program.whole is None:
                raise
            raise UsageError(program.whole) from None
        if program.whole is not None and not all(plan.stages.segments):
            raise UsageError(program.whole)  # all would run in the last block
        plan.sums = sums
        if self.plans and plan.pattern != self.plan.pattern:
            raise UsageError(
                "with microbatches of this shape other blocks are alike than with the example's: "
                f"kinds {plan.pattern} and {self.plan.pattern}"
            )
        return plan

    def _outputs(self, result: Any) -> Any:
        """The loss function's result as (loss, weight or None, metrics); see `LossFunction`."""
        loss, weight, metrics = result, None, {}
        if isinstance(result, tuple):
            loss, *rest = result
            if len(rest) == 1 and isinstance(rest[0], tuple):
                rest = list(rest[0])
            if rest and isinstance(rest[-1], Mapping):
                metrics = dict(rest.pop())
            if len(rest) > 1:
                raise UsageError(f"loss returned {len(result)} values; {FORMS}")
            weight = rest[0] if rest else None
        scalars = {"loss": loss, "weight": 0.0 if weight is None else weight, **metrics}
        for name, value in scalars.items():
            if not isinstance(value, int | float) and np.shape(value) != ():
                raise UsageError(f"loss returned {name} of shape {np.shape(value)}; {FORMS}")
        values = [jnp.asarray(value, jnp.float32) for value in scalars.values()]
        self.metrics = tuple(metrics)
        self.mean = weight is None
        return values

    def _shapes_of_layers(
        self, axes: dict[tuple[int, Names], int]
    ) -> dict[Layer, dict[Names, Any]]:
        """Layer -> name -> (shape, dtype) of its parameters."""
        found: dict[Layer, dict[Names, Any]] = {}
        for place, leaf in zip(self.places, self.leaves, strict=True):
            shape = np.shape(leaf)
            if isinstance(place, InBlock):
                here = found.setdefault((place.group, place.number), {})
                here[place.names] = (shape, str(leaf.dtype))
            elif isinstance(place, Stack):
                axis = axes.get((place.group, place.names), 0)
                rest = shape[:axis] + shape[axis + 1 :]
                for number in range(shape[axis]):
                    here = found.setdefault((place.group, number), {})
                    # With its group: blocks of two stacks are never one kind.
                    here[place.names] = (rest, str(leaf.dtype), place.group)
        return found

    def _cut(self) -> Parameters:
        """The user's parameters in a layered model's form; copies, never the user's arrays."""
        edge: dict[Names, Any] = {}
        layers: dict[Layer, dict[Names, Any]] = {layer: {} for layer in self.plan.layers}
        for place, leaf in zip(self.places, self.leaves, strict=True):
            if isinstance(place, Edge):
                edge[place.names] = jnp.array(leaf, copy=True)
            elif isinstance(place, InBlock):
                layers[place.group, place.number][place.names] = leaf
            elif isinstance(place, Stack):
                axis = self.plan.program.stack_axes.get((place.group, place.names), 0)
                for layer in self.plan.layers:
                    if layer[0] == place.group:
                        layers[layer][place.names] = jnp.take(leaf, layer[1], axis=axis)
        stacks = {}
        for number, kind in enumerate(self.kinds):
            members = [
                layers[layer]
                for layer, mine in zip(self.plan.layers, self.pattern, strict=True)
                if mine == number
            ]
            stacks[kind] = nested(
                {name: _stacked([member[name] for member in members]) for name in members[0]}
            )
        blocks = stacks[ALIKE] if len(self.kinds) == 1 else stacks
        return {"edge": nested(edge), "blocks": blocks}

    def _rebuilt(self, parameters: Parameters) -> PyTree:
        """Parameters of the layered model as the user's own tree."""
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(parameters)):
            return self._in_own_tree(parameters)
        return on_automatic_axes(self._in_own_tree, parameters)

    def _in_own_tree(self, parameters: Parameters) -> PyTree:
        # Not by way of the tree: it may hold a None of the user's own.
        leaves = self._user_leaves(parameters, jnp.stack)
        leaves = [
            own if leaf is None else leaf for own, leaf in zip(self.leaves, leaves, strict=True)
        ]
        return jax.tree.unflatten(self.structure, leaves)

    def _user_tree(self, parameters: Any) -> PyTree:
        """Parameters of the layered model in the user's tree; None for what is no parameter."""
        return jax.tree.unflatten(self.structure, self._user_leaves(parameters))

    def _user_leaves(self, parameters: Any, stack: Callable[..., Any] | None = None) -> list[Any]:
        """Leaves of the user's tree, in its order; None for what is no parameter.

        Without `stack`, which puts layers together, it only places leaves and indexes layers: a
        stacked leaf is then as the layered model holds it, see `_kinds_of_roles`.
        """
        places_of: dict[Layer, tuple[str, int]] = {}
        counts = dict.fromkeys(range(len(self.kinds)), 0)
        for layer, number in zip(self.plan.layers, self.pattern, strict=True):
            places_of[layer] = (self.kinds[number], counts[number])
            counts[number] += 1
        blocks = parameters["blocks"]
        stacks = {ALIKE: blocks} if len(self.kinds) == 1 else blocks

        def own(layer: Layer, names: Names) -> Any:
            kind, row = places_of[layer]
            return leaf_of(stacks[kind], names)[row]

        leaves: list[Any] = []
        for place in self.places:
            if isinstance(place, Fixed):
                leaves.append(None)
            elif isinstance(place, Edge):
                leaves.append(leaf_of(parameters["edge"], place.names))
            elif isinstance(place, InBlock):
                leaves.append(own((place.group, place.number), place.names))
            else:
                mine = sorted(layer for layer in self.plan.layers if layer[0] == place.group)
                if stack is not None:
                    axis = self.plan.program.stack_axes.get((place.group, place.names), 0)
                    leaves.append(stack([own(layer, place.names) for layer in mine], axis=axis))
                else:
                    (kind,) = {places_of[layer][0] for layer in mine}
                    leaves.append(leaf_of(stacks[kind], place.names))
        return leaves


def _stacked(layers: list[Any]) -> Any:
    """Layers of one leaf in one array; explicit axes do not mix such as lie in unlike ways."""
    if len({getattr(layer, "sharding", None) for layer in layers}) == 1:
        return jnp.stack(layers)
    return on_automatic_axes(jnp.stack, without_axis_types(layers))


def _without_totals(microbatch: PyTree) -> tuple[PyTree, list[Any] | None]:
    """A microbatch as the user's batches have it, and what is known of the whole batch."""
    if not isinstance(microbatch, Mapping) or TOTALS not in microbatch:
        return microbatch, None
    own = {name: leaf for name, leaf in microbatch.items() if name != TOTALS}
    return own, jax.tree.leaves(microbatch[TOTALS])


def _check_batch(microbatch: PyTree, example: PyTree) -> str | None:
    """What is said if it turns out that a microbatch lacks what the example has.

    Raises:
        UsageError: if its leaves have other ranks.
    """
    ranks = [
        {names_of(path): np.ndim(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (microbatch, example)
    ]
    lacks = None
    for names, rank in ranks[1].items():
        name, mine = ".".join(names) or "the batch", ranks[0].get(names)
        if names == (KEY,):  # raw keys have an axis more
            continue
        if mine is None:
            have = ", ".join(".".join(names) for names in ranks[0])
            lacks = f"the batch has no leaf {name}, which the example has; it has {have or 'none'}"
        elif mine != rank:
            raise UsageError(
                f"a microbatch's leaf {name} has {mine} axes, the example's {rank}: a batch is "
                "leaves [rows, B, ...], as Trainer.split or Batches cut it"
            )
    return lacks


def _as_arrays(leaves: list[Any]) -> list[Any]:
    """The leaves; numbers of Python's that have a gradient as arrays."""
    return [np.float32(leaf) if isinstance(leaf, float) else leaf for leaf in leaves]


def _as_it_is(leaf: Any) -> Any:
    """A constant as a loss gets it; a number, a name or a function of Python's stays one."""
    return jnp.asarray(leaf) if is_array(leaf) else leaf


def _of_one_dtype(leaves: list[Any]) -> list[Any]:
    """The leaves, floats of several dtypes as float32: masters are, and all compute in one.

    Raises:
        UsageError: if there are complex ones.
    """
    kinds = {leaf.dtype for leaf in leaves if trains(leaf)}
    if any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in kinds):
        raise UsageError(
            "there are complex parameters, which no schedule moves; hold their real and imaginary "
            "parts as two leaves and put them together in the model (lax.complex)"
        )
    if len(kinds) < 2:
        return leaves
    return [jnp.asarray(leaf, jnp.float32) if trains(leaf) else leaf for leaf in leaves]


def _value(place: Place, aval: Any, number: int) -> Value:
    """What a leaf is to a program."""
    if isinstance(place, InBlock):
        layer = (place.group, place.number)
        return BlockLeaf(
            aval=aval,
            depends=True,
            late=True,
            pure=frozenset([(*layer, place.names)]),
            layer=layer,
            name=place.names,
        )
    if isinstance(place, Stack):
        return StackedLeaf(aval=aval, depends=True, late=True, group=place.group, name=place.names)
    return EdgeLeaf(aval=aval, depends=True, number=number)


def _compute_dtype(dtypes: Sequence[tuple[Any, Any]]) -> Any:
    """The dtype that parameters are computed in, None for their own: from (given, own) pairs."""
    if all(given == own for given, own in dtypes):
        return None
    return jnp.dtype(dtypes[0][0])
