"""`schedule="auto"` takes the planner's fastest runnable strategy; plan files run as they say."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxsys import hardware, strategies
from jaxsys.axes import DATA, MEMBER
from jaxsys.context import ContextSplit
from jaxsys.errors import UsageError
from jaxsys.layered import LayeredModel
from jaxsys.model import preset
from jaxsys.planner.cluster import Cluster
from jaxsys.planner.function_workload import layered_workload
from jaxsys.planner.named import compare
from jaxsys.planner.plans import Gradient, LayerPath, Order, Plan, Residual, State, Weights
from jaxsys.planner.workload import decoder_workload
from jaxsys.schedule import Placement
from jaxsys.train import auto, plan_file, schedules
from jaxsys.train.layout import AskedLayout, lay_out
from jaxsys.train.options import Compute

WORKLOAD = decoder_workload(
    "llama-3-8b", preset("llama-3-8b"), sequence_length=8192, microbatch_size=1
)
H100 = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")


def test_takes_the_fastest_that_fits_and_runs():
    choice = auto.choose(WORKLOAD, [H100] * 8, microbatches=16)
    cluster = Cluster(device=hardware.device("h100"), devices=8, link=hardware.link("nvlink"))
    rows = compare(WORKLOAD, cluster, microbatches=16).rows
    # Rows whose devices share features are for `jaxsys plan`; auto has no layout for them.
    assert {row.strategy for row in rows if row.plan is None or row.plan.features == 1} == set(
        strategies.NAMES
    )
    able = [row for row in rows if row.fits and row.strategy in strategies.NAMES]
    best = min(able, key=lambda row: row.step_s)
    assert choice.schedule.name == best.strategy and choice.recompute == best.recompute
    assert (choice.schedule.devices, choice.schedule.microbatches) == (8, 16)
    assert best.strategy in choice.reason and "predicted" in choice.reason


def test_takes_what_fits_the_limit_that_the_trainer_has():
    free, tight = (
        auto.choose(WORKLOAD, [H100] * 8, microbatches=16, memory_gib=limit) for limit in (100, 45)
    )
    assert (free.recompute, tight.recompute) == ("none", "around-attention")
    asked = auto.choose(WORKLOAD, [H100] * 8, microbatches=16, memory_gib=100, recompute="block")
    assert asked.recompute == "block" and "recompute block: predicted" in asked.reason
    with pytest.raises(UsageError, match="no strategy fits 20 GiB"):
        auto.choose(WORKLOAD, [H100] * 8, microbatches=16, memory_gib=20)


def test_auto_counts_gradients_in_the_dtype_they_are_summed_in():
    def memory_gib(gradient_dtype):
        asked = AskedLayout(
            sequence_length=16,
            schedule="auto",
            microbatches=4,
            microbatch_size=1,
            memory_gib=1,
            gradient_dtype=gradient_dtype,
        )
        found = lay_out(preset("tiny"), jax.devices()[:2], asked)
        assert found.gradient_dtype == gradient_dtype and found.reason is not None
        return float(found.reason.split(" GiB")[0].split()[-1])

    assert memory_gib("bfloat16") < memory_gib("float32")


def test_says_so_when_nothing_fits_or_the_device_is_unknown():
    with pytest.raises(UsageError, match="no strategy fits"):
        auto.choose(WORKLOAD, [H100], microbatches=2)
    other = SimpleNamespace(platform="gpu", device_kind="AMD Instinct MI300X")
    with pytest.raises(UsageError, match="no preset for AMD Instinct MI300X; name a schedule"):
        auto.choose(WORKLOAD, [other] * 8, microbatches=64)


def test_blocks_of_kinds_are_compared():
    """Each kind's work is traced by itself, so that a wide block costs more than a narrow one."""
    shape = jax.ShapeDtypeStruct
    width = {"wide": 256, "narrow": 8}
    model = LayeredModel(
        embed=lambda edge, m: m["x"] @ edge["w"],
        block={
            kind: lambda w, x, m, layer: x + jnp.tanh(x @ w["up"]) @ w["down"] for kind in width
        },
        head_loss=lambda edge, x, m: (jnp.sum(x), jnp.float32(len(x))),
        pattern=("wide", "narrow", "narrow", "wide", "narrow"),
    )
    counts = {"wide": 2, "narrow": 3}
    parameters: Any = {
        "edge": {"w": shape((16, 16), jnp.float32)},
        "blocks": {
            kind: {
                "up": shape((counts[kind], 16, n), jnp.float32),
                "down": shape((counts[kind], n, 16), jnp.float32),
            }
            for kind, n in width.items()
        },
    }
    microbatch = {"x": shape((32, 16), jnp.float32)}
    devices = [SimpleNamespace(platform="cpu", device_kind="cpu")] * 4
    cluster = Cluster(device=hardware.device("cpu"), devices=4, link=hardware.link("host-memory"))
    work = layered_workload(model, parameters, microbatch, cluster)
    assert [block.product_flops for block in work.blocks] == [
        2 * 2 * 32 * 16 * width[kind] for kind in model.kind_of
    ]
    assert work.model_flops == 3 * (sum(b.product_flops for b in work.blocks) + 2 * 32 * 16 * 16)
    assert work.parameters == sum(leaf.size for leaf in jax.tree.leaves(parameters))
    choice = auto.choose_layered(
        model, parameters, microbatch, devices, microbatches=8, memory_gib=1.0,
        compute=Compute(), recompute=None,
    )  # fmt: skip
    assert (
        choice.schedule.devices * math.prod(choice.around.values()) == 4
        and "auto took" in choice.reason
    )


def plan_path(tmp_path, **changes):
    """A plan file for 4 layers on 4 devices, as `jaxsys plan` writes them."""
    keep = LayerPath(weights=Weights.REFETCH, gradient=Gradient.EACH, residual=Residual.RECOMPUTE)
    plan = Plan(**{"shard": 4, "microbatch_size": 2, "state": State.SPLIT,
                   "layers": (keep,) * 4, **changes})  # fmt: skip
    value = {
        "format": "jaxsys-plan-file",
        "version": 1,
        "for": {"layers": 4, "devices": plan.devices, "batch": 32},
        "request": {"sequence_length": 16},
        "plan": plan.to_json(),
    }
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(value))
    return path


def lay_out_plan(path, **asked):
    around, split = schedules.taken_from(asked)
    asked = {"sequence_length": 16, **asked}
    wanted = AskedLayout(schedule=str(path), around=around, split=split, **asked)
    return lay_out(preset("tiny"), jax.devices()[:4], wanted)


def test_a_plan_file_is_run_as_it_says(tmp_path):
    found = lay_out_plan(plan_path(tmp_path))
    assert (found.microbatch_size, found.rows, found.recompute) == (2, 16, "block")
    assert found.schedule.placement is Placement.SHARDED
    rings = {"shard": 1, "ring": 2, "replicas": 2, "order": Order.SIDE_BY_SIDE}
    with pytest.raises(UsageError, match="is not run: it splits state over 2 replicas"):
        lay_out_plan(plan_path(tmp_path, **rings))
    ring = lay_out_plan(plan_path(tmp_path, **rings, state=State.WHOLE))
    assert ring.schedule.name == "weipipe-interleave"
    assert (dict(ring.mesh.shape), ring.rows) == ({"data": 2, "ring": 2}, 16)
    split = lay_out_plan(plan_path(tmp_path, shard=2, features=2))
    assert dict(split.mesh.shape) == {"data": 1, "ring": 2, "tensor": 2}


def test_a_ring_of_nodes_is_laid_out_as_asked_and_as_planned(tmp_path):
    nodes = {"shard": 1, "state": State.WHOLE, "ring": 2, "members": 2, "order": Order.KEPT}
    planned = lay_out_plan(plan_path(tmp_path, **nodes))
    assert dict(planned.mesh.shape) == {"data": 1, "ring": 2, "member": 2}
    assert (planned.schedule.name, planned.schedule.members) == ("weipipe-keep", 2)
    assert planned.rows == 2 * planned.schedule.microbatches == 16
    with pytest.raises(UsageError, match="members=4, but the plan .* is for members=2"):
        lay_out_plan(plan_path(tmp_path, **nodes), members=4)
    alone = {"shard": 4, "members": 1, "ring": 1}
    with pytest.raises(UsageError, match="has 2 members share the places of a ring, and has no"):
        lay_out_plan(plan_path(tmp_path, **{**nodes, **alone, "shard": 2, "members": 2}))
    asked = AskedLayout(schedule="weipipe-interleave", around={MEMBER: 2}, microbatches=4)
    found = lay_out(preset("tiny"), jax.devices()[:8], asked)
    assert dict(found.mesh.shape) == {"data": 1, "ring": 4, "member": 2}
    assert found.rows == 8
    with pytest.raises(UsageError, match="members=3 does not divide"):
        lay_out(preset("tiny"), jax.devices()[:8], AskedLayout(around={MEMBER: 3}))


def test_a_run_that_differs_from_its_plan_says_so(tmp_path):
    path = plan_path(tmp_path)
    assert lay_out_plan(path).reason is None
    assert lay_out_plan(path, recompute="none").reason == (
        "planned with recompute block, running none"
    )


def test_a_plan_is_run_in_the_dtype_it_is_for(tmp_path):
    path = plan_path(tmp_path)
    assert lay_out_plan(path).dtype == "float32"  # as before files said it
    content = json.loads(path.read_text())
    content["request"]["dtype"] = "bfloat16"
    path.write_text(json.dumps(content))
    for asked, runs, says in (
        (None, "bfloat16", None),
        ("bfloat16", "bfloat16", None),
        ("float32", "float32", "planned in bfloat16, running float32"),
    ):
        found = lay_out_plan(path, dtype=asked)
        assert (found.dtype, found.reason) == (runs, says)


def test_gradients_are_summed_in_what_they_are_planned_in(tmp_path):
    path = plan_path(tmp_path)
    content = json.loads(path.read_text())
    content["request"]["gradients"] = "bfloat16"
    path.write_text(json.dumps(content))
    assert lay_out_plan(path).gradient_dtype == "bfloat16"
    wide = lay_out_plan(path, gradient_dtype="float32")
    assert wide.gradient_dtype == "float32"
    assert wide.reason == "planned with gradients in bfloat16, running float32"
    content["request"]["gradients"] = "float16"
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="'request.gradients' is 'float16', and must be one of"):
        lay_out_plan(path)


def test_sequences_are_as_long_as_planned_for(tmp_path):
    path = plan_path(tmp_path)
    assert lay_out_plan(path, sequence_length=None).sequence_length == 16
    with pytest.raises(
        UsageError, match="sequence_length=32, but the plan .* is for sequence_length=16; leave it"
    ):
        lay_out_plan(path, sequence_length=32)
    content = json.loads(path.read_text())
    del content["request"]  # as `jaxsys.planner` saves the plan of a function
    path.write_text(json.dumps(content))
    assert lay_out_plan(path, sequence_length=32).sequence_length == 32
    assert lay_out_plan(path, sequence_length=None).sequence_length == 128


def test_a_plan_that_contradicts_itself_or_the_model_is_refused(tmp_path):
    path = plan_path(tmp_path)
    content, count = json.loads(path.read_text()), preset("tiny").parameter_count()
    asked = {"model": "tiny", "devices": 4, "microbatches": 16, "microbatch_size": 2}

    def lay_out_changed(made_for: dict, request: dict):
        changed = {
            "for": content["for"] | {"parameters": float(count)} | made_for,
            "request": content["request"] | asked | request,
        }
        path.write_text(json.dumps(content | changed))
        return lay_out_plan(path)

    assert lay_out_changed({}, {}).rows == 16
    # The same model by where it lies.
    assert lay_out_changed({}, {"model": "folders/mine"}).rows == 16
    for made_for, request, message in (
        ({"batch": 64}, {}, "'for.batch' is 64, but 'request.microbatches' x .* is 16 x 2; make"),
        ({}, {"microbatches": 8}, "'for.batch' is 32, but .* is 8 x 2; make the plan again"),
        ({}, {"devices": 8}, "'request.devices' is 8, but 'for.devices' is 4; make the plan"),
        ({}, {"model": "byte-llama"}, "'byte-llama', of 1,608,832 .* 'for.parameters' is 54,048;"),
        ({"parameters": 5.0}, {"model": "mine"}, "of 5 parameters, and this one has 54,048; train"),
    ):
        with pytest.raises(UsageError, match=message):
            lay_out_changed(made_for, request)


def test_a_schedules_file_says_what_stands_around_it(tmp_path):
    path = tmp_path / "schedule.json"
    made = strategies.build("dp", devices=2, microbatches=4)
    path.write_text(replace(made, replicas=2, features=2).to_json())
    assert plan_file.devices_of(path) == 8
    asked = AskedLayout(schedule=str(path))
    found = lay_out(preset("tiny"), jax.devices()[:8], asked)
    assert dict(found.mesh.shape) == {"data": 2, "ring": 2, "tensor": 2}
    assert found.rows == 8


def test_a_file_says_how_many_devices_it_is_for(tmp_path):
    assert plan_file.devices_of(plan_path(tmp_path, shard=2, replicas=4)) == 8
    path = tmp_path / "schedule.json"
    path.write_text(strategies.build("1f1b", devices=2, microbatches=4).to_json())
    assert plan_file.devices_of(path) == 2
    assert plan_file.devices_of("weipipe-interleave") is None
    with pytest.raises(UsageError, match="is not a plan file but a schedule"):
        plan_file.load_plan(path)
    path.write_text(json.dumps({"format": "jaxsys-comparison", "rows": []}))
    with pytest.raises(UsageError, match="this is a jaxsys-comparison, not a schedule"):
        lay_out_plan(path)


@pytest.mark.parametrize(
    ("where", "field", "value", "says"),
    [
        ("plan", "microbatch_size", -8, "its field 'microbatch_size' is -8, and must be a whole"),
        (
            "plan",
            "shard",
            3,
            "stages 1 x ring 1 is 3 devices, but its field",
        ),
        ("plan", "chunks", "2", "its field 'chunks' is '2'"),
        ("plan", "microbatch_size", 3, "x microbatch_size 3 does not divide its field 'for.batch'"),
        ("plan", "state", "gone", "its field 'state' is 'gone', and must be one of whole, split"),
        ("request", "sequence_length", "16", "its field 'request.sequence_length' is '16'"),
        ("request", "dtype", "int8", "its field 'request.dtype' is 'int8'"),
        ("for", "batch", None, "its field 'for.batch' is None"),
    ],
)
def test_a_damaged_plan_file_names_file_and_field(tmp_path, where, field, value, says):
    path = plan_path(tmp_path)
    content = json.loads(path.read_text())
    content[where][field] = value
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=f"plan {path}: ") as error:
        lay_out_plan(path)
    assert says in str(error.value)


def test_a_file_of_something_else_names_the_file_and_the_field(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"a": 1}')
    with pytest.raises(UsageError, match=r"other.json' is neither .* its field 'format' is miss"):
        lay_out_plan(path)


def test_a_ring_of_one_that_others_leave_is_said_with_who_they_are():
    with pytest.raises(UsageError, match="4 devices over tensor=4 leave 1, .* use at least 8, or"):
        lay_out_plan("weipipe-keep", tensor=4)


def test_a_plan_file_that_does_not_fit(tmp_path):
    with pytest.raises(
        UsageError,
        match="microbatch_size=3, but the plan .* is for microbatch_size=2; leave it out",
    ):
        lay_out_plan(plan_path(tmp_path), microbatch_size=3)
    with pytest.raises(UsageError, match="tensor=4, but the plan .* is for tensor=2; leave it out"):
        lay_out_plan(plan_path(tmp_path, shard=2, features=2), tensor=4)
    with pytest.raises(UsageError, match="context=2, but the plan .* is for whole sequences"):
        lay_out_plan(plan_path(tmp_path), context=ContextSplit(parts=2))
    path = plan_path(tmp_path, shard=2)
    with pytest.raises(UsageError, match="for 2 devices, the ring has 4"):
        lay_out_plan(path)
    three = tuple(plan_file.load_plan(path).layers[:3])
    with pytest.raises(UsageError, match="the plan is for 3 layers, the model has 4"):
        lay_out_plan(plan_path(tmp_path, layers=three))


def test_a_schedule_file_that_does_not_fit(tmp_path):
    """Two rings of two devices each."""
    path = tmp_path / "rings.json"
    one = strategies.build("weipipe-interleave", devices=2, microbatches=4)
    path.write_text(replace(one, replicas=2).to_json())
    assert dict(lay_out_plan(path).mesh.shape)[DATA] == 2
    eight = tmp_path / "eight.json"
    eight.write_text(replace(one, replicas=4).to_json())
    with pytest.raises(UsageError, match="devices=4, but schedule .* is for 8; use devices=8"):
        lay_out_plan(eight)
    with pytest.raises(UsageError, match="replicas=1, but schedule .* planned for 2; leave it out"):
        lay_out_plan(path, replicas=1)


def ranks(*places):
    """Devices as (process, number on its host)."""
    return [
        SimpleNamespace(
            platform="gpu", device_kind="NVIDIA H100 80GB HBM3", process_index=process,
            local_hardware_id=number,
        )
        for process, number in places
    ]  # fmt: skip


def test_devices_of_a_node_are_told_from_those_of_others():
    a_process_a_node = ranks(*((p, d) for p in range(4) for d in range(2)))
    assert auto.devices_of_a_node(a_process_a_node) == 2
    a_process_a_device = ranks(*((2 * n + d, d) for n in range(2) for d in range(2)))
    assert auto.devices_of_a_node(a_process_a_device) == 2
    assert auto.devices_of_a_node(ranks((0, 0), (1, 1), (2, 2))) is None  # one host
    assert auto.devices_of_a_node(ranks((0, 0), (0, 1), (1, 0))) is None  # unlike parts
    assert auto.devices_of_a_node(jax.devices()) is None
    near = auto.choose(WORKLOAD, ranks(*((0, d) for d in range(8))), microbatches=16)
    far = auto.choose(WORKLOAD, ranks(*((p, 0) for p in range(8))), microbatches=16)
    assert "between nodes" not in near.reason
    assert "nvlink, ib-400 between nodes of 1" in far.reason


def test_auto_may_have_the_devices_of_nodes_share_the_places_of_a_ring(monkeypatch):
    ring = strategies.for_layers("weipipe-keep", devices=2, microbatches=4, layers=4)
    told = auto.Choice(schedule=ring, around={MEMBER: 2}, recompute="block", reason="as told")
    monkeypatch.setattr(auto, "choose", lambda *_, **__: told)
    asked = AskedLayout(schedule="auto", microbatches=8)
    found = lay_out(preset("tiny"), jax.devices()[:4], asked)
    assert dict(found.mesh.shape) == {"data": 1, "ring": 2, "member": 2}
    assert (found.rows, found.schedule) == (8, ring)
