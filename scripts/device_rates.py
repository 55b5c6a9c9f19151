"""What a GPU's products and memory reach, at which clock and power, under its own clock rule.

    python scripts/device_rates.py [--seconds 3] [--out results/device_rates_h200.json]

Products are of bfloat16 matrices of random numbers (equal ones draw less, so the clock falls less),
one after the other on the device; memory is read by sums, and copied. Each runs for some seconds,
in which the clock of the multiprocessors is read every 10 ms and power is the energy counter's
rise. The first tenth is left out: the clock falls only when the power cap is met. Nothing is set.
"""

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxsys.nvml import NvmlGpu
from jaxsys.results import table, write_result
from jaxsys.serve.energy.energy_log import EnergyLog
from jaxsys.serve.processes.gpus import gpu_of

PRODUCTS = [
    # Rows, inputs, outputs: square, and a 1B and an 8B decoder's feed-forward.
    (8192, 8192, 8192),
    (16384, 2048, 8192),
    (16384, 4096, 14336),
    (2048, 4096, 14336),
]
AT_ONCE = 50
"""Products of one call, so that the host is not what is timed."""


class Clocks:
    """Clock readings, with their times, until `close`."""

    def __init__(self, gpu: NvmlGpu) -> None:
        self.readings: list[tuple[float, int]] = []
        self._gpu = gpu
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            mhz = self._gpu.actual_mhz()
            if mhz is not None:
                self.readings.append((time.perf_counter(), mhz))

    def median(self, start_s: float, end_s: float) -> float | None:
        within = [mhz for at_s, mhz in self.readings if start_s <= at_s <= end_s]
        return statistics.median(within) if within else None

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


def measure(
    name: str, call: Callable[[], Any], *, flops: float, size: float, seconds: float,
    clocks: Clocks, log: EnergyLog,
) -> dict[str, Any]:  # fmt: skip
    """Repeats a call for so long; `flops` and `size` (bytes) are of one call."""
    jax.block_until_ready(call())
    ends_s = [time.perf_counter()]
    while ends_s[-1] - ends_s[0] < seconds:
        jax.block_until_ready(call())
        ends_s.append(time.perf_counter())
    skipped = max(1, len(ends_s) // 10)
    start_s, end_s, calls = ends_s[skipped], ends_s[-1], len(ends_s) - 1 - skipped
    energy_j = log.between(start_s, end_s)
    took_s = end_s - start_s
    mhz = clocks.median(start_s, end_s)
    rate = flops * calls / took_s
    return {
        "what": name,
        "tflops": rate / 1e12 or None,
        "bytes_per_s": size * calls / took_s,
        "sm_clock_mhz": mhz,
        "power_w": None if energy_j is None else energy_j / took_s,
        "flop_per_cycle": None if not flops or mhz is None else rate / (mhz * 1e6),
    }


def product(rows: int, inputs: int, outputs: int) -> tuple[Callable[[], Any], float]:
    """`AT_ONCE` products, one after the other, and their FLOPs."""
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (rows, inputs), jnp.bfloat16)
    w = jax.random.normal(keys[1], (inputs, outputs), jnp.bfloat16)

    @jax.jit
    def run(x: jax.Array, w: jax.Array) -> jax.Array:
        def step(_: int, x: jax.Array) -> jax.Array:
            y = jax.lax.optimization_barrier(x @ w)  # all of it, not what is used
            # So little of the result that the next product waits for this one and stays alike.
            return x + y[:1, :1] * 1e-30

        return jax.lax.fori_loop(0, AT_ONCE, step, x)

    return lambda: run(x, w), 2.0 * rows * inputs * outputs * AT_ONCE


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="each (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results/device_rates.json"))
    options = parser.parse_args()
    if jax.devices()[0].platform == "cpu":
        print("device_rates: needs an NVIDIA GPU", file=sys.stderr)
        return 1
    gpu = NvmlGpu(gpu_of(jax.devices()[0]))
    clocks, log = Clocks(gpu), EnergyLog(gpu.energy_j)
    rows = []
    time.sleep(1.0)
    idle_from_s = time.perf_counter()
    time.sleep(2.0)
    idle_j = log.between(idle_from_s, idle_from_s + 2.0)
    for shape in PRODUCTS:
        call, flops = product(*shape)
        name = "product " + " x ".join(map(str, shape))
        rows.append(measure(name, call, flops=flops, size=0.0, seconds=options.seconds,
                            clocks=clocks, log=log))  # fmt: skip
        time.sleep(1.0)
    numbers = jnp.ones((2 << 30,), jnp.bfloat16)
    total = jax.jit(lambda x: x.sum(dtype=jnp.float32))
    rows.append(measure("read 4 GiB", lambda: total(numbers), flops=0.0, size=4.0 * 2**30,
                        seconds=options.seconds, clocks=clocks, log=log))  # fmt: skip
    more = jax.jit(lambda x: x + 1)
    rows.append(measure("copy 4 GiB, read and write", lambda: more(numbers), flops=0.0,
                        size=8.0 * 2**30, seconds=options.seconds,
                        clocks=clocks, log=log))  # fmt: skip
    clocks.close()
    log.close()
    write_result(
        options.out,
        benchmark="device_rates",
        kind="measured",
        config={"seconds": options.seconds, "dtype": "bfloat16", "clocks": "the GPU's own rule"},
        rows=rows,
        idle_w=None if idle_j is None else idle_j / 2.0,
    )
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
