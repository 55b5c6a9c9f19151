"""The trainer against one device without a schedule, under several schedules and faults."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsys import strategies
from jaxsys.errors import RunError, UsageError
from jaxsys.layered import Parameters, reference_loss
from jaxsys.mesh import make_mesh
from jaxsys.model import initial_parameters, layered, preset
from jaxsys.train import Compute, Trainer, Updates
from jaxsys.train.checkpoint import CheckpointStore

ROWS, SIZE, TOKENS = 4, 2, 6


def batch_of(seed: int, *, rows: int = ROWS, vocabulary: int = 16) -> dict[str, np.ndarray]:
    """A random batch in which a fifth of the targets do not count."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocabulary, (rows, SIZE, TOKENS + 1)).astype(np.int32)
    targets = np.where(rng.random((rows, SIZE, TOKENS)) < 0.2, -1, tokens[..., 1:])
    return {"inputs": tokens[..., :-1], "targets": targets.astype(np.int32)}


def plain_steps(model, parameters, optimizer, batches, *, clip_norm):
    """The reference: value_and_grad and optax on one device."""
    parameters = jax.tree.map(jnp.asarray, parameters)
    chain = optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)
    state = chain.init(parameters)
    losses = []

    @jax.jit
    def step(parameters, state, batch):
        loss, gradients = jax.value_and_grad(lambda p: reference_loss(model, p, batch))(parameters)
        updates, state = chain.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, loss

    for batch in batches:
        parameters, state, loss = step(parameters, state, batch)
        losses.append(float(loss))
    return parameters, losses


def relative_error(found, wanted) -> float:
    """Largest difference of a leaf, relative to the leaf's largest value."""
    return float(np.max(np.abs(np.asarray(found) - np.asarray(wanted)))) / (
        float(np.max(np.abs(np.asarray(wanted)))) + 1e-30
    )


QUICK = [("weipipe-interleave", 4, 1), ("weipipe-interleave", 2, 2), ("1f1b", 2, 1)]
EVERY = [
    pytest.param("dp", 4, 1, marks=pytest.mark.slow),
    *(pytest.param(name, 2, 1, marks=pytest.mark.slow) for name in strategies.NAMES),
]


@pytest.mark.parametrize(("schedule", "ring", "data"), [*QUICK, *EVERY])
def test_fifty_steps_follow_one_device(small_model, small_parameters, schedule, ring, data):
    batches = [batch_of(i % 2) for i in range(50)]  # so that there is something to learn
    wanted, losses = plain_steps(
        small_model, small_parameters, optax.adamw(1e-2), batches, clip_norm=0.05
    )
    trainer = Trainer(
        small_model,
        small_parameters,
        optax.adamw(1e-2),
        schedule=schedule,
        mesh=make_mesh(ring, data, devices=jax.devices()[: ring * data]),
        microbatches=ROWS // data,
        clip_norm=0.05,
    )
    found = [float(trainer.step(batch).loss) for batch in batches]
    assert losses[-1] < 0.9 * losses[0]
    np.testing.assert_allclose(found[:3], losses[:3], rtol=1e-5)
    # Adam divides by the root of the second moment: rounding of small gradients is magnified.
    np.testing.assert_allclose(found, losses, rtol=1e-4)
    errors = jax.tree.map(relative_error, trainer.parameters(), wanted)
    assert max(jax.tree.leaves(errors)) < 1e-3, errors
    assert trainer.step_number == 50


def test_layers_written_out_change_the_program_and_no_number(small_model, small_parameters):
    batch = batch_of(0)
    found, products = [], []
    for unroll in (False, True):
        trainer = Trainer(
            small_model, small_parameters, optax.sgd(0.1), schedule="dp", devices=1,
            microbatches=ROWS, unroll=unroll,
        )  # fmt: skip
        step: Any = trainer._step
        compiled = step.lower(trainer.state, trainer.place(batch)).compile()
        products.append(compiled.as_text().count(" dot("))
        state, result = compiled(trainer.state, trainer.place(batch))
        found.append((float(result.loss), jax.device_get(state.parameters)))
    looped, written_out = products
    assert written_out >= looped + 2 * (small_model.layers - 1)
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    errors = jax.tree.map(relative_error, found[0][1], found[1][1])
    assert max(jax.tree.leaves(errors)) < 1e-6, errors


def test_every_gradient_leaf_of_the_decoder_equals_one_device():
    config = replace(preset("tiny"), num_layers=3)
    model = layered(config, loss_chunk_tokens=8)
    parameters = initial_parameters(config)
    batch = batch_of(0, vocabulary=256)
    wanted_loss, wanted = jax.jit(jax.value_and_grad(lambda p: reference_loss(model, p, batch)))(
        parameters
    )
    trainer = Trainer(model, parameters, optax.sgd(1.0), devices=2, microbatches=ROWS)
    loss, gradients = trainer.loss_and_gradients(batch)
    assert loss == pytest.approx(float(wanted_loss), rel=1e-5)
    assert jax.tree.structure(gradients) == jax.tree.structure(wanted)
    errors = jax.tree.map(relative_error, gradients, wanted)
    assert max(jax.tree.leaves(errors)) < 1e-5, errors


def test_layers_that_do_not_fill_the_last_chunk(small_model, small_parameters):
    batches = [batch_of(i, rows=6) for i in range(2)]
    wanted, losses = plain_steps(
        small_model, small_parameters, optax.adam(1e-2), batches, clip_norm=1e9
    )
    trainer = Trainer(
        small_model, small_parameters, optax.adam(1e-2), devices=3, microbatches=6
    )  # 4 layers on 3 devices: 2 + 2 + 0, padded at rest
    found = [float(trainer.step(batch).loss) for batch in batches]
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    errors = jax.tree.map(relative_error, trainer.parameters(), wanted)
    assert max(jax.tree.leaves(errors)) < 1e-4, errors


@pytest.mark.parametrize(("ring", "data"), [(4, 1), (4, 2), (1, 1), (3, 1)])
def test_evaluate_is_the_mean_loss_and_changes_nothing(small_model, small_parameters, ring, data):
    mesh = make_mesh(ring, data, devices=jax.devices()[: ring * data])
    # 4 rows on 8 or 3 devices: some are padded.
    trainer = Trainer(
        small_model, small_parameters, optax.sgd(0.1), schedule="gpipe" if ring > 1 else "dp",
        mesh=mesh, microbatches=4 // data,
    )  # fmt: skip
    batches = [batch_of(i) for i in range(2)]
    both = jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)
    wanted = reference_loss(small_model, small_parameters, both)
    assert trainer.evaluate(batches) == pytest.approx(float(wanted), rel=1e-5)
    assert trainer.step_number == 0


def test_parameters_may_be_made_on_the_devices(small_model, small_parameters):
    trainer = Trainer(
        small_model,
        lambda: jax.tree.map(jnp.asarray, small_parameters),
        optax.sgd(0.1),
        devices=2,
        microbatches=4,
    )
    for found, wanted in zip(
        jax.tree.leaves(trainer.parameters()), jax.tree.leaves(small_parameters), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)


def poisoned(model):
    """The model, with a loss that is not a number where a batch says so."""

    def head_loss(edge, x, microbatch):
        loss, weight = model.head_loss(edge, x, microbatch)
        return loss + jnp.where(jnp.any(microbatch["inputs"] == 15), jnp.nan, 0.0), weight

    return type(model)(
        embed=model.embed, block=model.block, head_loss=head_loss, layers=model.layers
    )


@pytest.fixture
def clean_and_bad():
    clean = batch_of(0)
    clean["inputs"] %= 15
    bad = {**clean, "inputs": clean["inputs"].copy()}
    bad["inputs"][1, 0, 0] = 15
    return clean, bad


def test_non_finite_loss_skips_with_a_count(small_model, small_parameters, clean_and_bad):
    clean, bad = clean_and_bad
    trainer = Trainer(
        poisoned(small_model), small_parameters, optax.adam(0.1), devices=2, microbatches=4,
        non_finite="skip",
    )  # fmt: skip
    report = trainer.fit([clean, bad, clean], steps=3, progress=False)
    wanted, losses = plain_steps(
        small_model, small_parameters, optax.adam(0.1), [clean, clean], clip_norm=1e9
    )
    assert (report.step, report.skipped) == (3, 1)
    np.testing.assert_allclose([report.losses[0], report.losses[2]], losses, rtol=1e-5)
    errors = jax.tree.map(relative_error, trainer.parameters(), wanted)
    assert max(jax.tree.leaves(errors)) < 1e-4, errors


def test_non_finite_loss_stops_with_the_state_before_it(
    small_model, small_parameters, clean_and_bad
):
    clean, bad = clean_and_bad
    trainer = Trainer(
        poisoned(small_model), small_parameters, optax.sgd(0.1), devices=2, microbatches=4
    )
    with pytest.raises(RunError, match=r"step 2: loss nan.*nothing was updated since step 1"):
        trainer.fit([clean, bad, clean, clean], steps=4, progress=False)
    wanted, _ = plain_steps(small_model, small_parameters, optax.sgd(0.1), [clean], clip_norm=1e9)
    errors = jax.tree.map(relative_error, trainer.parameters(), wanted)
    assert max(jax.tree.leaves(errors)) < 1e-5, errors


def test_schedule_may_be_a_schedule_or_a_file(small_model, small_parameters, tmp_path):
    schedule = strategies.build("dp", devices=2, microbatches=4)
    path = tmp_path / "plan.json"
    path.write_text(schedule.to_json())
    for given in (schedule, path, str(path)):
        trainer = Trainer(small_model, small_parameters, optax.sgd(0.1), schedule=given, devices=2)
        assert trainer.schedule == schedule


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"schedule": "magic", "devices": 2}, "schedule 'magic' is not known; use dp"),
        ({"schedule": "none.json", "devices": 2}, "none.json cannot be read"),
        ({"devices": 64}, "devices=64, but 8 cpu"),
        ({"devices": 4, "microbatches": 6}, "microbatches=6 must be a positive multiple of"),
        ({"devices": 2, "clip_norm": 0.0}, "clip_norm=0.0 must be above 0"),
        ({"devices": 2, "non_finite": "hope"}, "'stop' or 'skip'"),
    ],
)
def test_bad_requests(small_model, small_parameters, options, says):
    with pytest.raises(UsageError, match=says):
        Trainer(small_model, small_parameters, optax.sgd(0.1), **options)


def test_an_optimizer_by_its_name(small_model, small_parameters):
    name: Any = "adam"
    with pytest.raises(UsageError, match="the optimizer is 'adam'; give a transformation of optax"):
        Trainer(small_model, small_parameters, name)


def test_a_batch_of_other_length(small_model, small_parameters):
    trainer = Trainer(small_model, small_parameters, optax.sgd(0.1), devices=2, microbatches=4)
    with pytest.raises(UsageError, match=r"first axis must be the 4 microbatches"):
        trainer.step(batch_of(0, rows=3))


@pytest.mark.slow
def test_parameters_and_batches_on_explicit_axes(small_model, small_parameters):
    """`jax.make_mesh` types its axes, and `jax.set_mesh` every operation: none of it reaches in."""
    plain = Trainer(small_model, small_parameters, optax.sgd(0.1), devices=2, schedule="zero-3")
    batch = batch_of(0)
    wanted = [float(plain.step(batch).loss), plain.evaluate([batch])]
    typed = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    where = jax.sharding.NamedSharding(typed, jax.sharding.PartitionSpec("x"))
    given, placed = jax.device_put((small_parameters, batch), where)
    for parameters in (given, lambda: given, small_parameters):
        with jax.set_mesh(typed):
            trainer = Trainer(small_model, parameters, optax.sgd(0.1), devices=2, microbatches=ROWS)
            found = [float(trainer.step(placed).loss), trainer.evaluate([placed])]
            assert jax.sharding.get_abstract_mesh().axis_names == ("x",)
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    np.testing.assert_array_equal(given["edge"]["table"], small_parameters["edge"]["table"])


def test_arrays_handed_over_stay_the_callers(small_model, small_parameters):
    """Placed already where and as the schedule rests them, and donated by every step."""
    for schedule in ("zero-3", "dp"):
        first = Trainer(small_model, small_parameters, optax.sgd(0.1), devices=1, schedule=schedule)
        given = first.state.parameters
        trainer = Trainer(small_model, given, optax.sgd(0.1), devices=1, schedule=schedule)
        trainer.step(batch_of(0, rows=trainer.rows))
        np.testing.assert_array_equal(given["edge"]["table"], small_parameters["edge"]["table"])


def test_a_buffer_may_be_filled_anew_once_a_step_has_begun(small_model, small_parameters):
    """CPU devices share memory that begins at a multiple of 64 bytes, unless it is copied."""
    trainer = Trainer(small_model, small_parameters, optax.sgd(0.1), devices=1, schedule="dp")
    wanted = batch_of(0, rows=trainer.rows)
    buffer = {}
    for name, leaf in wanted.items():
        memory = np.empty(leaf.nbytes + 64, np.uint8)
        start = -memory.ctypes.data % 64
        buffer[name] = memory[start : start + leaf.nbytes].view(leaf.dtype).reshape(leaf.shape)
        buffer[name][:] = leaf
    placed, spread = trainer.place(buffer), trainer._spread(buffer)
    for leaf in buffer.values():
        leaf[:] = 0
    for there in (placed, spread):
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(there), wanted)


def test_constants_among_the_parameters_stay(small_model, small_parameters):
    """Integers and booleans have no gradient, no optimizer state and no decay."""
    numbers = np.arange(4, dtype=np.int32) + 1
    parameters = Parameters(
        edge={**small_parameters["edge"], "on": np.array([True, False])},
        blocks={**small_parameters["blocks"], "number": numbers},
    )
    trainer = Trainer(
        small_model, parameters, optax.adamw(0.1, weight_decay=0.5), devices=2, schedule="dp"
    )
    plain = Trainer(
        small_model, small_parameters, optax.adamw(0.1, weight_decay=0.5), devices=2,
        schedule="dp",
    )  # fmt: skip
    batch = batch_of(0)
    for _ in range(2):
        assert float(trainer.step(batch).loss) == float(plain.step(batch).loss)
    found = trainer.parameters()
    np.testing.assert_array_equal(found["blocks"]["number"], numbers)
    np.testing.assert_array_equal(found["edge"]["on"], [True, False])
    state = jax.tree.leaves(trainer.optimizer_state())
    assert {leaf.dtype for leaf in state if leaf.ndim} == {np.dtype(np.float32)}


@pytest.mark.slow
def test_averages_of_parameters_are_kept_saved_and_evaluated(
    small_model, small_parameters, tmp_path
):
    def made(**options):
        return Trainer(
            small_model, small_parameters, optax.sgd(0.5), schedule="weipipe-interleave",
            devices=2, microbatches=ROWS, **options,
        )  # fmt: skip

    trainer = made(average_decay=0.75)
    wanted = jax.tree.map(jnp.asarray, small_parameters)
    batches = [batch_of(i) for i in range(3)]
    for batch in batches:
        trainer.step(batch)
        now = trainer.parameters()
        wanted = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, wanted, now)
    found = trainer.parameters(averaged=True)
    errors = jax.tree.map(relative_error, found, wanted)
    assert max(jax.tree.leaves(errors)) < 1e-6, errors
    assert trainer.evaluate(batches, averaged=True) != trainer.evaluate(batches)

    store = CheckpointStore(tmp_path, notice=lambda _: None)
    trainer.save(store)
    store.wait()
    again = made(average_decay=0.75)
    assert again.restore(store, notice=lambda _: None) == 3
    jax.tree.map(np.testing.assert_array_equal, again.parameters(averaged=True), found)
    with pytest.raises(UsageError, match="average_decay"):
        made().restore(store, notice=lambda _: None)
    store.close()
    with pytest.raises(UsageError, match="no average is kept"):
        made().parameters(averaged=True)


def test_a_step_of_ones_own_around_loss_and_gradients(small_model, small_parameters):
    def own(parts, state, batch):
        loss, gradients, _, metrics = parts.loss_and_gradients(state.parameters, batch)
        gradients = jax.tree.map(lambda g: g / loss, gradients)
        parameters, optimizer = parts.update(gradients, state.optimizer, state.parameters)
        metrics = {**metrics, "log_loss": jnp.log(loss)}
        return parts.finish(state, parameters, optimizer, loss, gradients, metrics)

    def made(step):
        return Trainer(
            small_model, small_parameters, optax.sgd(0.5), devices=2, schedule="dp",
            custom_step=step,
        )  # fmt: skip

    trainer, batch = made(own), batch_of(0)
    loss, gradients = trainer.loss_and_gradients(batch)
    result = trainer.step(batch)
    assert float(result.metrics["log_loss"]) == pytest.approx(np.log(loss), rel=1e-6)
    wanted = jax.tree.map(lambda p, g: p - 0.5 * g / loss, small_parameters, gradients)
    errors = jax.tree.map(relative_error, trainer.parameters(), wanted)
    assert max(jax.tree.leaves(errors)) < 1e-6, errors
    for wrong, message in (
        (lambda parts, state, batch: (state, 1.0), "float beside the state"),
        (lambda parts, state, batch: (state.step, own(parts, state, batch)[1]), "structure"),
    ):
        with pytest.raises(UsageError, match=message):
            made(wrong).step(batch)


def test_evaluation_takes_batches_of_another_cut(small_model, small_parameters):
    trainer = Trainer(small_model, small_parameters, optax.sgd(0.1), devices=2, schedule="dp")
    batch = batch_of(0, rows=3)
    cuts = [
        batch,
        jax.tree.map(lambda leaf: leaf.reshape(1, 3 * SIZE, TOKENS), batch),
        jax.tree.map(lambda leaf: leaf.reshape(3 * SIZE, 1, TOKENS), batch),
        jax.tree.map(jnp.asarray, batch),
    ]
    wanted = float(reference_loss(small_model, small_parameters, batch))
    for cut in cuts:
        assert trainer.evaluate([cut]) == pytest.approx(wanted, rel=1e-6)
    uneven = {"inputs": batch["inputs"], "targets": batch["targets"][:2]}
    with pytest.raises(UsageError, match="one leading axis"):
        trainer.evaluate([uneven])


def test_options_by_group_or_by_name(small_model, small_parameters):
    grouped = Trainer(
        small_model, small_parameters, optax.sgd(0.1), devices=1, schedule="dp",
        compute=Compute(recompute="none"), updates=Updates(clip_norm=2.0), non_finite="skip",
    )  # fmt: skip
    assert (grouped.recompute, grouped.non_finite) == ("none", "skip")
    assert grouped._settings == {"clip_norm": 2.0}
    with pytest.raises(TypeError, match="unknown options clip_normal; there are .*compute_dtype"):
        Trainer(small_model, small_parameters, optax.sgd(0.1), clip_normal=1.0)
