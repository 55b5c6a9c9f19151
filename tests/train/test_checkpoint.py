"""Checkpoints: the same trajectory under any schedule, and nothing broken is ever trusted."""

import dataclasses
import errno
import gc
import json
import logging
import os
import shutil
import socket
import threading
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from jaxsys.errors import RunError, UsageError
from jaxsys.layered import LayeredModel
from jaxsys.mesh import make_mesh
from jaxsys.train import Batches, CheckpointStore, Trainer
from jaxsys.train.checkpoint import Record, checksums_of
from jaxsys.train.lock import RunLock
from jaxsys.train.metrics import MetricsLog
from jaxsys.train.trainer import _devices_in_words

G = 8
"""Samples in a batch, however it is cut."""


@pytest.fixture(scope="module")
def make(small_model, small_parameters):
    """Makes a trainer of the small model."""

    def trainer(schedule="dp", ring=1, data=1, member=1, *, model=None, parameters=None, **options):
        devices = jax.devices()[: ring * data * member]
        return Trainer(
            model or small_model,
            parameters or small_parameters,
            optax.adamw(1e-2),
            schedule=schedule,
            mesh=make_mesh(ring, data, member=member, devices=devices),
            microbatches=G // (data * member),
            clip_norm=1.0,
            **options,
        )

    return trainer


@pytest.fixture(scope="module")
def data(counted_samples):
    return Batches(counted_samples, rows=G, microbatch_size=1, seed=4)


@pytest.fixture(scope="module")
def finished(make, data, tmp_path_factory):
    """A finished run of 4 steps with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("finished")
    trainer = make(settings={"learning_rate": 0.01})
    trainer.fit(data, steps=4, folder=folder, save_every=2, progress=False)
    return folder


@pytest.fixture
def saved(finished, tmp_path):
    """A copy of `finished` to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def errors_between(found, wanted) -> float:
    return max(
        jax.tree.leaves(jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), found, wanted))
    )


def test_save_under_weipipe_resume_under_others_as_if_never_stopped(make, data, tmp_path):
    whole = make("dp", 2)
    wanted = whole.fit(data, steps=6, progress=False)
    first = make("weipipe-interleave", 4)
    part = first.fit(data, steps=6, stop_at=2, folder=tmp_path / "run", progress=False)
    middle = []
    for stop, (name, *sizes) in ((3, ("zero-3", 4, 2)), (4, ("weipipe-keep", 2, 1, 4))):
        middle.append(
            make(name, *sizes).fit(
                data, steps=6, stop_at=stop, folder=tmp_path / "run", resume=True, progress=False
            )
        )
    third = make("1f1b", 2)
    last = third.fit(data, steps=6, folder=tmp_path / "run", resume=True, progress=False)
    assert (part.step, *(one.step for one in middle), last.step) == (2, 3, 4, 6)
    losses = part.losses + middle[0].losses + middle[1].losses + last.losses
    np.testing.assert_allclose(losses, wanted.losses, rtol=1e-5)
    # Sums in another order differ in the last bit, and Adam magnifies that for small gradients.
    assert errors_between(third.host_parameters(), whole.host_parameters()) < 1e-5
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == [1, 2, 3, 4, 5, 6]


def test_the_same_layout_goes_on_bit_for_bit(make, data, saved, tmp_path):
    folder = saved
    whole = make(settings={"learning_rate": 0.01})
    whole.fit(data, steps=6, progress=False)
    resumed = make(settings={"learning_rate": 0.01})
    resumed.fit(data, steps=6, folder=folder, resume=True, progress=False)
    assert errors_between(resumed.host_parameters(), whole.host_parameters()) == 0.0
    assert resumed.position == whole.position == 6 * G


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"ring": 1}, "1 device"),
        ({"ring": 4, "data": 1}, "4 devices"),
        ({"ring": 2, "data": 1, "expert": 2}, "4 devices: ring 2 x expert 2"),
        ({"ring": 1, "data": 3}, "3 devices: replicas 3"),
        ({"ring": 2, "data": 2, "tensor": 2, "context": 3, "member": 2}, "48 devices: ring 2 x "),
    ],
)
def test_every_axis_of_a_saved_run_is_said(sizes, words):
    said = _devices_in_words(sizes)
    assert said.startswith(words)
    named = {"data": "replicas", "member": "members"}
    for name, size in sizes.items():
        assert (f"{named.get(name, name)} {size}" in said) == (size > 1 and ": " in said)


def biggest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_any_truncated_file_is_noticed_and_the_step_before_loads(make, saved, capsys):
    folder = saved
    trainer = make(settings={"learning_rate": 0.01})
    step = folder / "checkpoints/4"
    files = sorted(p for p in step.rglob("*") if p.is_file() and p.stat().st_size)
    noticed = 0
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        said: list[str] = []
        store = CheckpointStore(folder / "checkpoints", notice=said.append)
        loaded = trainer.restore(store, notice=said.append)
        store.close()
        if file.name == ".sizes.json":
            assert loaded == 4
        else:
            noticed += 1
            assert loaded == 2
            name = file.relative_to(step)
            assert any(f"step 4: {name} has" in line for line in said), said
            assert any("checkpoint of step 4" in line for line in said), said
            assert any("resumed from step 2" in line for line in said), said
            aside = folder / "checkpoints/broken-4"
            assert aside.is_dir() and not step.exists()
            aside.rename(step)
        file.write_bytes(whole)
    assert noticed >= 3
    store = CheckpointStore(folder / "checkpoints")
    assert trainer.restore(store) == 4
    store.close()
    gc.collect()


# Orbax leaves the readers of other arrays behind when one fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_truncated_file_is_noticed_without_its_size(make, saved):
    step = saved / "checkpoints/4"
    (step / ".sizes.json").unlink()  # as if killed between the rename and the sizes
    for file in (p for p in step.rglob("*") if p.parent.name == "d"):  # where the arrays are
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    said: list[str] = []
    store = CheckpointStore(saved / "checkpoints")
    assert make(settings={"learning_rate": 0.01}).restore(store, notice=said.append) == 2
    store.close()
    assert any("checkpoint of step 4" in line for line in said), said
    gc.collect()


def test_wrong_values_are_noticed_by_their_checksum(make, saved):
    folder = saved
    trainer = make(settings={"learning_rate": 0.01})
    store = CheckpointStore(folder / "checkpoints")
    record = store.record(4)
    name = next(iter(record.checksums))
    target = jax.tree.map(
        lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at),
        trainer._rest.layer_shapes,
        trainer._rest.layer_shardings,
    )
    with pytest.raises(RunError, match="1 arrays differ from what was saved"):
        store.arrays(4, target, {**record.checksums, name: record.checksums[name] ^ 1})
    store.close()


@pytest.mark.parametrize("damage", ["position", "a bit", "another step"])
def test_a_damaged_record_falls_back_a_step(make, saved, damage):
    steps = saved / "checkpoints"
    if damage == "another step":
        shutil.rmtree(steps / "4/run")
        shutil.copytree(steps / "2/run", steps / "4/run")
        says = "its record is of step 2"
    else:
        (file,) = [p for p in (steps / "4/run").rglob("*") if b'"position"' in p.read_bytes()]
        text = file.read_bytes()
        spoilt = text.replace(b'"position": 32', b'"position": 33')
        if damage == "a bit":
            at = text.index(b'"settings"') + 3
            spoilt = text[:at] + bytes([text[at] ^ 4]) + text[at + 1 :]
        assert spoilt != text
        file.write_bytes(spoilt)
        says = "its record is damaged"
    (steps / "4/.sizes.json").unlink()
    said: list[str] = []
    store = CheckpointStore(steps)
    assert make(settings={"learning_rate": 0.01}).restore(store, notice=said.append) == 2
    store.close()
    assert any(line.startswith(f"checkpoint of step 4: {says}") for line in said), said


def test_a_refusal_of_an_older_step_says_that_the_newest_is_damaged(make, saved):
    """Settings that were changed between the two are not all that is wrong."""
    biggest_file(saved / "checkpoints/4").write_bytes(b"")
    store = CheckpointStore(saved / "checkpoints")
    says = r"checkpoint of step 4: .* has 0 bytes.*; of those before, .* step 2 was made with other"
    with pytest.raises(UsageError, match=says):
        make(settings={"learning_rate": 0.02}).restore(store)
    store.close()


def test_records_of_the_format_before_are_read(saved):
    store = CheckpointStore(saved / "checkpoints")
    record = store.record(4)
    store.close()
    fields = {**record.sealed(), "format": 1}
    del fields["seal"]
    assert Record.unsealed(fields, step=4).position == record.position
    with pytest.raises(UsageError, match="format 3; this version reads 2"):
        Record.unsealed(dataclasses.replace(record, format=3).sealed(), step=4)


def test_stray_files_among_the_steps_are_left_alone(make, data, saved):
    steps = saved / "checkpoints"
    strays = [steps / "notes.txt", steps / "7"]
    for stray in strays:
        stray.write_text("mine")
    trainer = make(settings={"learning_rate": 0.01})
    assert trainer.fit(data, steps=5, folder=saved, resume=True, progress=False).step == 5
    assert [stray.read_text() for stray in strays] == ["mine", "mine"]


def test_a_folder_has_one_run_at_a_time(make, data, tmp_path):
    says = rf"is in use by a run of pid {os.getpid()} on .*wait for it to end, or choose another"
    with RunLock(tmp_path), pytest.raises(UsageError, match=says):
        make().fit(data, steps=1, folder=tmp_path, progress=False)
    held, waited = RunLock(tmp_path).__enter__(), []
    threading.Timer(0.5, held.__exit__).start()
    with RunLock(tmp_path, wait_s=30, notice=waited.append):  # a job that was requeued
        holder = f"pid {os.getpid()} on {socket.gethostname()}"
        assert waited == [f"waiting for {tmp_path}, in use by {holder}"]


def test_checksums_see_values_and_places_but_not_shardings():
    values = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    mesh = make_mesh(4, devices=jax.devices()[:4])
    sharded = jax.device_put(
        values, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("ring"))
    )
    plain = checksums_of({"a": values})
    assert checksums_of({"a": sharded}) == plain
    assert checksums_of({"a": values[::-1]}) != plain
    assert checksums_of({"a": values[:, ::-1]}) != plain
    changed = values.copy()
    changed[0, 0] = np.nextafter(changed[0, 0], 10)
    assert checksums_of({"a": changed}) != plain


def test_a_save_cut_short_leaves_the_one_before(make, data, saved):
    folder = saved
    # What a kill during a save leaves: a temporary folder, under Orbax's own name for it.
    shutil.copytree(folder / "checkpoints/4", folder / "checkpoints/6.orbax-checkpoint-tmp")
    biggest_file(folder / "checkpoints/6.orbax-checkpoint-tmp").write_bytes(b"")
    trainer = make(settings={"learning_rate": 0.01})
    report = trainer.fit(data, steps=5, folder=folder, resume=True, progress=False)
    assert report.step == 5
    assert not list((folder / "checkpoints").glob("*tmp*"))


def test_nothing_readable_is_an_error(make, data, saved):
    folder = saved
    for step in (2, 4):
        shutil.rmtree(folder / f"checkpoints/{step}/state/d", ignore_errors=True)
        biggest_file(folder / f"checkpoints/{step}/state").write_bytes(b"")
        for file in (folder / f"checkpoints/{step}/run").rglob("*"):
            if file.is_file():
                file.write_bytes(b"")
    with pytest.raises(RunError, match=r"none of the checkpoints \[2, 4\]") as fault:
        make().fit(data, steps=5, folder=folder, resume=True, progress=False)
    assert f"remove {folder / 'checkpoints'} to start anew" in str(fault.value)


def test_a_quiet_run_still_says_what_it_put_aside(make, data, saved, capsys):
    biggest_file(saved / "checkpoints/4").write_bytes(b"")
    trainer = make(settings={"learning_rate": 0.01})
    assert trainer.fit(data, steps=3, folder=saved, resume=True, progress=False).step == 3
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and said[0].startswith("checkpoint of step 4") and "broken-4" in said[1]


def test_full_disk_names_the_last_good_step(make, data, saved, monkeypatch):
    folder = saved

    def full(self, *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer = make(settings={"learning_rate": 0.01})
    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    with pytest.raises(RunError, match=r"No space left on device; the last good one is step 4"):
        trainer.fit(data, steps=5, folder=folder, resume=True, progress=False)


def test_a_full_disk_under_the_metrics_is_one_line(make, data, saved, monkeypatch):
    def full(self, *_):
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer = make(settings={"learning_rate": 0.01})
    monkeypatch.setattr(MetricsLog, "write", full)
    says = r"metrics could not be written .*No space left on device; the last checkpoint is step 4"
    with pytest.raises(RunError, match=says):
        trainer.fit(data, steps=5, folder=saved, resume=True, progress=False)


def test_parts_of_a_save_that_failed_are_not_told_one_by_one(tmp_path, caplog):
    CheckpointStore(tmp_path).close()
    logger, full = (
        logging.getLogger("asyncio"),
        OSError(errno.ENOSPC, "/run/a.orbax-checkpoint-tmp"),
    )
    logger.error("_GatheringFuture exception was never retrieved", exc_info=full)
    logger.error("Task exception was never retrieved", exc_info=ValueError("of somebody else"))
    assert [record.message for record in caplog.records] == ["Task exception was never retrieved"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_known_when_metrics_are_written_and_not_when_they_are_closed(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write("step", 1, {"loss": 2.0})
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, log._file.fileno())
    os.close(full)
    with pytest.raises(OSError, match="No space left"):
        log.write("step", 2, {"loss": 1.5})
    log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()] == [1]


def test_changed_settings_are_listed_and_refused_or_accepted(make, data, saved, capsys):
    folder = saved
    changed = {"learning_rate": 0.1, "warm_up": 3}
    with pytest.raises(UsageError, match=r"learning_rate: 0.01 -> 0.1; warm_up: None -> 3"):
        make(settings=changed).fit(data, steps=5, folder=folder, resume=True, progress=False)
    report = make(settings=changed).fit(
        data, steps=5, folder=folder, resume=True, accept_changes=True
    )
    assert report.step == 5
    assert "accepted changed settings: learning_rate: 0.01 -> 0.1" in capsys.readouterr().err


def test_another_model_is_refused(make, data, saved, small_model, small_parameters):
    folder = saved
    shallow = LayeredModel(
        embed=small_model.embed, block=small_model.block, head_loss=small_model.head_loss, layers=2
    )
    parameters = {
        "edge": small_parameters["edge"],
        "blocks": jax.tree.map(lambda leaf: leaf[:2], small_parameters["blocks"]),
    }
    with pytest.raises(UsageError, match=r"another model: blocks/bias is float32\[4, 8\] there"):
        make(model=shallow, parameters=parameters).fit(
            data, steps=5, folder=folder, resume=True, progress=False
        )


def test_a_used_folder_is_not_overwritten_unasked(make, data, saved):
    folder = saved
    with pytest.raises(UsageError, match=r"holds a run at step 4; resume it"):
        make().fit(data, steps=5, folder=folder, progress=False)


@pytest.mark.parametrize("flat", ["lora.a", "lora/a"])
def test_arrays_that_a_checkpoint_would_not_keep_apart_are_refused(
    make, data, small_parameters, tmp_path, flat
):
    """Orbax writes edge / lora.a and edge / lora / a into one array, and reads that for both."""
    one = np.ones(4, np.float32)
    edge = {**small_parameters["edge"], flat: one, "lora": {"a": 2 * one}}
    trainer = make(parameters={**small_parameters, "edge": edge})
    both = f"edge / lora / a and .* edge / {flat} would both be .*; rename one of them"
    with pytest.raises(UsageError, match=both):
        trainer.fit(data, steps=1, folder=tmp_path / "run", progress=False)
    assert trainer.step_number == 0
    with pytest.raises(UsageError, match=both):
        trainer.save(CheckpointStore(tmp_path / "other"))


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.1, momentum=0.9),
        optax.adafactor(0.01, min_dim_size_to_factor=4),
        optax.chain(optax.clip(1.0), optax.lion(1e-3)),
        optax.MultiSteps(optax.adam(1e-2), 2),
        optax.masked(optax.adam(1e-2), lambda p: jax.tree.map(lambda leaf: leaf.ndim > 2, p)),
    ],
    ids=["momentum", "adafactor", "lion", "accumulation", "masked"],
)
def test_any_optimizer_state_follows_its_parameters(
    small_model, small_parameters, optimizer, tmp_path
):
    """Two rings of unlike order at rest hold the same optimizer state in layer order."""

    def trainer(ring):
        return Trainer(small_model, small_parameters, optimizer, devices=ring, microbatches=4)

    four, two = trainer(4), trainer(2)
    # No step is compiled here: numbers that tell leaves and layers apart are put in their place.
    flat, structure = jax.tree.flatten(four._rest.layer_shapes)
    marked = jax.tree.unflatten(
        structure,
        [
            (np.arange(leaf.size).reshape(leaf.shape) + 1000 * index).astype(leaf.dtype)
            for index, leaf in enumerate(flat)
        ],
    )
    four.state = four._rest.to_rest(jax.device_put(marked, four._rest.layer_shardings))
    store = CheckpointStore(tmp_path)
    step = four.save(store)
    store.wait()
    assert two.restore(store) == step
    store.close()
    for found, wanted in zip(
        jax.tree.leaves(two._rest.in_layer_order(two.state)), jax.tree.leaves(marked), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)
    # The moments rest beside their parameters: as much is cut over the ring.
    for leaf in jax.tree.leaves(two.state.optimizer):
        if leaf.ndim and leaf.shape[0] == small_model.layers:
            assert leaf.sharding.shard_shape(leaf.shape)[0] == small_model.layers // 2
