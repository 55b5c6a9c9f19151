"""Float8 products train: each is that of two rounded factors, under every schedule, and losses fall
as they do without."""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from jaxsys import float8
from jaxsys.errors import UsageError
from jaxsys.layered import reference_loss
from jaxsys.lowering import lower
from jaxsys.mesh import make_mesh
from jaxsys.model import DecoderConfig, initial_parameters, layered
from jaxsys.model.float8_products import Float8, Sides, multiply
from jaxsys.model.loss import linear_cross_entropy
from jaxsys.strategies import NAMES, for_layers

pytestmark = pytest.mark.usefixtures("quickly_compiled")

CONFIG = DecoderConfig(
    vocab_size=48, hidden_size=32, intermediate_size=48, num_layers=2,
    num_heads=4, num_kv_heads=2, head_dim=8,
)  # fmt: skip
E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2


def rounded(x, dtype):
    """x as numpy rounds it, over one scale."""
    x = np.asarray(x, np.float32)
    scale = np.float32(np.abs(x).max() / float(ml_dtypes.finfo(dtype).max))
    return (x / scale).astype(dtype).astype(np.float32) * scale


def apart(found, wanted):
    """Relative distance."""
    wanted = np.asarray(wanted, np.float32)
    return np.linalg.norm(np.asarray(found, np.float32) - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize(("backward", "form"), [("e5m2", E5M2), ("e4m3", E4M3)])
def test_each_product_is_that_of_two_rounded_factors(backward, form):
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.normal(keys[0], (2, 5, 24)), jax.random.normal(keys[1], (24, 16))
    y, back = jax.vjp(functools.partial(multiply, sides=Sides(True, backward)), x, w)
    gradient = 1e-6 * jax.random.normal(keys[2], y.shape)
    to_x, to_w = back(gradient)
    x8, w8 = rounded(x, E4M3).reshape(10, 24), rounded(w, E4M3)
    d8 = rounded(gradient, form).reshape(10, 16)
    assert apart(y.reshape(10, 16), x8 @ w8) < 1e-5
    assert apart(to_x.reshape(10, 24), d8 @ w8.T) < 1e-5
    assert apart(to_w, x8.T @ d8) < 1e-5
    assert 0.01 < apart(y.reshape(10, 16), x.reshape(10, 24) @ w) < 0.06
    wide, back = jax.vjp(functools.partial(multiply, sides=Sides(False, backward)), x, w)
    assert apart(wide, x @ w) < 1e-6
    # Gradients are the same, whatever the forward product was.
    assert all(apart(a, b) < 1e-6 for a, b in zip(back(gradient), (to_x, to_w), strict=True))


def test_gradients_with_a_scale_a_row_are_nearer():
    """Each of two factors rounded, where rows and columns are of unlike sizes."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.normal(keys[0], (64, 24)), jax.random.normal(keys[1], (24, 16))
    gradient = jax.random.normal(keys[2], (64, 16)) * jnp.logspace(-8, 0, 64)[:, None]
    exact = jax.vjp(jnp.matmul, x, w)[1](gradient)
    x8, w8, d = rounded(x, E4M3), rounded(w, E4M3), np.asarray(gradient)
    rows = np.concatenate([rounded(row, E4M3)[None] for row in d])
    columns = np.stack([rounded(column, E4M3) for column in d.T], axis=1)

    def back(form):
        return jax.vjp(functools.partial(multiply, sides=Sides(True, form)), x, w)[1](gradient)

    to_x, to_w = back("e4m3-rows")
    assert apart(to_x, rows @ w8.T) < 1e-5 and apart(to_w, x8.T @ columns) < 1e-5
    # A token whose gradient is small has its bits all the same.
    assert apart(to_x[5], exact[0][5]) < 0.06
    assert apart(back("e4m3")[0][5], exact[0][5]) > 0.9


@pytest.mark.parametrize(("exact", "wanted"), [("none", 0), ("backward", 2), ("all", 3)])
def test_products_are_summed_exactly_where_asked(exact, wanted):
    """Precision is what XLA tells cuBLAS by to sum float8 in float32 throughout."""
    sides = Float8(forward=(".*",), exact=exact).of("mlp", "up")
    assert sides is not None

    def count(jaxpr):
        dots = [equation for equation in jaxpr.eqns if equation.primitive.name == "dot_general"]
        return [
            jax.lax.Precision.HIGHEST in (dot.params["precision"] or ())
            for dot in dots
            if dot.invars[0].aval.dtype in (E4M3, E5M2)
        ]

    def block(x, w):
        y, back = jax.vjp(functools.partial(multiply, sides=sides), x, w)
        return back(y)

    def head(kernel, hidden):
        targets = jnp.zeros(4, jnp.int32)
        of = functools.partial(
            linear_cross_entropy, targets=targets, chunk=4, softcap=None, axis=None, float8=sides
        )
        return jax.grad(lambda k, h: of(k, h), argnums=(0, 1))(kernel, hidden)

    x, w = jnp.ones((4, 8)), jnp.ones((8, 6))
    for found in (count(jax.make_jaxpr(block)(x, w)), count(jax.make_jaxpr(head)(w, x))):
        assert len(found) == 3 and sum(found) == wanted


def test_scales_hold_what_they_scale():
    """Zeros stay zero, the largest number is kept, and what is not finite stays so."""
    values, scale = float8.scaled(jnp.array([[0.0, 0, 0], [3, -7, 1e-9], [2e38, 1, 0]]), E4M3, 1)
    wide = values.astype(jnp.float32) * scale
    assert (wide[0] == 0).all() and wide[1, 1] == -7 and wide[2, 0] == pytest.approx(2e38)
    for sick in (jnp.nan, jnp.inf):
        values, scale = float8.scaled(jnp.array([1.0, sick]), E4M3)
        assert not np.isfinite(np.asarray(values.astype(jnp.float32) * scale)).all()
    y = multiply(jnp.array([[1.0, jnp.nan], [1, 1]]), jnp.ones((2, 3)))
    assert np.isnan(np.asarray(y)).all()
    assert not np.asarray(multiply(jnp.zeros((4, 2)), jnp.ones((2, 3)))).any()


def test_a_head_in_float8_is_near_and_its_gradient_too():
    keys = jax.random.split(jax.random.key(0), 3)
    kernel, hidden = 0.1 * jax.random.normal(keys[0], (32, 48)), jax.random.normal(keys[1], (8, 32))
    targets = jax.random.randint(keys[2], (8,), -1, 48)

    def run(form):
        def of(kernel, hidden):
            return linear_cross_entropy(kernel, hidden, targets, 4, None, None, form)

        return jax.value_and_grad(of, argnums=(0, 1))(kernel, hidden)

    loss, gradients = run(None)
    for sides, most in (
        (Sides(True, "e5m2"), 0.15),
        (Sides(True, "e4m3"), 0.1),
        (Sides(True, "e4m3-rows"), 0.1),
        (Sides(False, "e5m2"), 0.15),
    ):
        found, other = run(sides)
        assert sides.forward == (0 < abs(float(found / loss) - 1) < 0.02)
        assert sides.forward or found == loss
        assert all(apart(a, b) < most for a, b in zip(other, gradients, strict=True))


def batch_of(rows, length=12, seed=0):
    tokens = np.random.default_rng(seed).integers(0, 48, (rows, 2, length + 1)).astype(np.int32)
    return {"inputs": tokens[..., :-1], "targets": tokens[..., 1:]}


MICROBATCHES = 2


@functools.cache
def reference():
    """The loss and gradients of one device, in float8."""
    model, parameters = layered(CONFIG, float8=Float8()), initial_parameters(CONFIG, seed=1)
    of = functools.partial(reference_loss, model)
    return jax.jit(jax.value_and_grad(of))(parameters, batch_of(MICROBATCHES))


QUICK = ("zero-3", "weipipe-wzb1")
CASES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow, id=name) for name in NAMES
]


@pytest.mark.parametrize("name", CASES)
def test_every_schedule_gives_the_step_of_one_device(name):
    layers, count = CONFIG.num_layers, MICROBATCHES
    schedule = for_layers(name, devices=2, layers=layers, microbatches=count)
    model, parameters = layered(CONFIG, float8=Float8()), initial_parameters(CONFIG, seed=1)
    step = lower(schedule, model, make_mesh(2, devices=jax.devices()[:2]), recompute="block")
    run = jax.jit(step.loss_and_gradients)
    loss, gradients, *_ = run(step.to_rest(parameters), batch_of(count))
    wanted, reference_gradients = reference()
    # Sums in another order fall to another number of float8 now and then.
    assert float(loss) == pytest.approx(float(wanted), rel=1e-4)
    found = step.from_rest(gradients)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(reference_gradients), strict=True)
    assert max(apart(a, b) for a, b in pairs) < 0.02


@pytest.mark.parametrize("recompute", [pytest.param("none", marks=pytest.mark.slow), "selective"])
def test_recomputing_changes_nothing(recompute):
    layers, count = CONFIG.num_layers, MICROBATCHES
    schedule = for_layers("dp", devices=1, layers=layers, microbatches=count)
    model, parameters = layered(CONFIG, float8=Float8()), initial_parameters(CONFIG, seed=1)
    step = lower(schedule, model, make_mesh(1, devices=jax.devices()[:1]), recompute=recompute)
    run = jax.jit(step.loss_and_gradients)
    loss, gradients, *_ = run(step.to_rest(parameters), batch_of(count))
    wanted, reference_gradients = reference()
    assert float(loss) == pytest.approx(float(wanted), rel=1e-4)
    pairs = zip(
        jax.tree.leaves(step.from_rest(gradients)),
        jax.tree.leaves(reference_gradients),
        strict=True,
    )
    assert max(apart(a, b) for a, b in pairs) < 0.02


def test_losses_fall_as_they_do_without():
    """150 steps on a text that repeats with noise: the means of the last 20 losses."""
    generator = np.random.default_rng(0)
    pattern = generator.integers(0, 48, 24)
    text = np.tile(pattern, 400)
    noise = generator.random(text.size) < 0.1
    text[noise] = generator.integers(0, 48, noise.sum())

    def curve(rules):
        model = layered(CONFIG, float8=rules)
        optimizer = optax.adam(3e-3)
        parameters: Any = initial_parameters(CONFIG, seed=1)
        state = optimizer.init(parameters)

        @jax.jit
        def step(parameters, state, tokens):
            batch = {"inputs": tokens[None, :, :-1], "targets": tokens[None, :, 1:]}
            of = functools.partial(reference_loss, model)
            loss, gradients = jax.value_and_grad(of)(parameters, batch)
            updates, state = optimizer.update(gradients, state)
            return optax.apply_updates(parameters, updates), state, loss

        draws, losses = np.random.default_rng(1), []
        for _ in range(150):
            starts = draws.integers(0, text.size - 33, 8)
            tokens = np.stack([text[start : start + 33] for start in starts]).astype(np.int32)
            parameters, state, loss = step(parameters, state, tokens)
            losses.append(float(loss))
        return np.array(losses)

    plain, small = curve(None), curve(Float8())
    assert plain[0] > 3.5 and plain[-20:].mean() < 1.6
    assert abs(small[-20:].mean() / plain[-20:].mean() - 1) < 0.02
    assert np.abs(small - plain).max() < 0.35


def test_rules_take_what_they_name():
    rules = Float8(paths=("mlp/(up|gate)",))
    parameters = initial_parameters(CONFIG, seed=1)

    def products(rules):
        model = layered(CONFIG, float8=rules)
        text = str(
            jax.make_jaxpr(functools.partial(reference_loss, model))(parameters, batch_of(1))
        )
        return text.count("f8_e4m3fn") > 0

    assert rules.of("mlp", "up") == Sides(True) and rules.of("mlp", "down") is None
    assert rules.of("head", "kernel") is None
    assert products(rules) and not products(None)


def test_the_forward_product_of_the_head_is_wide_unless_asked_for():
    """Nothing of a step's loss is in float8 where no forward product is."""
    assert Float8().of("head", "kernel") == Sides(False)
    assert Float8().of("mlp", "down") == Float8().of("attention", "query") == Sides(True)
    rules = Float8(forward=(".*",), backward="e4m3", exact="all")
    assert rules.of("head", "kernel") == Sides(True, "e4m3", "all")
    parameters, batch = initial_parameters(CONFIG, seed=1), batch_of(1)

    def loss(rules):
        return float(reference_loss(layered(CONFIG, float8=rules), parameters, batch))

    assert loss(Float8(forward=())) == loss(None)
    of_blocks = loss(Float8(paths=("attention/.*", "mlp/.*")))
    assert loss(Float8()) == of_blocks != loss(None)
    assert loss(Float8(forward=(".*",))) != of_blocks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"paths": ("mlp/side",)},
            "float8 path 'mlp/side' names none of the model's matrices: att",
        ),
        ({"paths": ()}, "float8 takes none of the model's matrices"),
        ({"paths": ("mlp/(",)}, r"float8 path 'mlp/\(' is no expression"),
        (
            {"paths": ("mlp/.*",), "forward": ("mlp/up", "head/.*", "mlp/side")},
            "float8 path 'head/.*' of forward products names none of the matrices that are mult",
        ),
        (
            {"paths": ("mlp/.*",), "forward": ("attention/.*",)},  # a default's text, but asked for
            "float8 path 'attention/.*' of forward products names none",
        ),
        (
            {"paths": ("mlp/.*", "shared/(gate|up|down)")},
            r"float8 path 'shared/\(gate\|up\|down\)' names none of the model's matrices",
        ),
        (
            {"forward": ("mlp/.*", "shared/(gate|up|down)")},
            "down\\)' of forward products names none",
        ),
        ({"forward": ("mlp/(",)}, r"float8 path 'mlp/\(' is no expression"),
        ({"backward": "e3m4"}, "backward='e3m4' must be one of e5m2, e4m3, e4m3-rows"),
        ({"exact": "forward"}, "exact='forward' must be one of none, backward, all"),
    ],
)
def test_rules_that_name_nothing_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        layered(CONFIG, float8=Float8(**changes))


def test_what_was_not_asked_for_may_name_nothing():
    layered(CONFIG, float8=Float8())  # has no shared experts
    layered(CONFIG, float8=Float8(paths=("mlp/.*",)))
    with pytest.raises(UsageError, match="names none of the model's matrices"):
        layered(CONFIG, float8=Float8(paths=(*Float8().paths[:2], *Float8().paths[2:])))


def test_experts_are_not_taken():
    from jaxsys.model.kinds import BlockKind, Experts

    config = replace(
        CONFIG,
        kinds=(BlockKind(experts=True),),
        experts=Experts(count=4, active=2, intermediate_size=8),
    )
    layered(config, float8=Float8())
    with pytest.raises(UsageError, match="names experts/router, which is not multiplied in float8"):
        layered(config, float8=Float8(paths=("experts/.*",)))


def test_gpus_compile_it_without_the_kernels_that_take_minutes_to_choose(monkeypatch):
    def options(rules):
        model = layered(CONFIG, float8=rules)
        schedule = for_layers("dp", devices=1, layers=CONFIG.num_layers, microbatches=1)
        step = lower(schedule, model, make_mesh(1))
        on_cpu = step.compiler_options
        monkeypatch.setattr(type(step), "platform", "gpu")
        monkeypatch.setattr(
            "jaxsys.lowering.base.gpu_compiler_options", lambda mesh, axis: {"an": 1}
        )
        found = step.compiler_options
        monkeypatch.undo()
        return on_cpu, found

    (plain_on_cpu, plain), (on_cpu, found) = options(None), options(Float8())
    assert plain == {"an": 1}
    assert found == {"an": 1, "xla_gpu_enable_triton_gemm": False}
    assert on_cpu == plain_on_cpu
