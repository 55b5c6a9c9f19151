"""A clock policy and a router from outside the package: served, replayed, offered by the CLI.

One file and a registry line each; nothing of the package is edited.
"""

import json
import subprocess
import sys
import textwrap
import time

import pytest

from jaxsys import cli, nvml
from jaxsys.errors import UsageError
from jaxsys.model import preset
from jaxsys.serve import cli as serve_cli
from jaxsys.serve.clock import WallClock
from jaxsys.serve.energy.governors import GovernorChoice, Served, make_router, real_governor
from jaxsys.serve.energy.policy import ClockPolicy, Clocks, Queue, Ran
from jaxsys.serve.energy.registry import (
    CLOCK_POLICIES,
    ROUTERS,
    register_clock_policy,
    register_router,
)
from jaxsys.serve.energy.slo import SharedSlo
from jaxsys.serve.instance import Instance
from jaxsys.serve.iterations import SchedulerConfig
from jaxsys.serve.outcomes import Sampled
from jaxsys.serve.requests import Request, SamplingParameters
from jaxsys.serve.scheduler import Scheduler


class PromptsFast(ClockPolicy):
    """The highest clock for prompts, the lowest for tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[Ran] = []

    def choose(self, load, queue: Queue, clocks: Clocks) -> int:
        self.record.decisions += 1
        return clocks.top_mhz if load.prefill_tokens else clocks.choices_mhz[0]

    def learn(self, ran: Ran) -> None:
        self.ran.append(ran)


class LastRouter:
    """Always the last instance."""

    def choose(self, instances, request) -> int:
        return len(instances) - 1


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for registry in (CLOCK_POLICIES, ROUTERS):
        monkeypatch.setattr(registry, "_own", dict(registry._own))
    register_clock_policy("toy-fast", lambda situation: PromptsFast())
    register_router("last", lambda situation: LastRouter())


def test_it_is_replayed_by_the_command(capsys):
    names = "sweet-spot,toy-fast,toy-fast+last"
    command = ["replay", "--predictor", "model", "--rate", "6", "--duration", "10"]
    assert cli.main([*command, "--policy", names, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["policies"]
    toy = rows["toy-fast"]["clock_seconds"]
    assert set(toy["prefill"]) == {"1980"} and "1080" in toy["decode"]
    low, high = (rows[name]["energy_j"] for name in ("sweet-spot", "max"))
    assert low < rows["toy-fast"]["energy_j"] < high
    assert rows["toy-fast+last"]["energy_j"] != rows["toy-fast"]["energy_j"]


def test_the_server_offers_it():
    options = serve_cli.parser("serve").parse_args(["--policy", "toy-fast", "--route", "last"])
    assert (options.policy, options.route) == ("toy-fast", "last")
    assert GovernorChoice(policy="toy-fast").policy == "toy-fast"
    served = Served(model=preset("llama-3-8b"))
    assert isinstance(make_router("last", "h100", served, SharedSlo()), LastRouter)


def test_it_sets_a_live_instances_clock(driver):
    """Through the real driver library and the lease, and gives it back."""

    class Ones:
        def dispatch(self, iteration):
            return iteration

        def collect(self, handle):
            return Sampled([1] * len(handle.sampling), None)

        def release(self):
            return []

        def rebuild(self):
            raise AssertionError

    clocks = nvml.open_clocks(0, control=True)
    served = Served(model=preset("llama-3-8b"))
    governor = real_governor(clocks, "Fake H100", served, SharedSlo(), "toy-fast")
    events = []
    config = SchedulerConfig(page_count=400, max_length=5000, max_batch=4, decode_buckets=(4,))
    instance = Instance("one", Scheduler(config), Ones(), governor=governor, clock=WallClock(),
                        sink=events.extend)  # fmt: skip
    instance.start()
    sampling = SamplingParameters(max_tokens=3000)
    instance.submit(Request("r", sampling=sampling, arrival_s=0.0, prompt_tokens=[1] * 100))
    deadline = 2000
    while instance.requests or not events:
        deadline -= 1
        assert deadline, "it was not served"
        time.sleep(0.01)
    policy = governor.policy
    assert driver.locked_mhz == 1080
    assert instance.stop(10) and driver.locked_mhz == 0
    assert sum(event.token is not None for event in events) == 3000
    assert isinstance(policy, PromptsFast) and policy.record.decisions == len(policy.ran) > 2999
    assert policy.ran[0].load.prefill_tokens == 100
    assert {ran.load.batch for ran in policy.ran[1:]} == {1}
    assert events[0].request.timing.energy_j > 0


def test_names_are_words_of_their_own():
    for name, message in (("max", "is there already"), ("a+b", "must be a word"), ("", "a word")):
        with pytest.raises(UsageError, match=message):
            register_clock_policy(name, lambda situation: PromptsFast())


def test_an_installed_package_offers_its_own_to_every_process(tmp_path):
    """By entry points, which a server's worker processes see too."""
    (tmp_path / "toy_policies.py").write_text(
        textwrap.dedent(
            """
            from jaxsys.serve.energy.fixed_clock import FixedClock

            def slow(situation):
                return FixedClock(situation.gpu.spec.available_mhz[10])
            """
        )
    )
    info = tmp_path / "toy_policies-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-policies\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[jaxsys.clock_policies]\nslow = toy_policies:slow\n")
    program = textwrap.dedent(
        f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from jaxsys.cli import main
        sys.exit(main(["replay", "--predictor", "model", "--rate", "2", "--duration", "5",
                       "--policy", "slow", "--json"]))
        """
    )
    found = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=120
    )
    rows = json.loads(found.stdout)["policies"]
    assert set(rows["slow"]["clock_seconds"]["decode"]) == {"495"}
