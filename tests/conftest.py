"""Eight CPU devices for every test, set once before JAX starts, and strict array semantics.

And a fake NVIDIA driver, which the real nvidia-ml-py loads, here and in processes started here. Its
state lies in a file that all of them map, so faults can be put in and locks looked at.
"""

import ctypes
import gc
import mmap
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import jax
import pynvml
import pytest

FAKE_DRIVER = Path(__file__).parent / "jaxsys" / "fake_nvml" / "fake_nvml.c"

if not os.environ.get("JAXSYS_TEST_GPU"):
    # A CPU's kernels by XLA's elder emitter, here and in processes started here: programs are
    # compiled in two thirds of the time, and run but a few times. Read when JAX starts; later
    # releases have the newer one alone.
    flags = os.environ.get("XLA_FLAGS", "")
    if jax.__version_info__ < (0, 11) and "xla_cpu_use_fusion_emitters" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false".strip()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module")
def quickly_compiled():
    """XLA's own passes stay; LLVM's expensive ones, which take longer than they save, do not."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def pytest_collection_finish():
    """What is there now stays; tracing makes much that is no garbage."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory) -> Path:
    """The folder that keeps compiled programs while the tests run, for processes of theirs too."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def compiled_once(compiled):
    """Equal programs are compiled once, through JAX's persistent cache."""
    settings = {
        "jax_compilation_cache_dir": str(compiled),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


class State(ctypes.Structure):
    """The fake driver's state, as fake_nvml.c lays it out."""

    _fields_ = [
        *((name, ctypes.c_int) for name in (
            "init_error", "set_error", "read_error", "energy_error", "mig", "vgpu", "no_clocks",
            "legacy", "set_delay_us", "clamp_mhz")),
        *((name, ctypes.c_uint) for name in ("locked_mhz", "sets", "resets", "power_mw")),
        *((name, ctypes.c_ulonglong) for name in (
            "reasons", "energy_mj", "energy_step_ms", "energy_modulus_mj")),
    ]  # fmt: skip


@pytest.fixture(scope="session")
def fake_library(tmp_path_factory) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler for the fake driver")
    folder = tmp_path_factory.mktemp("fake_nvml")
    path = folder / "libnvidia-ml.so.1"
    command = [compiler, "-shared", "-fPIC", "-O1", "-w", "-o", str(path), str(FAKE_DRIVER)]
    subprocess.run(command, check=True)
    return path


@pytest.fixture
def driver(fake_library, tmp_path, monkeypatch) -> Iterator[State]:
    """The fake driver, loaded into this process and into every process started from it."""
    path = tmp_path / "state"
    path.write_bytes(b"\0" * ctypes.sizeof(State))
    monkeypatch.setenv("FAKE_NVML_STATE", str(path))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(fake_library.parent))
    # A copy of its own for each test: a library's static state outlives a test.
    own = tmp_path / "libnvidia-ml.so.1"
    shutil.copy(fake_library, own)
    monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(own)))
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    with open(path, "r+b") as file:
        # Never closed by hand: tests that failed may still hold the state.
        state = State.from_buffer(mmap.mmap(file.fileno(), 0))
    state.power_mw = 400_000
    yield state
