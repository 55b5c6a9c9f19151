"""Virtual CPU devices, in a process of their own: JAX takes their number once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_collectives_of_two_virtual_devices_do_not_wait_for_each_other(tmp_path):
    """A ring's last permute and the reduction of the edge have no order between them."""
    line = [sys.executable, str(ROOT / "scripts/bench_train.py"), "step", "--shape", "tiny"]
    line += ["--sequence-lengths", "128", "--devices", "2", "--repeats", "2", "--unroll"]
    line += ["--dtype", "float32", "--schedules", "weipipe-interleave", "--out", str(tmp_path)]
    environment = {key: value for key, value in os.environ.items() if key != "PJRT_NPROC"}
    done = subprocess.run(
        line, check=False, capture_output=True, text=True, timeout=150, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
