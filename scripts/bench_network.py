#!/usr/bin/env python
"""Trains over a slow network of hosts that are made on this machine, and compares schedules.

Each host is a network namespace with a process, a limited send rate (`tc tbf`) and a share of the
CPU (cgroup quota), so that an idle host does not lend its time to a busy one. The processes
form one JAX program over gloo. As sequences in a microbatch grow, GS / (18 H L/P) passes 1: there a
weight ring sends as much as a pipeline's activations (3 streams of 12 H^2 L/P against 2 G S H).

With --local-devices D a host is a node of D devices of one process, which meet in its memory: all
that they send to others goes through the host's link. NAME*D is then a ring of nodes, and RxNAME R
replicas, as 4xzero-3 over 4 hosts splits inside each and sums between them. `sent_mib` is what the
busiest host sent in a step, as its link counts it, and `link_s` what its rate takes for that.

Needs root, iproute2 and cgroups. JSON goes to results/network.json; --plot draws it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Self

from jaxsys.errors import RunError, UsageError
from jaxsys.files import MIB, write_whole
from jaxsys.results import read_result, table, write_result
from jaxsys.schedule import Costs, Link, simulate
from jaxsys.strategies import NAMES
from jaxsys.train.schedules import resolve

ROOT = Path(__file__).resolve().parent.parent
HIDDEN, WIDE, SEQUENCE, CHUNK_LAYERS = 64, 171, 288, 1
"""Of the shape `network` in scripts/bench_train.py; 288 tokens are a quarter of 18 H L/P."""
RING, CALIBRATION = "weipipe-interleave", "dp"
PREFIX, PORT = "jaxsys-net", 29555
CPU_PERIOD_US = 20_000
ONE_BY_ONE = 1e3
"""Contention of the predictions: XLA:CPU computes nothing while a transfer runs."""
CPU_SHARES = 262_144
"""Far above what else runs on this machine: hosts get their share of it first."""


def command(*words: str, check: bool = True) -> None:
    subprocess.run(words, check=check, capture_output=not check)


class Network:
    """Hosts as namespaces on one bridge; takes everything down again."""

    def __init__(self, hosts: int, cpu_share: float, local: int = 1) -> None:
        self.hosts, self.cpu_share, self.local = hosts, cpu_share, local

    def __enter__(self) -> Self:
        self.remove()
        command("ip", "link", "add", PREFIX, "type", "bridge")
        command("ip", "link", "set", PREFIX, "up")
        names = "\n".join(f"10.77.0.{i + 1} host{i}" for i in range(self.hosts))
        for i in range(self.hosts):
            space, near, far = f"{PREFIX}{i}", f"jsb{i}", f"jsn{i}"
            command("ip", "netns", "add", space)
            command("ip", "link", "add", near, "type", "veth", "peer", "name", far)
            command("ip", "link", "set", near, "master", PREFIX, "up")
            command("ip", "link", "set", far, "netns", space)
            inside = ("ip", "netns", "exec", space)
            command(*inside, "ip", "addr", "add", f"10.77.0.{i + 1}/24", "dev", far)
            command(*inside, "ip", "link", "set", far, "up")
            command(*inside, "ip", "link", "set", "lo", "up")
            etc = Path(f"/etc/netns/{space}")
            etc.mkdir(parents=True, exist_ok=True)
            (etc / "hosts").write_text(f"127.0.0.1 localhost\n{names}\n")
            group = self.group(i)
            group.mkdir(exist_ok=True)
            (group / "cpu.cfs_period_us").write_text(str(CPU_PERIOD_US))
            (group / "cpu.shares").write_text(str(CPU_SHARES))
        return self

    def group(self, host: int) -> Path:
        return Path(f"/sys/fs/cgroup/cpu/{PREFIX}{host}")

    def limit(self, mbit_per_s: float | None) -> None:
        """Sets every host's send rate."""
        for i in range(self.hosts):
            inside = ("ip", "netns", "exec", f"{PREFIX}{i}", "tc", "qdisc")
            device = ("dev", f"jsn{i}", "root")
            command(*inside, "del", *device, check=False)
            if mbit_per_s is not None:
                shape = ("tbf", "rate", f"{mbit_per_s}mbit", "burst", "64kb", "latency", "2s")
                command(*inside, "add", *device, *shape)

    def share_cpu(self, cores: float | None) -> None:
        """Gives every host so many cores, or all there are."""
        quota = -1 if cores is None else int(CPU_PERIOD_US * cores)
        for i in range(self.hosts):
            (self.group(i) / "cpu.cfs_quota_us").write_text(str(quota))

    def run(self, *words: str, rates: list[float | None], timeout_s: float) -> None:
        """Runs scripts/bench_train.py on every host as one JAX program, once for each send rate.

        Nothing is limited until all have compiled.
        """
        self.share_cpu(None)
        self.limit(None)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            rounds = ("--rounds", str(len(rates)), "--meeting", name)
            processes = [self.start(i, folder, *words, *rounds) for i in range(self.hosts)]
            deadline_s = time.monotonic() + timeout_s
            try:
                for number, rate in enumerate(rates):
                    while len(list(folder.glob(f"ready-{number}-*"))) < self.hosts:
                        self.look_after(processes, folder, deadline_s)
                    self.share_cpu(self.cpu_share)
                    self.limit(rate)
                    (folder / f"run-{number}").touch()
                while any(process.poll() is None for process in processes):
                    self.look_after(processes, folder, deadline_s)
            finally:
                for process in processes:
                    process.kill()

    def look_after(
        self, processes: list[subprocess.Popen], folder: Path, deadline_s: float
    ) -> None:
        time.sleep(0.2)
        codes = [process.poll() for process in processes]
        if any(codes):
            first = next(host for host, code in enumerate(codes) if code)
            said = (folder / f"log-{first}").read_text().strip().splitlines()[-5:]
            raise RunError(
                f"hosts ended with exit codes {codes}; host {first} said: {' | '.join(said)[:2000]}"
            )
        if time.monotonic() > deadline_s:
            raise RunError("the hosts took too long; see --timeout")

    def start(self, host: int, folder: Path, *words: str) -> subprocess.Popen:
        where = ("--coordinator", f"host0:{PORT}", "--processes", str(self.hosts))
        line = [sys.executable, str(ROOT / "scripts/bench_train.py"), *words, *where]
        line += ["--process", str(host), "--local-devices", str(self.local)]
        line += ["--link", f"jsn{host}"]
        # The quota first: inside, `ip netns exec` has mounted another /sys.
        script = f'echo $$ > {self.group(host)}/cgroup.procs; exec "$@"'
        inside = ["ip", "netns", "exec", f"{PREFIX}{host}", "unshare", "--uts", "sh", "-c"]
        inside += [f'hostname host{host}; exec "$@"', "sh", *line]
        with (folder / f"log-{host}").open("w") as log:
            return self._start(["sh", "-c", script, "sh", *inside], host, log)

    def _start(self, line: list[str], host: int, log: IO[str]) -> subprocess.Popen:
        return subprocess.Popen(
            line,
            env={
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                # Gloo matches collectives by order alone: hosts must run them one by one.
                "XLA_FLAGS": "--xla_cpu_enable_concurrency_optimized_scheduler=false",
            },
            stdout=log if host else None,
            stderr=log,
        )

    def remove(self) -> None:
        for i in range(16):
            command("ip", "netns", "del", f"{PREFIX}{i}", check=False)
            command("ip", "link", "del", f"jsb{i}", check=False)
            if self.group(i).exists():
                command("rmdir", str(self.group(i)), check=False)
        command("ip", "link", "del", PREFIX, check=False)

    def __exit__(self, *_: object) -> None:
        self.remove()


def measure(options: argparse.Namespace) -> list[dict]:
    """Times every schedule without a limit on the network and then at each rate."""
    devices = options.hosts * options.local_devices
    layers = devices * CHUNK_LAYERS
    schedules = dict.fromkeys([CALIBRATION, *options.schedules])
    rates = [None, *options.rates]
    with (
        Network(options.hosts, options.cpu_share, options.local_devices) as network,
        tempfile.TemporaryDirectory() as folder,
    ):
        try:
            network.run(
                *("step", "--shape", "network", "--dtype", "float32", "--label", "n"),
                *("--layers", str(layers), "--sequence-lengths", str(SEQUENCE)),
                *("--schedules", *schedules, "--devices", str(devices)),
                *("--microbatches", str(options.microbatches)),
                *("--microbatch-sizes", *map(str, options.sizes)),
                *("--recompute", "none", "--repeats", str(options.repeats)),
                *("--out", folder),
                rates=rates,
                timeout_s=options.timeout,
            )
        except RunError as error:
            if not (Path(folder) / "train_step_n.json").exists():
                raise
            print(f"bench_network: {error}; what has been measured is kept", file=sys.stderr)
        result = json.loads((Path(folder) / "train_step_n.json").read_text())
        sent = [
            json.loads((Path(folder) / f"sent_{host}.json").read_text())
            for host in range(options.hosts)
        ]
    rows = []
    for number, row in enumerate(result["rows"]):
        rate = rates[row.pop("round")]
        row.pop("sent_bytes", None)
        most = max((each[number] or 0 for each in sent if number < len(each)), default=0)
        row["sent_mib"] = round(most / MIB, 3)
        row["link_s"] = round(8e-6 * most / rate, 4) if rate else None
        tokens = row["microbatch_size"] * SEQUENCE
        ratio = tokens / (18 * HIDDEN * CHUNK_LAYERS)
        rows.append({"mbit_per_s": rate, "gs_over_18hlp": ratio, **row})
    return rows


def predict(rows: list[dict], *, devices: int, microbatches: int) -> None:
    """Adds each row's `predicted_s`: the schedule simulated with a measured time of compute.

    The time a microbatch takes is that of data parallelism without a limit on the network. Nothing
    hides a transfer: a host runs its program's operations one by one. The pieces of a ring of nodes
    share their host's link, so that a hop takes as long as the whole chunk.
    """
    compute_s = {
        row["microbatch_size"]: row["step_s"] / (microbatches / devices)
        for row in rows
        if row["schedule"] == CALIBRATION and row["mbit_per_s"] is None and row.get("step_s")
    }
    layer_bytes = 4 * (4 * HIDDEN**2 + 3 * HIDDEN * WIDE + 2 * HIDDEN)
    for row in rows:
        name, size = row["schedule"], row["microbatch_size"]
        known = name in NAMES and row.get("replicas", 1) == 1
        if not known or size not in compute_s or not row.get("step_s"):
            continue
        members = row.get("members", 1)
        schedule = resolve(
            name,
            devices=devices // members,
            layers=devices * CHUNK_LAYERS,
            microbatches=microbatches // members,
        )
        third_s = compute_s[size] / schedule.chunks / 3
        chunk_bytes = layer_bytes * devices * CHUNK_LAYERS / schedule.chunks
        costs = Costs(
            forward_s=third_s,
            backward_s=2 * third_s,
            input_gradient_s=third_s,
            weight_gradient_s=third_s,
            weight_bytes=chunk_bytes,
            gradient_bytes=chunk_bytes,
            activation_bytes=4 * size * SEQUENCE * HIDDEN,
        )
        rate = row["mbit_per_s"]
        link = Link(bytes_per_s=1e6 * rate / 8, contention=ONE_BY_ONE) if rate else Link()
        row["predicted_s"] = round(simulate(schedule, costs, link).step_s, 4)


def summary(rows: list[dict]) -> str:
    columns = {"mbit_per_s": "g", "gs_over_18hlp": ".2f", "schedule": ""}
    columns |= {"members": "", "replicas": ""}
    columns |= {"sent_mib": ".2f", "link_s": ".3f"}
    return table(rows, columns | {"step_s": ".3f", "predicted_s": ".3f"})


def plot(path: Path) -> Path:
    """Throughput of WeiPipe-Interleave over each schedule's, against GS / (18 H L/P)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    result = read_result(path)
    rows = [row for row in result["rows"] if row.get("step_s")]
    rates = sorted({row["mbit_per_s"] for row in rows if row["mbit_per_s"]}, reverse=True)
    figure, axes = plt.subplots(
        1,
        1 + len(rates),
        figsize=(4.2 * (1 + len(rates)), 4.6),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    names = [name for name in dict.fromkeys(row["schedule"] for row in rows) if name != RING]
    for axis, rate in zip(axes[0], [None, *rates], strict=True):
        here = [row for row in rows if row["mbit_per_s"] == rate]
        ring = {row["gs_over_18hlp"]: row for row in here if row["schedule"] == RING}
        for index, name in enumerate(names):
            theirs = [r for r in here if r["schedule"] == name and r["gs_over_18hlp"] in ring]
            for figure_name, style in (("step_s", "o-"), ("predicted_s", "--")):
                points = sorted(
                    (x, row[figure_name] / ring[x][figure_name])
                    for row in theirs
                    if row.get(figure_name) and (x := row["gs_over_18hlp"])
                )
                if points:
                    label = name if style == "o-" else None
                    colour = f"C{index}"
                    axis.plot(*zip(*points, strict=True), style, color=colour, label=label)
        axis.axvline(1, color="grey", linestyle=":")
        axis.axhline(1, color="grey", linestyle=":")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("GS / (18 H L/P)")
        axis.set_title(f"{rate:g} Mbit/s a host" if rate else "no limit")
    axes[0][0].set_ylabel("throughput of the weight ring over another's")
    figure.legend(
        *axes[0][0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(names),
        title="measured; dashed: predicted",
        fontsize="small",
    )
    hosts = result["config"]["hosts"]
    figure.suptitle(f"WeiPipe-Interleave on {hosts} hosts; above 1 it is the faster one")
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=120)
    plt.close(figure)
    return target


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench_network.py", description=__doc__)
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--local-devices", type=int, default=1, help="devices of a host")
    parser.add_argument("--rates", type=float, nargs="+", default=[100, 25], help="Mbit/s a host")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 4, 8, 32], help="sequences")
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpu-share", type=float, default=0.4, help="cores a host may use")
    parser.add_argument("--timeout", type=float, default=3600)
    parser.add_argument(
        "--schedules",
        nargs="+",
        default=[RING, "weipipe-wzb1", "1f1b-overlap", "zero-3", "gspmd-fsdp"],
    )
    parser.add_argument("--out", type=Path, default=Path("results/network.json"))
    parser.add_argument("--plot", action="store_true", help="only predict and draw --out again")
    options = parser.parse_args()
    try:
        if options.plot:
            result = read_result(options.out)
            config = result["config"]
            devices = config["hosts"] * config.get("local_devices", 1)
            predict(result["rows"], devices=devices, microbatches=config["microbatches"])
            write_whole(options.out, json.dumps(result, indent=1) + "\n")
        else:
            if os.geteuid() != 0:
                raise UsageError("network namespaces need root")
            rows = measure(options)
            devices = options.hosts * options.local_devices
            predict(rows, devices=devices, microbatches=options.microbatches)
            config = {k: v for k, v in vars(options).items() if k not in ("out", "plot")}
            config |= {"hidden": HIDDEN, "sequence_length": SEQUENCE, "chunk_layers": CHUNK_LAYERS}
            write_result(
                options.out, benchmark="network", kind="measured", config=config, rows=rows
            )
            print(summary(rows))
        if options.local_devices == 1:
            print(plot(options.out))
    except (UsageError, RunError) as error:
        print(f"bench_network: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
