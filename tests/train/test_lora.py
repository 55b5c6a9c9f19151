"""Adapters start at the frozen model, train alone, and merge to what was trained."""

import jax
import numpy as np
import optax
import pytest

from jaxsys.errors import UsageError
from jaxsys.layered import LayeredModel, Parameters, layer_key, reference_loss
from jaxsys.train import Batches, Trainer
from jaxsys.train.lora import add_adapters, train_adapters


def test_adapters_train_and_the_rest_stays(small_model, small_parameters, counted_samples):
    model, start, merge = add_adapters(
        small_model, small_parameters, rank=2, targets=["kernel"], scale=4.0
    )
    data = Batches(counted_samples, rows=4, microbatch_size=2)
    batch = next(data.read(0))
    frozen_loss = reference_loss(small_model, small_parameters, batch)
    np.testing.assert_allclose(reference_loss(model, start, batch), frozen_loss, rtol=1e-6)
    trainer = Trainer(model, start, train_adapters(optax.adam(0.02)), devices=2, microbatches=4)
    report = trainer.fit(lambda _: batch, steps=20, progress=False)
    trained = trainer.host_parameters()
    jax.tree.map(np.testing.assert_array_equal, trained["edge"], small_parameters["edge"])
    jax.tree.map(
        np.testing.assert_array_equal, trained["blocks"]["frozen"], small_parameters["blocks"]
    )
    assert report.losses[-1] < report.losses[0] - 0.05
    whole = merge(trained)
    assert jax.tree.structure(whole) == jax.tree.structure(dict(small_parameters))
    np.testing.assert_allclose(
        reference_loss(small_model, whole, batch), trainer.evaluate([batch]), rtol=1e-5
    )


def test_adapters_of_kinds_keep_draws_and_evaluation(small_model, small_parameters):
    """Two kinds of blocks, one of which has no such kernel; a model that draws."""

    def noisy(weights, x, microbatch, layer):
        mask = jax.random.bernoulli(layer_key(microbatch["key"], layer.index), 0.5, x.shape)
        return small_model.block(weights, x, microbatch, layer) * mask

    def scaled(weights, x, microbatch, layer):
        return x * weights["scale"]

    def made(first, **options):
        return LayeredModel(
            embed=small_model.embed,
            block={"noisy": first, "scaled": scaled},
            head_loss=small_model.head_loss,
            pattern=("noisy", "scaled", "noisy", "noisy"),
            **options,
        )

    still = made(small_model.block)
    model = made(noisy, draws="key", evaluation=still)
    parameters: Parameters = {
        "edge": small_parameters["edge"],
        "blocks": {
            "noisy": jax.tree.map(lambda leaf: leaf[:3], small_parameters["blocks"]),
            "scaled": {"scale": np.full(1, 0.5, np.float32)},
        },
    }
    adapted, start, merge = add_adapters(model, parameters, rank=2, targets=["kernel"])
    assert adapted.draws == "key"
    assert start["blocks"]["scaled"]["adapters"] == {}
    tokens = np.random.default_rng(0).integers(0, 16, (4, 2, 5)).astype(np.int32)
    batch = {"inputs": tokens[..., :-1], "targets": tokens[..., 1:]}
    trainer = Trainer(
        adapted, start, train_adapters(optax.adam(0.05)), devices=2, microbatches=4, schedule="1f1b"
    )
    before = trainer.evaluate([batch])
    np.testing.assert_allclose(before, reference_loss(still, parameters, batch), rtol=1e-6)
    for _ in range(2):
        trainer.step(batch)
    trained = trainer.host_parameters()
    for kind, stack in parameters["blocks"].items():
        jax.tree.map(np.testing.assert_array_equal, trained["blocks"][kind]["frozen"], stack)
    whole = reference_loss(still, merge(trained), batch)
    np.testing.assert_allclose(whole, trainer.evaluate([batch]), rtol=1e-6)
    assert abs(float(whole) - before) > 1e-4


def test_unknown_targets_are_refused(small_model, small_parameters):
    with pytest.raises(UsageError, match="no block kernel is named 'query'; there are kernel"):
        add_adapters(small_model, small_parameters, rank=2, targets=["query"])
