"""`jaxsys plan`: compare parallel plans for a model on a cluster."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxsys import hardware
from jaxsys.errors import RunError, UsageError
from jaxsys.model.config import LlamaConfig, preset
from jaxsys.planner import report
from jaxsys.planner.costs import Precision
from jaxsys.planner.named import compare
from jaxsys.planner.workload import llama_workload

GIB = 2**30


def main(argv: Sequence[str], prog: str) -> int:
    """Runs the command; returns 0, or raises UsageError or RunError."""
    options = _parser(prog).parse_args(argv)
    config = read_model(options.model)
    device = hardware.device(options.device)
    link = hardware.link(options.link)
    sequence_length = options.sequence_length or min(8192, config.max_positions)
    if options.devices < 1:
        raise UsageError(f"--devices {options.devices} must be at least 1")
    microbatches = options.microbatches
    if microbatches is None:
        microbatches = 8 * options.devices
    workload = llama_workload(
        options.model,
        config,
        sequence_length=sequence_length,
        microbatch_size=options.microbatch_size,
    )
    if options.json is not None:
        refuse_to_overwrite(options.json)
    comparison = compare(
        workload,
        device,
        link,
        devices=options.devices,
        microbatches=microbatches,
        memory_bytes=None if options.memory_gib is None else options.memory_gib * GIB,
        precision=Precision(gradient_bytes={"float32": 4.0, "bfloat16": 2.0}[options.gradients]),
    )
    print(
        f"{options.model}: {workload.parameters / 1e9:.2f} B parameters, {workload.layers} layers; "
        f"{options.devices} x {device.name} over {link.name}; a step is {microbatches} "
        f"microbatches of {options.microbatch_size} x {sequence_length} tokens; limit "
        f"{comparison.memory_bytes / GIB:.1f} GiB per device\n"
    )
    print(report.table(comparison))
    print()
    print(report.verdict(comparison))
    if options.json is not None:
        request = {
            "model": options.model,
            "devices": options.devices,
            "device": device.name,
            "link": link.name,
            "sequence_length": sequence_length,
            "microbatch_size": options.microbatch_size,
            "microbatches": microbatches,
            "gradients": options.gradients,
        }
        write_json(options.json, report.as_json(comparison, request=request))
        print(f"wrote {options.json}")
    if comparison.best is None:
        raise RunError(
            f"no plan fits {comparison.memory_bytes / GIB:.1f} GiB per device; the smallest limit "
            f"that would do is {comparison.smallest_memory_bytes / GIB:.1f} GiB: raise "
            "--memory-gib or --devices, or shorten --sequence-length"
        )
    return 0


def read_model(name: str) -> LlamaConfig:
    """A preset's configuration, or that of a Hugging Face folder.

    Raises:
        UsageError: if the name is neither, or the folder's config.json cannot be used.
    """
    path = Path(name)
    if not path.is_dir():
        return preset(name)
    file = path / "config.json"
    try:
        raw = json.loads(file.read_text())
    except FileNotFoundError:
        raise UsageError(f"{name} holds no config.json: give a Hugging Face model folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is not JSON: {error}") from None
    return LlamaConfig.from_hf(raw)


def refuse_to_overwrite(path: Path) -> None:
    """Raises UsageError if a file cannot be written there, before any work is done."""
    if path.exists():
        raise UsageError(f"{path} exists and is not overwritten; remove it or name another file")
    if not path.parent.is_dir():
        raise UsageError(f"folder {path.parent} does not exist")


def write_json(path: Path, value: Any) -> None:
    """Writes a whole file or none."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(part, path)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description="Compare parallel plans for a model on a cluster."
    )
    add = parser.add_argument
    add("--model", required=True, help="a preset's name or a Hugging Face folder")
    add("--devices", type=int, required=True, help="how many devices")
    add("--link", default="nvlink", help=f"one of {', '.join(hardware.LINKS)}")
    add("--device", default="h100", help=f"one of {', '.join(hardware.DEVICES)}")
    add("--sequence-length", type=int, help="tokens of a sequence (default: 8192 or the model's)")
    add("--microbatch-size", type=int, default=1, help="sequences of a microbatch (default: 1)")
    add("--microbatches", type=int, help="of a step, over all devices (default: 8 per device)")
    add("--memory-gib", type=float, help="limit per device (default: 92 %% of the device's)")
    add(
        "--gradients",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype in which gradients are summed and sent (default: float32)",
    )
    add("--json", type=Path, help="write the comparison to this file")
    return parser
