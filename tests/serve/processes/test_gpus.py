"""GPUs by the names that CUDA, Ray and NVML know them by."""

import types

import pytest

from jaxsys.errors import UsageError
from jaxsys.serve.processes.fleet import LocalProcesses
from jaxsys.serve.processes.gpus import gpu_of, visible_gpus


def test_a_process_that_sees_some_gpus_names_them_as_the_machine_does(monkeypatch):
    device = types.SimpleNamespace(local_hardware_id=1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    assert visible_gpus() == ["3", "5"] and gpu_of(device) == 5
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a1,GPU-b2")
    assert gpu_of(device) == "GPU-b2"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []


def test_processes_are_given_gpus_of_their_own():
    launcher = LocalProcesses(["0", "1", "2"])
    living = types.SimpleNamespace(gpus=["1"], death=lambda: None)
    launcher._processes = [living]  # type: ignore[list-item]
    assert launcher._free(2) == ["0", "2"]
    with pytest.raises(UsageError, match="needs 3 GPU.*of 3, 2 are free"):
        launcher._free(3)
    assert LocalProcesses([])._free(4) == []
