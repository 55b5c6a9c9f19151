"""Matrices rounded by what they multiply lose less, and a server finds their numbers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys import cli, forms
from jaxsys.errors import UsageError
from jaxsys.model import (
    ByteTokenizer,
    forward,
    initial_parameters,
    load,
    preset,
    save_safetensors,
)
from jaxsys.model.calibration import compensated, rounded, sequences
from jaxsys.model.refining import refined
from jaxsys.serve.weights import serving_weights

CONFIG = dataclasses.replace(preset("tiny"), num_layers=2)


def plainly(rows, scales, products, form):
    """GPTQ as its paper has it, in float64: errors of one input after the other."""
    used = np.diagonal(products)
    damped = products + np.eye(len(used)) * (0.01 * used.mean() + (used == 0))
    order = np.argsort(-used, kind="stable")
    upper = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)])).T
    rows, scales, found = rows[:, order].copy(), scales[:, order], np.zeros_like(rows)
    for i in range(rows.shape[1]):
        code = forms.nearest(jnp.asarray(rows[:, i] / scales[:, i], jnp.float32), form)
        found[:, i] = np.asarray(code)
        error = (rows[:, i] - found[:, i] * scales[:, i]) / upper[i, i]
        rows[:, i:] -= error[:, None] * upper[i, i:]
    return found[:, np.argsort(order)]


@pytest.mark.parametrize("form", ["int4", "fp8"])
def test_errors_are_made_good_input_by_input(form):
    """Of more inputs than a block, the last not whole, one of them never used."""
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(6, 160))
    x = generator.normal(size=(400, 160)) * generator.uniform(0.1, 2, 160)
    x = x @ (np.eye(160) + 0.1 * generator.normal(size=(160, 160)))
    x[:, 7] = 0
    scales = np.abs(rows).max(axis=1, keepdims=True) / (7.0 if form == "int4" else 448.0)
    scales, products = np.broadcast_to(scales, rows.shape), x.T @ x
    given = tuple(jnp.asarray(one, jnp.float32) for one in (rows, scales, products))
    found, wanted = (
        np.asarray(compensated(given[0], given[1], given[2], form)),
        plainly(rows, scales, products, form),
    )
    # A number halfway between two may be rounded to either, and then so may those behind it.
    assert (np.abs(found - wanted) < 1e-4).mean() > 0.9

    def lost(codes):
        return np.sum((x @ (codes * scales - rows).T) ** 2)

    near = np.asarray(forms.nearest(given[0] / given[1], form))
    assert lost(found) < 0.6 * lost(near) and lost(found) < 1.1 * lost(wanted)
    assert (found[:, 7] == near[:, 7]).all()


def test_turns_of_codes_and_scales_lose_less_each():
    """Than GPTQ by a sixth and more; what comes out is still codes, and scales that are kept."""
    generator = np.random.default_rng(0)
    rows = jnp.asarray(generator.standard_t(6, size=(24, 96)), jnp.float32)
    x = generator.normal(size=(300, 96)) * generator.uniform(0.1, 2, 96)
    x = x @ (np.eye(96) + 0.1 * generator.normal(size=(96, 96)))
    products = jnp.asarray(x.T @ x, jnp.float32)
    scale = forms.scales(rows.reshape(24, 3, 32), "int4")[..., 0]
    codes = compensated(rows, jnp.repeat(scale, 32, axis=1), products, "int4")

    def lost(codes, scale):
        return np.sum((x @ np.asarray(codes * jnp.repeat(scale, 32, axis=1) - rows).T) ** 2)

    losses = [lost(codes, scale)]
    for turns in (1, 2, 4):
        some, of_some = refined(rows, codes, scale, products, turns=turns)
        assert set(np.unique(some)) <= set(range(-8, 8))
        assert (forms.in_store(of_some) == of_some).all()
        losses.append(lost(some, of_some))
    assert losses[0] > losses[1] > losses[2] > losses[3] and losses[3] < 0.85 * losses[0]
    zeros = refined(0 * rows, 0 * codes, jnp.ones_like(scale), products, turns=1)
    assert not zeros[0].any() and (zeros[1] == 1).all()


def test_scales_of_four_bits_put_the_largest_where_there_is_one_number_more():
    groups = jnp.array([[8.0, -7, 3, 1], [-8, 7, 3, 1], [0, 0, 0, 0], [7, -1, 2, 3]])
    scale = forms.scales(groups, "int4")
    assert (forms.nearest(groups / scale, "int4") * scale == groups).all()
    assert scale[:3, 0].tolist() == [-1, 1, 1]


def test_int8_is_rounded_as_a_server_does():
    kernel = jax.random.normal(jax.random.key(0), (64, 8))
    found = np.asarray(rounded(kernel, jnp.eye(64), "int8"))
    scale = np.abs(np.asarray(kernel)).max(axis=0) / 127
    assert (np.abs(found - np.asarray(kernel)) <= 0.501 * scale).all()


@pytest.fixture
def folder(tmp_path):
    """A model whose inputs are unlike each other, and a text."""
    parameters = initial_parameters(CONFIG, seed=4)
    table = parameters["edge"]["embed"]["table"]
    parameters["edge"]["embed"]["table"] = table * jnp.linspace(0.2, 40, table.shape[1])[None]
    save_safetensors(tmp_path / "a", CONFIG, parameters, ByteTokenizer())
    (tmp_path / "text").write_text("".join(map(chr, range(32, 127))) * 40)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(("form", "dtype"), [("int4", "bfloat16"), ("fp8", "float32")])
def test_a_folder_is_rounded_for_a_server_which_finds_the_numbers(folder, capsys, form, dtype):
    command = ["convert", "--model", str(folder / "a"), "--out", str(folder / form)]
    command += ["--dtype", dtype, "--round", form, "--calibrate", str(folder / "text")]
    assert cli.main(command) == 0
    assert capsys.readouterr().out.endswith(f"in {dtype}, rounded for --quantise {form}\n")
    model, exact = load(folder / form), load(folder / "a")
    for name in ("norm", "embed", "head"):
        for a, b in zip(
            *(jax.tree.leaves(m.parameters["edge"][name]) for m in (model, exact)), strict=True
        ):
            assert np.allclose(a, b, rtol=2.0**-8)
    served = serving_weights(CONFIG, model.parameters, quantisation=form)
    for index, layer in enumerate(served.layers):
        for name in ("out", "mlp/down"):
            matrix = layer.matrices[name]
            path = ("attention", "out") if name == "out" else ("mlp", "down")
            kernel = model.parameters["blocks"]
            for part in path:
                kernel = kernel[part]
            wide = np.asarray(matrix.wide(jnp.dtype("float32")))
            if form == "fp8":
                wide = wide * np.asarray(matrix.scale)[:, None]
            kernel = np.asarray(kernel[index]).reshape(wide.shape[1], -1).T
            assert np.abs(wide - kernel).max() < 2.0**-7 * np.abs(kernel).max()
            assert form == "int4" or np.allclose(wide, kernel, rtol=1e-5)


@pytest.mark.slow
def test_what_a_rounded_model_says_is_nearer(folder):
    """Than of one whose numbers are each the nearest."""
    command = ["convert", "--model", str(folder / "a"), "--out", str(folder / "b"), "--round"]
    command += ["int4", "--calibrate", str(folder / "text"), "--dtype", "float32"]
    assert cli.main(command) == 0
    tokens = jax.random.randint(jax.random.key(0), (2, 64), 32, 127)
    exact, careful = load(folder / "a"), load(folder / "b")

    def nearest(path, leaf):
        path = tuple(part.key for part in path)
        if leaf.ndim != 3:
            return leaf
        rule = jax.vmap(lambda k: rounded(k, jnp.eye(k.shape[0]), forms.form_of(path, "int4")))
        return rule(leaf)

    blocks = jax.tree_util.tree_map_with_path(nearest, exact.parameters["blocks"])
    wanted = forward(CONFIG, exact.parameters, tokens)
    plain: Any = {**exact.parameters, "blocks": blocks}
    far = [
        float(jnp.mean((forward(CONFIG, parameters, tokens) - wanted) ** 2))
        for parameters in (careful.parameters, plain)
    ]
    assert 0 < far[0] < 0.7 * far[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--round", "int4"], "--round and --calibrate go together"),
        (["--calibrate", "{}/text"], "--round and --calibrate go together"),
        (["--round", "int4", "--calibrate", "{}/short"], "calibrate by has 3 tokens; give one of"),
        (["--round", "int4", "--calibrate", "{}/none"], "{}/none"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(folder, flags, message, capsys):
    (folder / "short").write_text("abc")
    command = ["convert", "--model", str(folder / "a"), "--out", str(folder / "b")]
    flags = [flag.replace("{}", str(folder)) for flag in flags]
    assert cli.main([*command, *flags]) == 2
    said = capsys.readouterr().err
    assert message.replace("{}", str(folder)) in said and not (folder / "b").exists()


def test_models_of_experts_are_refused(tmp_path):
    from jaxsys.model.convert import main

    config = dataclasses.replace(preset("byte-moe"), num_layers=1)
    save_safetensors(tmp_path / "a", config, initial_parameters(config, seed=0), ByteTokenizer())
    (tmp_path / "text").write_text("abc " * 4000)
    command = ["--model", str(tmp_path / "a"), "--out", str(tmp_path / "b"), "--round", "fp8"]
    with pytest.raises(UsageError, match="has experts, which are not calibrated"):
        main([*command, "--calibrate", str(tmp_path / "text")], "convert")


def test_sequences_are_from_all_over_a_text():
    found = sequences("".join(map(chr, range(32, 127))) * 10, ByteTokenizer(), 100, 4)
    assert found.shape == (4, 100)
    whole = ByteTokenizer().encode("".join(map(chr, range(32, 127))) * 10)
    assert found[0].tolist() == whole[:100] and found[-1].tolist() == whole[800:900]
