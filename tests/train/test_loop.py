"""The loop: what it reports, how it stops, and how long it waits."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsys.errors import RunError, UsageError
from jaxsys.train import Batches, Trainer, energy
from jaxsys.train.flops import training_flops_per_token
from jaxsys.train.interrupt import Watchdog
from jaxsys.train.metrics import Meter, MetricsLog
from jaxsys.train.progress import Progress


@pytest.fixture(scope="module")
def trainer(small_model, small_parameters):
    """One trainer for all tests of this file: they compile one step between them."""
    return Trainer(small_model, small_parameters, optax.adam(1e-2), schedule="dp", devices=1)


@pytest.fixture
def data(counted_samples):
    return Batches(counted_samples, rows=2, microbatch_size=2)


def lines(folder, kind):
    text = (folder / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, text) if line["kind"] == kind]


def test_reports_losses_rates_and_held_out(trainer, data, tmp_path, capsys):
    start = trainer.step_number
    held_out = [next(data.read(0))]
    report = trainer.fit(
        data, steps=start + 4, folder=tmp_path, held_out=held_out, held_out_every=2, profile=True
    )
    steps = lines(tmp_path, "step")
    assert [line["step"] for line in steps] == [start + n for n in (1, 2, 3, 4)]
    assert [line["loss"] for line in steps] == list(report.losses)
    assert steps[0]["tokens_per_s"] is None and steps[1]["tokens_per_s"] > 0
    assert [line["step"] for line in lines(tmp_path, "held_out")] == [start + 2, start + 4]
    assert report.held_out_loss == lines(tmp_path, "held_out")[-1]["loss"]
    (run,) = lines(tmp_path, "run")
    assert run["tokens_per_step"] == 16 and "not given" in run["mfu_is"]
    said = capsys.readouterr().err
    assert f"step {start + 4}/{start + 4}  loss {report.loss:.4f}" in said
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_sigterm_saves_and_stops(trainer, data, tmp_path):
    start = trainer.step_number

    def batch(index):
        if index == start + 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return next(data.read(index * data.batch_samples))

    before = signal.getsignal(signal.SIGTERM)
    report = trainer.fit(batch, steps=start + 50, folder=tmp_path, progress=False)
    assert (report.step, report.signal) == (start + 3, signal.SIGTERM)
    assert (tmp_path / "checkpoints" / str(start + 3)).is_dir()
    assert signal.getsignal(signal.SIGTERM) is before


def test_data_that_ends_is_said_and_saved(trainer, data, tmp_path, capsys):
    start = trainer.step_number
    stream = [next(data.read(0))] * (start + 2)
    report = trainer.fit(stream, steps=start + 5, folder=tmp_path)
    assert report.step == start + 2
    assert f"the data ended at step {start + 2}" in capsys.readouterr().err
    assert (tmp_path / "checkpoints" / str(start + 2)).is_dir()


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_parameters_that_are_not_finite_are_not_saved(
    small_model, small_parameters, data, tmp_path, policy
):
    breaks = optax.sgd(lambda step: jnp.where(step == 1, jnp.inf, 1e-2))  # in the second step
    trainer = Trainer(
        small_model, small_parameters, breaks, schedule="dp", devices=1, non_finite=policy
    )
    with pytest.raises(RunError, match="step 2: the parameters are not finite") as error:
        trainer.fit(data, steps=2, folder=tmp_path, save_every=1, progress=False)
    assert f"the last good checkpoint is step 1 in {tmp_path}" in str(error.value)
    assert not (tmp_path / "checkpoints" / "2").exists()
    with pytest.raises(RunError, match="neither saved nor exported; no checkpoints were asked"):
        trainer.fit(data, steps=2, progress=False)  # nothing left to do, and nothing good


def test_a_batch_for_another_schedule_is_refused(trainer, counted_samples):
    with pytest.raises(UsageError, match="makes 3 microbatches a batch, the schedule takes 2"):
        trainer.fit(Batches(counted_samples, rows=3, microbatch_size=1), steps=99, progress=False)
    with pytest.raises(UsageError, match="save_every=-2 must be above 0"):
        trainer.fit([], steps=1, save_every=-2)
    with pytest.raises(UsageError, match="steps=0"):
        trainer.fit([], steps=0)
    with pytest.raises(UsageError, match="need a folder"):
        trainer.fit([], steps=1, resume=True)


def test_tensorboard_files(tmp_path):
    pytest.importorskip("tensorboardX")
    log = MetricsLog(tmp_path / "m.jsonl", tensorboard=tmp_path / "board")
    log.write("step", 1, {"loss": 2.5, "mfu": None})
    log.close()
    (events,) = (tmp_path / "board").iterdir()
    assert b"step/loss" in events.read_bytes()


def test_log_drops_what_a_restart_does_again(tmp_path):
    path = tmp_path / "m.jsonl"
    log = MetricsLog(path)
    for step in (1, 2, 3):
        log.write("step", step, {"loss": float(step)})
    log.close()
    with path.open("a") as file:
        file.write('{"kind": "step", "st')  # a kill in the middle of a line
    log = MetricsLog(path, resume_step=2)
    log.write("step", 3, {"loss": 3.0})
    log.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_meter_leaves_pauses_out(monkeypatch):
    clock = iter([0.0, 2.0, 100.0, 102.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    meter = Meter(tokens_per_step=100, devices=2, flops_per_token=4.0, peak_flops_per_s=1000.0)
    assert meter.step() is None  # the first holds compilation
    rates = meter.step()
    assert rates is not None and rates.tokens_per_s == 50.0
    assert rates.mfu == pytest.approx(50.0 / 2 * 4.0 / 1000.0)
    meter.restart()  # a checkpoint took 98 s
    meter.step()
    overall = meter.overall()
    assert overall is not None and overall.step_time_s == 2.0


def test_flops_of_llama_2_7b():
    # 6.74e9 parameters, 32 layers of width 4096, sequences of 4096: 6 N + 6 L S H by hand.
    found = training_flops_per_token(
        parameters=6_738_415_616, layers=32, sequence_length=4096, attention_width=4096
    )
    assert found == pytest.approx(40.43e9 + 3.22e9, rel=1e-3)


def test_plain_lines_are_few_and_the_last_is_there():
    file = io.StringIO()
    progress = Progress(start=0, steps=1000, file=file)
    for step in range(1, 1001):
        progress.step(step, "x")
    text = file.getvalue().splitlines()
    assert len(text) <= 25 and text[0] == "step 1/1000  x" and text[-1] == "step 1000/1000  x"


def test_watchdog_ends_a_hung_process():
    code = (
        "import time; from jaxsys.train.interrupt import Watchdog\n"
        "with Watchdog(0.5, start_s=0.5, explain=lambda: 'process 3 is lost') as dog:\n"
        "    time.sleep(60)\n"
    )
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 1 and time.monotonic() - begun < 45
    assert "no step has ended for" in done.stderr and "process 3 is lost" in done.stderr
    assert "time.sleep" in done.stderr or "<string>" in done.stderr  # where it hung


def test_watchdog_lets_a_live_process_be():
    with Watchdog(0.4, start_s=0.4) as dog:
        for step in range(8):
            time.sleep(0.1)
            dog.beat(step)


def test_losses_fall(trainer, data):
    start = trainer.step_number
    report = trainer.fit(lambda _: next(data.read(0)), steps=start + 30, progress=False)
    assert np.mean(report.losses[-5:]) < np.mean(report.losses[:5]) - 0.05


class CountingGpu:
    """An NVML GPU whose counter rises by 40 J a reading."""

    name = "counting"

    def __init__(self, gpu) -> None:
        self.gpu, self.total_j = gpu, 1000.0

    def energy_j(self) -> float:
        self.total_j += 40.0
        return self.total_j

    def close(self) -> None:
        pass


def test_energy_of_the_visible_gpus(monkeypatch):
    monkeypatch.setattr(energy, "NvmlGpu", CountingGpu)
    monkeypatch.setattr(energy, "LEAST_INTERVAL_S", 0.0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-abc")
    gpus = [SimpleNamespace(platform="gpu", local_hardware_id=n) for n in (0, 1)]
    meter = energy.EnergyMeter(gpus)
    assert [getattr(gpu, "gpu", None) for gpu in meter._gpus] == [3, "GPU-abc"]
    assert (meter.reason, meter.read_j(), meter.read_j()) == ("", 80.0, 160.0)
    meter.restart()
    assert meter.read_j() == 80.0
    none = energy.EnergyMeter([SimpleNamespace(platform="cpu", local_hardware_id=0)])
    assert none.read_j() is None and "no GPU" in none.reason
