"""Which GPUs a process sees, by the names that others know them by.

CUDA numbers the GPUs of a process from 0; NVML, which sets clocks and reads energy, knows all of
the machine. `CUDA_VISIBLE_DEVICES` lies between them: Ray sets it for its actors, and
`fleet.LocalProcesses` for its children.
"""

import os

import pynvml

from jaxsys.errors import RunError
from jaxsys.mesh import Device
from jaxsys.nvml_gpu import start_nvml


def visible_gpus() -> list[str]:
    """Indices or UUIDs of the GPUs that a process started from here would see."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    try:
        start_nvml()
    except RunError:  # no driver
        return []
    try:
        return [str(index) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


def gpu_of(device: Device) -> int | str:
    """The machine's index, or the UUID, of a JAX device of this process."""
    index = device.local_hardware_id or 0
    visible = visible_gpus()
    name = visible[index] if index < len(visible) else str(index)
    return int(name) if name.isdigit() else name
