"""`jaxsys profile cluster`: measures what the planner otherwise takes from presets.

Links: every collective at several sizes, fitted to t = alpha + beta * bytes sent. Device: rates of
products, attention and passes over memory, and the block itself, forward and with its backward
pass, beside what these rates predict for it. And how much products are slowed by a gather.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxsys
from jaxsys.errors import UsageError
from jaxsys.fields import Fields
from jaxsys.files import check_writable, read_json, shown, write_whole
from jaxsys.hardware import DEVICES, WAITING, DeviceSpec, LinkSpec, free_host_bytes, gib
from jaxsys.mesh import make_mesh, request_devices
from jaxsys.model.config import DecoderConfig
from jaxsys.model.shapes import preset_beside
from jaxsys.options import Parser, whole
from jaxsys.planner.costs import Precision, block_cost
from jaxsys.planner.rates import (
    COLLECTIVES,
    KERNELS,
    measure_collectives,
    measure_contention,
    measure_device,
    product_widths,
    random_inputs,
)
from jaxsys.planner.read import read_model
from jaxsys.planner.workload import decoder_workload

FORMAT = "jaxsys-profile-cluster"
FORMAT_VERSION = 2
EVERY_S = 5.0
"""Between lines that say how far measuring is."""
SIZES_BYTES = tuple(2**n for n in (12, 14, 16, 18, 20, 22, 24, 26, 28))


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterProfile:
    """Measured specifications, ready for a `Cluster`."""

    device: DeviceSpec
    link: LinkSpec | None
    """None where there was only one device."""
    devices: int


def fit_line(sent_bytes: Sequence[float], times_s: Sequence[float]) -> tuple[float, float]:
    """(alpha seconds, beta seconds per byte) of t = alpha + beta * bytes, neither below zero.

    Relative errors are minimised: microseconds of a small message count as much as milliseconds of
    a large one.
    """
    sent, times = np.asarray(sent_bytes, float), np.asarray(times_s, float)
    columns = np.stack([1 / times, sent / times], axis=1)
    for active in ([0, 1], [1], [0]):
        found = np.linalg.lstsq(columns[:, active], np.ones(len(times)), rcond=None)[0]
        if (found >= 0).all():
            whole = dict(zip(active, found, strict=True))
            return float(whole.get(0, 0.0)), float(whole.get(1, 0.0))
    return 0.0, 0.0


def sent_share(kind: str, devices: int) -> float:
    """What a device sends for a block of one byte."""
    return {
        "ppermute": 1.0,
        "all_gather": (devices - 1) / devices,
        "psum_scatter": (devices - 1) / devices,
        "psum": 2 * (devices - 1) / devices,
    }[kind]


def host_bytes(config: DecoderConfig, devices: int, *, tokens: int, largest_bytes: int) -> float:
    """What measuring holds at its peak, over devices that share one memory.

    Each has the kernels' inputs in bfloat16, and attention that is not fused its scores; a block to
    be sent is there once on the host, once on its device and once where it arrives.
    """
    width, inner = config.hidden_size, config.intermediate_size
    matrices = 2 * width * sum(product_widths(config))
    layer = config.block_parameter_count()
    heads = 2 * config.num_heads * config.head_dim + 2 * config.num_kv_heads * config.head_dim
    activations = tokens * (width + heads + 4 * inner)
    scores = 2.0 * config.num_heads * tokens**2
    inputs = 2.0 * (matrices + layer + activations)
    sent = 3.0 * largest_bytes if devices > 1 else 0.0
    return devices * (inputs + max(scores, sent))


def _refuse_more_than_free(needed: float, free: float | None, *, devices: int, tokens: int) -> None:
    if free is not None and needed > free:
        raise UsageError(
            f"measuring devices={devices} of this host at tokens={tokens} takes about "
            f"{gib(needed, up=True)}, of {gib(free)} that are free; use fewer devices or tokens, "
            "a smaller --largest-mib or --model"
        )


class Pace:
    """Says how far measuring is and how long it may still take, at what it took so far."""

    def __init__(self, total: int, say: Callable[[str], None]) -> None:
        """
        Args:
            total: how much there is to measure.
            say: told a line at the first, at the last, and every few seconds between.
        """
        self.total, self.say, self.count = total, say, 0
        self.start_s = self.said_s = time.monotonic()

    def done(self, what: str) -> None:
        """One more is measured."""
        now_s = time.monotonic()
        self.count += 1
        if self.count not in (1, self.total) and now_s - self.said_s < EVERY_S:
            return
        self.said_s = now_s
        gone_s = now_s - self.start_s
        left_s = gone_s / self.count * (self.total - self.count)
        self.say(
            f"{self.count} of {self.total} measured, {what} last: {gone_s:.0f} s gone, about "
            f"{left_s:.0f} s to go"
        )


def build_profile(
    model: str,
    config: DecoderConfig,
    *,
    devices: int,
    tokens: int,
    repeats: int,
    largest_bytes: int,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measures everything and returns the profile's JSON value.

    Raises:
        UsageError: if there are not so many devices, or they are the host's and its memory would
            not do.
    """
    chosen = request_devices(devices)
    kind = chosen[0].device_kind
    mesh = make_mesh(devices, devices=chosen)
    if chosen[0].platform == "cpu":  # all of them have the host's memory
        needed = host_bytes(config, devices, tokens=tokens, largest_bytes=largest_bytes)
        _refuse_more_than_free(needed, free_host_bytes(), devices=devices, tokens=tokens)
    sizes = [size for size in SIZES_BYTES if size <= largest_bytes] if devices > 1 else []
    between = f", then 4 collectives at {len(sizes)} sizes up to {gib(sizes[-1])}" if sizes else ""
    total = KERNELS + len(COLLECTIVES) * len(sizes)
    say(
        f"measuring products, attention, passes over memory and a block of {model} at {tokens} "
        f"tokens on {devices} x {kind}{between}: {total} programs, each compiled and run "
        f"{repeats} times; how long that takes is said after the first"
    )
    pace = Pace(total, say)
    inputs = random_inputs(config, mesh, tokens=tokens, dtype=jnp.bfloat16)
    rates = measure_device(config, mesh, inputs, repeats=repeats, done=pace.done)
    near = min(
        DEVICES.values(),
        key=lambda spec: abs(np.log(spec.product_flops_per_s / rates["product_flops_per_s"])),
    )
    stats = chosen[0].memory_stats() or {}
    spec = {
        "name": f"measured {kind}",
        "peak_flops_per_s": max(near.peak_flops_per_s, rates["product_flops_per_s"]),
        "product_flops_per_s": rates["product_flops_per_s"],
        "attention_flops_per_s": rates["attention_flops_per_s"],
        "memory_bytes": float(stats.get("bytes_limit") or near.memory_bytes),
        "memory_bytes_per_s": rates["memory_bytes_per_s"],
        "fused_attention": chosen[0].platform != "cpu",
    }
    links: dict[str, Any] = {}
    link = None
    if devices > 1:
        measured = measure_collectives(mesh, sizes_bytes=sizes, repeats=repeats, done=pace.done)
        say("measuring products beside a gather, the last of it")
        for name, rows in measured.items():
            sent = [size * sent_share(name, devices) for size, _ in rows]
            alpha, beta = fit_line(sent, [seconds for _, seconds in rows])
            links[name] = {"alpha_s": alpha, "beta_s_per_byte": beta, "samples": rows}
        gather = links["all_gather"]
        link = {
            "name": f"measured {kind} ring of {devices}",
            "bytes_per_s": 1 / max(gather["beta_s_per_byte"], 1e-15),
            "latency_s": gather["alpha_s"] / (devices - 1),
            "launch_s": 0.0,
            "contention": measure_contention(
                mesh,
                inputs,
                products_s=rates["products_s"],
                gathers=measured["all_gather"],
                repeats=repeats,
            ),
            # Of NCCL's kernels, which a CPU has none of; not measured here.
            "waiting_contention": 0.0 if chosen[0].platform == "cpu" else WAITING,
        }
    workload = decoder_workload(model, config, sequence_length=tokens, microbatch_size=1)
    predicted = block_cost(
        workload.blocks[0],
        DeviceSpec(**spec),
        activation_bytes=workload.activation_bytes,
        precision=Precision(gradient_bytes=0.0),  # no gradients are summed in what was timed
        recompute="none",
    )
    both_s = predicted.forward_s + predicted.backward_s
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "kind": "measured",
        "hardware": kind,
        "devices": devices,
        "versions": {"jaxsys": jaxsys.__version__, "jax": jax.__version__},
        "config": {"model": model, "tokens": tokens, "repeats": repeats},
        "device": spec,
        "link": link,
        "collectives": links,
        "block_forward_s": rates["block_forward_s"],
        "block_both_s": rates["block_both_s"],
        "block_forward_predicted_s": predicted.forward_s,
        "block_both_predicted_s": both_s,
        "prediction_error_pct": 100 * abs(both_s / rates["block_both_s"] - 1),
    }


def load_profile(path: str | Path) -> ClusterProfile:
    """Reads a profile.

    Raises:
        UsageError: if it cannot be read or is of another version.
    """
    value = read_json(path, what="profile")
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        what = value.get("format") if isinstance(value, dict) else None
        raise UsageError(f"{path} is not a profile: its format is {shown(what)}, not {FORMAT!r}")
    if value.get("version") != FORMAT_VERSION:
        raise UsageError(
            f"profile {path} has version {shown(value.get('version'))}; this jaxsys reads version "
            f"{FORMAT_VERSION}: measure again"
        )
    return profile_of(value, source=f"measured: {path}")


def profile_of(value: Mapping[str, Any], *, source: str) -> ClusterProfile:
    """The specifications in a profile's JSON value.

    Raises:
        UsageError: if some are missing or no such figures.
    """
    file = Fields(value, name=f"the profile ({source})", hint="measure again")
    device = file.fields("device")
    link = file.fields("link") if "link" in file else None
    if "clocks" in device:
        raise device.fault("its field 'device.clocks' is not read: plans are at one clock")
    return ClusterProfile(
        device=device.record(
            DeviceSpec, clocks=None, sources={name: source for name in device if name != "name"}
        ),
        link=None if link is None else link.record(LinkSpec, sources={"bytes_per_s": source}),
        devices=file.integer("devices", least=1),
    )


def parser(prog: str) -> argparse.ArgumentParser:
    """The options of `jaxsys profile cluster`."""
    result = Parser(prog=prog, description="Measure links and devices for `jaxsys plan --profile`.")
    add = result.add_argument
    add("--out", type=Path, required=True, help="the profile to write")
    add(
        "--devices",
        type=whole(),
        default=1,
        help="how many devices to measure between (default: 1)",
    )
    add(
        "--model",
        default="llama-3-8b",
        help="folder or preset whose shapes are measured (default: %(default)s)",
    )
    add("--tokens", type=whole(), default=8192, help="tokens of a microbatch (default: 8192)")
    add("--repeats", type=whole(), default=10, help="runs of each (default: 10)")
    add(
        "--largest-mib",
        type=whole(most=256),
        default=256,
        help="largest block sent, 256 at most (default: 256)",
    )
    return result


def main(argv: Sequence[str], prog: str) -> int:
    """Runs the command."""
    options = parser(prog).parse_args(argv)
    if options.out.exists():
        raise UsageError(f"{options.out} exists and is not overwritten; name another file")
    if not options.out.parent.is_dir():
        raise UsageError(f"folder {options.out.parent} does not exist")
    check_writable(options.out.parent)
    config, beside = read_model(options.model), preset_beside(options.model)
    if beside is not None:
        print(beside, file=sys.stderr)
    value = build_profile(
        options.model,
        config,
        devices=options.devices,
        tokens=options.tokens,
        repeats=options.repeats,
        largest_bytes=options.largest_mib * 2**20,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    write_whole(options.out, json.dumps(value, indent=1) + "\n")
    device = value["device"]
    print(
        f"{value['hardware']}: products {device['product_flops_per_s'] / 1e12:.3g} TFLOP/s, "
        f"attention {device['attention_flops_per_s'] / 1e12:.3g} TFLOP/s, memory "
        f"{device['memory_bytes_per_s'] / 1e9:.4g} GB/s"
    )
    print(
        f"block of {options.model} at {options.tokens} tokens, forward and backward: "
        f"{1e3 * value['block_both_s']:.3g} ms, "
        f"predicted {1e3 * value['block_both_predicted_s']:.3g} ms"
    )
    if value["link"] is not None:
        print(f"products beside a gather take {100 * value['link']['contention']:.3g} % longer")
    for name, fit in value["collectives"].items():
        rate = 1 / fit["beta_s_per_byte"] if fit["beta_s_per_byte"] else float("inf")
        print(f"{name:>12}: alpha {1e6 * fit['alpha_s']:.3g} us, {rate / 1e9:.4g} GB/s sent")
    print(f"wrote {options.out}")
    return 0
