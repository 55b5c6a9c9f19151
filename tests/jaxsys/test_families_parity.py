"""Every family in three shapes against transformers in float32: logits, export, gradients.

Needs the extra `parity`. Weights are random and large, so that every term shows.
"""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys.layered import reference_loss
from jaxsys.model import forward, layered, load, save_safetensors

pytestmark = pytest.mark.parity

spec = importlib.util.spec_from_file_location(
    "family_cases", Path(__file__).parent / "family_cases.py"
)
assert spec is not None and spec.loader is not None
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)

TOLERANCE = 1e-5
"""Of the largest logit, or of a leaf's largest gradient."""
ALL = [(family, case) for family in cases.CASES for case in range(3)]


@pytest.fixture(scope="module", autouse=True)
def transformers():
    pytest.importorskip("torch", reason="needs the extra `parity`")
    return pytest.importorskip("transformers", reason="needs the extra `parity`")


def relative(ours, theirs):
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize(("family", "case"), ALL)
def test_logits_both_ways(transformers, tmp_path, record_property, family, case):
    theirs = cases.their_folder(family, case, tmp_path / "theirs")
    wanted = cases.their_logits(theirs)
    model = load(tmp_path / "theirs")
    ours = forward(model.config, model.parameters, jnp.asarray(cases.TOKENS, jnp.int32))
    record_property("relative_error", relative(ours, wanted))
    assert relative(ours, wanted) < TOLERANCE
    save_safetensors(tmp_path / "ours", model.config, model.parameters)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(again) is type(theirs)
    assert relative(cases.their_logits(again), wanted) < TOLERANCE


@pytest.mark.parametrize(("family", "case"), ALL)
def test_gradients_of_every_leaf(tmp_path, family, case):
    import safetensors.numpy
    import torch  # pyright: ignore[reportMissingImports]

    theirs = cases.their_folder(family, case, tmp_path / "theirs")
    tokens = cases.TOKENS[:, :24]
    logits = theirs(torch.from_numpy(tokens[:, :-1])).logits.double()
    goals = torch.from_numpy(tokens[:, 1:]).reshape(-1)
    torch.nn.functional.cross_entropy(logits.reshape(goals.shape[0], -1), goals).backward()
    model = load(tmp_path / "theirs")
    batch = {
        "inputs": jnp.asarray(tokens[None, :, :-1], jnp.int32),
        "targets": jnp.asarray(tokens[None, :, 1:], jnp.int32),
    }
    config = model.config
    if config.experts is not None and config.experts.balance:
        import dataclasses

        config = dataclasses.replace(
            config, experts=dataclasses.replace(config.experts, balance=0.0)
        )
    ours = jax.jit(jax.grad(lambda weights: reference_loss(layered(config), weights, batch)))(
        model.parameters
    )
    # Their gradients take the weights' places, so that one reader names both alike.
    with torch.no_grad():
        for parameter in theirs.parameters():
            gradient = parameter.grad
            parameter.copy_(torch.zeros_like(parameter) if gradient is None else gradient)
    theirs.save_pretrained(tmp_path / "gradients")
    path = tmp_path / "gradients" / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    for name in tensors:
        if name.endswith("e_score_correction_bias"):  # a buffer: it has no gradient
            tensors[name] = np.zeros_like(tensors[name])
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    wanted = load(tmp_path / "gradients").parameters
    for (where, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path(dict(ours)), jax.tree.leaves(dict(wanted)), strict=True
    ):
        scale = float(np.abs(other).max())
        difference = float(np.abs(leaf - other).max())
        assert difference <= 10 * TOLERANCE * max(scale, 1e-4), jax.tree_util.keystr(where)
