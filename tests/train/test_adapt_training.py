"""Adapted models under schedules: the plain loop's losses, and draws that no schedule changes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from jaxsys.errors import UsageError
from jaxsys.train import Trainer, from_linen, from_nnx

V, D, T = 16, 8, 4


def batches(count: int = 1) -> list[dict[str, np.ndarray]]:
    tokens = np.random.default_rng(1).integers(0, V, (count, 8, T + 1)).astype(np.int32)
    return [{"inputs": batch[:, :-1], "targets": batch[:, 1:]} for batch in tokens]


class Dropping(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(D, D, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(nnx.tanh(self.inner(x)))


class Model(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.table = nnx.Embed(V, D, rngs=rngs)
        self.blocks = nnx.List([Dropping(rngs) for _ in range(4)])

    def __call__(self, tokens):
        x = self.table(tokens)
        for block in self.blocks:
            x = block(x)
        return self.table.attend(x)


def mean_loss(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()


@pytest.mark.slow
def test_draws_and_evaluation_are_the_same_under_every_schedule():
    example = {name: leaf[:1] for name, leaf in batches()[0].items()}
    adapted = from_nnx(Model(), example, blocks="blocks", loss=mean_loss)

    def trained(schedule: str, devices: int) -> list[float]:
        trainer = Trainer(
            adapted.model,
            adapted.parameters,
            optax.sgd(0.1),
            schedule=schedule,
            devices=devices,
            microbatches=8,
            seed=3,
        )
        batch = trainer.split(batches()[0])
        if schedule == "dp":
            found = trainer.evaluate([batch])
            assert found == pytest.approx(float(mean_loss(logits, batches()[0])), rel=1e-6)
        return [float(trainer.step(batch).loss) for _ in range(2)]

    still = Model()
    still.eval()
    logits = still(batches()[0]["inputs"])
    found = trained("weipipe-interleave", 4)
    np.testing.assert_allclose(trained("dp", 2), found, rtol=2e-6)
    assert abs(found[0] - found[1]) > 1e-3  # masks differ from step to step


def test_a_model_that_is_not_taken_apart_is_told_how():
    with pytest.raises(UsageError, match="the model is a Model; take it apart first: from_nnx"):
        Trainer(Model(), None, optax.sgd(0.1), devices=1)  # type: ignore[arg-type]


class Local(linen.Module):
    """Attention to the last two tokens where it is local."""

    local: bool

    @linen.compact
    def __call__(self, x, bias):
        distance = jnp.arange(T)[:, None] - jnp.arange(T)[None]
        mask = (distance >= 0) & (distance < 2) if self.local else distance >= 0
        h = linen.LayerNorm()(x)
        scores = h @ jnp.swapaxes(h, 1, 2) + bias[None]
        weights = jax.nn.softmax(jnp.where(mask[None], scores, -1e9))
        x = x + linen.Dense(D)(weights @ h)
        if self.local:
            return x + linen.Dense(D)(jnp.tanh(linen.Dense(2 * D)(x)))
        gates = jax.nn.softmax(linen.Dense(2)(x))
        self.sow("losses", "balance", jnp.mean(jnp.square(gates)))
        return x + gates[..., :1] * linen.Dense(D)(x)


class Mixed(linen.Module):
    """Local blocks, global ones with gates between, a remainder, and one bias for all."""

    @linen.compact
    def __call__(self, tokens):
        table = linen.Embed(V, D)
        bias = self.param("bias", linen.initializers.normal(), (T, T))
        x = table(tokens)
        skip = jnp.zeros_like(x)
        for index in range(5):
            x = linen.remat(Local)(index % 3 != 2, name=f"block_{index}")(x, bias)
            skip = skip + x
        return table.attend(linen.LayerNorm()(x + 0.1 * skip))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["weipipe-interleave", "1f1b", "zero-3", "zb-h1", "dp"])
def test_twenty_steps_of_a_mixed_model(schedule):
    """Kinds, a shared bias, sown losses, skips to the head and remat at once."""
    module, data = Mixed(), batches(20)
    variables = {"params": module.init(jax.random.key(0), data[0]["inputs"])["params"]}

    def loss(output, batch):
        logits, sown = output
        return mean_sum(logits, batch, sum(jax.tree.leaves(sown)))

    def mean_sum(logits, batch, extra):
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return jnp.sum(each) + each.size * extra, jnp.float32(each.size)

    example = {name: leaf[:1] for name, leaf in data[0].items()}
    adapted = from_linen(module, variables, example, blocks="block_", loss=loss, mutable=["losses"])
    trainer = Trainer(
        adapted.model,
        adapted.parameters,
        optax.adam(1e-3),
        schedule=schedule,
        devices=4,
        microbatches=8,
    )
    optimizer = optax.adam(1e-3)

    @jax.jit
    def plain(params, state, batch):
        def whole(params):
            total, weight = loss(
                module.apply({"params": params}, batch["inputs"], mutable=["losses"]), batch
            )
            return total / weight

        value, gradients = jax.value_and_grad(whole)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    params = variables["params"]
    state = optimizer.init(params)
    for batch in data:
        params, state, wanted = plain(params, state, batch)
        found = float(trainer.step(trainer.split(batch)).loss)
        assert found == pytest.approx(float(wanted), abs=2e-6 * max(1, abs(found)))


def example_of(batch):
    return {name: leaf[:1] for name, leaf in batch.items()}


@pytest.mark.slow
def test_a_resumed_run_draws_and_averages_what_an_unbroken_one_does(tmp_path):
    """Saved on a ring of four, gone on with in a pipeline of two: the same masks, the same mean."""
    data = batches(4)
    adapted = from_nnx(Model(), example_of(data[0]), blocks="blocks", loss=mean_loss)

    def made(schedule: str, devices: int) -> Trainer:
        return Trainer(
            adapted.model,
            adapted.parameters,
            optax.adam(1e-2),
            schedule=schedule,
            devices=devices,
            microbatches=8,
            average_decay=0.9,
            seed=7,
        )

    def run(trainer: Trainer, **options: object) -> list[float]:
        cut = [trainer.split(batch) for batch in data]
        return list(trainer.fit(cut, steps=4, progress=False, **options).losses)

    unbroken = made("dp", 2)
    wanted = run(unbroken)
    first = run(made("weipipe-interleave", 4), folder=tmp_path / "run", stop_at=2)
    resumed = made("1f1b", 2)
    last = run(resumed, folder=tmp_path / "run", resume=True)
    np.testing.assert_allclose([*first, *last], wanted, rtol=2e-6)
    for averaged in (False, True):
        found, whole = (t.host_parameters(averaged=averaged) for t in (resumed, unbroken))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), found, whole)


@pytest.mark.slow
def test_batches_of_any_cut_are_evaluated_without_draws():
    data = batches(1)[0]
    adapted = from_nnx(Model(), example_of(data), blocks="blocks", loss=mean_loss)
    trainer = Trainer(
        adapted.model, adapted.parameters, optax.adam(1e-2), schedule="zero-3", devices=2
    )
    still = Model()
    still.eval()
    wanted = float(mean_loss(still(data["inputs"]), data))
    for rows in (1, 2, 8):
        cut = {name: leaf.reshape(rows, -1, *leaf.shape[1:]) for name, leaf in data.items()}
        assert trainer.evaluate([cut]) == pytest.approx(wanted, rel=2e-6)
    halves = [{name: leaf[None, :3] for name, leaf in data.items()},
              {name: leaf[None, 3:] for name, leaf in data.items()}]  # fmt: skip
    assert trainer.evaluate(halves) == pytest.approx(wanted, rel=2e-6)
