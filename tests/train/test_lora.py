"""Adapters start at the frozen model, train alone, and merge to what was trained."""

import jax
import numpy as np
import optax
import pytest

from jaxsys.errors import UsageError
from jaxsys.layered import reference_loss
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


def test_unknown_targets_are_refused(small_model, small_parameters):
    with pytest.raises(UsageError, match="no block kernel is named 'query'; there are kernel"):
        add_adapters(small_model, small_parameters, rank=2, targets=["query"])
