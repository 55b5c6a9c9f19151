"""`jaxsys profile serving`: the real executor on a tiny model, and a simulated GPU."""

import dataclasses

import pytest

from jaxsys import cli
from jaxsys.errors import UsageError
from jaxsys.model import ByteTokenizer, LoadedModel, initial_parameters, preset
from jaxsys.serve.energy.ecopred import EcoPred
from jaxsys.serve.energy.gpu_model import Load
from jaxsys.serve.energy.profile import Fingerprint, load_profile
from jaxsys.serve.energy.profile_cli import measure


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    config = dataclasses.replace(preset("tiny"), num_layers=1)
    return LoadedModel(
        config=config,
        parameters=initial_parameters(config, seed=1),
        tokenizer=ByteTokenizer(),
        chat_template=None,
        source="tiny",
    )


@pytest.mark.slow
def test_the_real_executor_is_swept_and_a_predictor_learns_from_it(model):
    profile = measure(model, max_batch=4, max_length=96, repeats=1)
    loads = [sample.load for sample in profile.samples]
    assert {load.batch for load in loads if load.batch} == {1, 2, 3, 4}
    assert any(load.prefill_tokens >= 64 for load in loads)
    assert all(sample.time_s > 0 and sample.power_w is None for sample in profile.samples)
    # No GPU here: one unnamed clock, no power, and the profile says so.
    assert profile.clocks_mhz == (0,)
    assert any("no GPU" in note for note in profile.notes)
    assert any("not swept" in note for note in profile.notes)
    assert profile.dispatch is not None and profile.dispatch.alike[0] > 0
    predictor = EcoPred(profile)
    times, powers = predictor.what_if([Load(batch=2, kv_tokens=64, bucket=2)], (0,))
    assert 0 < times[0, 0] < 60 and powers[0, 0] != powers[0, 0]
    other = Fingerprint(gpu="NVIDIA H100", model="1x64", engine="another")
    with pytest.raises(UsageError, match="instead of 'NVIDIA H100'"):
        EcoPred(profile, expected=other)


def test_the_command_sweeps_a_simulated_gpu(tmp_path, capsys):
    out = tmp_path / "profile.json"
    assert cli.main(["profile", "serving", "--simulated", "h200", "--out", str(out)]) == 0
    assert "samples at 1080" in capsys.readouterr().out
    profile = load_profile(out)
    assert profile.fingerprint.gpu == "H200-SXM-141GB"
    assert profile.fingerprint.engine == "simulated"


@pytest.mark.parametrize(
    ("option", "says"),
    [(("--noise", "-1"), "--noise -1 must be at"), (("--out", f"{__file__}/p"), "Not a directory")],
)
def test_wrong_requests_exit_2_before_anything_is_measured(option, says, capsys):
    assert cli.main(["profile", "serving", "--simulated", "h200", *option]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_senseless_sweeps_are_refused(model):
    with pytest.raises(UsageError, match="repeats=0"):
        measure(model, repeats=0)
