"""Measured links and devices: fits, files, and their way into a plan."""

import json
from typing import Any

import jax.numpy as jnp
import pytest

from jaxsys.cli import main
from jaxsys.errors import UsageError
from jaxsys.mesh import make_mesh
from jaxsys.model import preset
from jaxsys.planner import profile
from jaxsys.planner.profile import fit_line, load_profile
from jaxsys.planner.rates import COLLECTIVES
from jaxsys.planner.timing import everywhere, repeated


def test_fit_recovers_alpha_and_beta():
    sent = [2.0**n for n in range(10, 28)]
    alpha, beta = fit_line(sent, [3e-5 + 4e-11 * n for n in sent])
    assert alpha == pytest.approx(3e-5)
    assert beta == pytest.approx(4e-11)
    alpha, beta = fit_line(sent, [1e-11 * n for n in sent])
    assert alpha == pytest.approx(0, abs=1e-9)
    assert beta == pytest.approx(1e-11)


def test_fit_is_never_negative():
    alpha, beta = fit_line([1, 2, 4], [3.0, 2.0, 1.0])
    assert alpha >= 0
    assert beta >= 0


def test_a_kernel_runs_so_often_in_one_program_and_in_full():
    def product(x, y):
        return x @ y

    one, two = jnp.ones((1, 8, 16)), jnp.full((1, 16, 4), 2.0)
    program: Any = everywhere(repeated(product, 3), make_mesh(1))
    assert program(one, two) == 3 * 2 * 16
    compiled = program.lower(one, two).compile().as_text()
    products = [line for line in compiled.splitlines() if " dot(" in line or "__onednn" in line]
    assert len(products) == 1
    assert "f32[8,4]" in products[0]  # not only the element that is read
    assert "known_trip_count" in compiled  # and in the loop still


def test_command_measures_and_plan_uses_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("jaxsys.planner.profile.SIZES_BYTES", (2**12, 2**16, 2**20))
    path = tmp_path / "profile.json"
    command = ["profile", "cluster", "--devices", "2", "--model", "tiny", "--tokens", "64"]
    command += ["--repeats", "2", "--largest-mib", "1", "--out", str(path)]
    assert main(command) == 0
    value = json.loads(path.read_text())
    assert set(value["collectives"]) == set(COLLECTIVES)
    for fit in value["collectives"].values():
        assert fit["alpha_s"] >= 0
        assert len(fit["samples"]) >= 3
    profile = load_profile(path)
    assert profile.device.product_flops_per_s > 0
    assert profile.link is not None
    assert profile.link.contention >= 0
    said = capsys.readouterr().err
    assert "then 4 collectives at 3 sizes up to 0.000977 GiB: 17 programs, each compiled" in said
    assert "1 of 17 measured, products last: " in said and " s to go" in said
    assert "17 of 17 measured, psum of 1048576 bytes last: " in said
    assert main(command) == 2  # not overwritten
    plan = ["plan", "--model", "tiny", "--devices", "2", "--profile", str(path)]
    assert main(plan) == 0
    assert "measured" in capsys.readouterr().out


def test_progress_is_said_at_the_first_the_last_and_every_few_seconds(monkeypatch):
    now, said = [100.0], []
    monkeypatch.setattr(profile.time, "monotonic", lambda: now[0])
    pace = profile.Pace(5, said.append)
    for seconds in (4, 1, 1, 6, 3):
        now[0] += seconds
        pace.done("a block")
    assert [line.split(",")[0] for line in said] == [
        "1 of 5 measured", "4 of 5 measured", "5 of 5 measured"
    ]  # fmt: skip
    assert said[0].endswith("4 s gone, about 16 s to go")
    assert said[1].endswith("12 s gone, about 3 s to go")


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "profile.json"
    with pytest.raises(UsageError, match="cannot be read"):
        load_profile(path)
    path.write_text("{}")
    with pytest.raises(UsageError, match="is not a profile"):
        load_profile(path)
    path.write_text(json.dumps({"format": "jaxsys-profile-cluster", "version": 7}))
    with pytest.raises(UsageError, match="has version 7"):
        load_profile(path)


def test_what_the_host_cannot_hold_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(profile, "free_host_bytes", lambda: 1e9)
    with pytest.raises(UsageError, match=r"devices=2 .* takes about .* GiB, of 0.931 GiB .* free"):
        profile.main(["--out", str(tmp_path / "p.json"), "--devices", "2"], "jaxsys profile")
    config = preset("byte-llama")
    small = {"tokens": 64, "largest_bytes": 2**16}
    assert profile.host_bytes(config, 2, **small) < 1e9
    assert profile.host_bytes(config, 4, **small) == 2 * profile.host_bytes(config, 2, **small)
