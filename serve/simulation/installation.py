"""The installation that a replay simulates: its GPUs, what joins them, what its host takes."""

from dataclasses import dataclass

from jaxsys.errors import UsageError
from jaxsys.serve.energy.dispatch_times import DispatchTimes
from jaxsys.serve.energy.gpu_model import SimulatedGpu
from jaxsys.serve.energy.sleep import SleepConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """The simulated installation."""

    gpu: SimulatedGpu
    prefill_instances: int = 2
    decode_instances: int = 2
    """With 0 the prefill ones do both, as in the server."""
    set_latency_s: float = 0.003
    """Time from asking for a clock to running at it; 3 ms is VoltanaLLM's NVML figure."""
    hand_over_s: float = 0.002
    """Latency of moving a prompt's pages, besides their bytes."""
    link_bytes_per_s: float = 50e9
    """Page transfer between instances: a 400 Gb/s NIC or one NVLink pair's share."""
    hand_out_s: float = 0.0
    """What sending a prompt's pages holds up the prefill instance's next iteration, where that is
    not in flight yet."""
    landing_s: float = 0.0
    """What taking a prompt's pages in holds up a decode instance at work."""
    time_noise: float = 0.0
    """Relative deviation of each step's time from the model, so that no predictor is exact."""
    max_batch: int = 1024
    max_prefill_tokens: int = 8192
    page_size: int = 64
    max_steps: int = 32
    """Most decode steps planned as one."""
    plan_ahead: bool = False
    """Plan the next iteration when one begins, as the live server does: who comes meanwhile is
    served an iteration later."""
    dispatch_s: float = 0.0
    """Where planning ahead: what the host takes before an iteration that nothing runs ahead of;
    else this hides behind the iteration before."""
    dispatch_times: DispatchTimes | None = None
    """Where planning ahead: what the host takes to plan and dispatch each iteration, drawn of these
    with a seed. The device waits for it, and so do the tokens of the iteration before. None: no
    time, but for `dispatch_s`."""
    plan_after_s: float = 0.0
    """Where planning ahead: what the host takes from an iteration's end, to hand its tokens on and
    so forth, until it plans anew; the iteration in flight runs meanwhile."""
    piece_buckets: tuple[int, ...] = ()
    """Where given, every piece of a prompt is a step of its own, padded to one of these lengths, as
    in this project's executor; else an iteration's prompts are one step without padding."""
    host_pages_gib: float = 0.0
    """Host memory of each instance that reads prompts, for pages that its GPU has no room for."""
    host_bytes_per_s: float = 40e9
    """Pages from the host's memory: PCIe 5 by 16, less what it never reaches."""
    decode_buckets: tuple[int, ...] = ()
    """Batches that decode steps are compiled for; empty where they are not padded."""
    sleep: SleepConfig | None = None
    """Whether instances that are not needed sleep, and how readily."""

    def __post_init__(self) -> None:
        for name, least in (("prefill_instances", 1), ("decode_instances", 0), ("max_steps", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.piece_buckets and self.piece_buckets[-1] < self.max_prefill_tokens:
            raise UsageError(
                f"piece_buckets={self.piece_buckets} must reach max_prefill_tokens="
                f"{self.max_prefill_tokens}"
            )
