"""Where each known strategy is the best plan, in settings told by a few ratios.

A layer's forward pass takes f; gathering its weights W takes a = ratio * f plus latency; its
residuals weigh `residuals` * W. Memory is a multiple of what a reference plan needs. The map over
link speed, tokens and memory is drawn from searches; nothing here tells the search a name.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from jaxsys.hardware import LinkSpec, device, link
from jaxsys.model.shapes import preset
from jaxsys.planner.cluster import Cluster
from jaxsys.planner.costs import Precision
from jaxsys.planner.evaluate import Evaluator
from jaxsys.planner.problem import Problem
from jaxsys.planner.space import Space
from jaxsys.planner.workload import BlockWork, EdgeWork, Workload, decoder_workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Regime:
    """A setting, and what theory says is best there."""

    name: str
    """The strategy's name, as `recognise` gives it."""
    reason: str
    problem: Problem


def ratio_problem(
    *,
    ratio: float,
    residuals: float,
    turns: int,
    devices: int = 8,
    layers: int = 16,
    parameters: float = 1e8,
    forward_s: float = 2e-3,
    latency_s: float = 8e-6,
    edge_parameters: float = 1e7,
) -> Problem:
    """A uniform model and a cluster, told by ratios; memory is not limited.

    Args:
        ratio: a / f, latency aside.
        residuals: A / W.
        turns: microbatches a device.
        devices: N.
        layers: L.
        parameters: of a layer.
        forward_s: f.
        latency_s: of one message.
        edge_parameters: of embedding and head.
    """
    spec = device("h100")
    weight_bytes = 2 * parameters
    block = BlockWork(
        parameters=parameters,
        product_flops=forward_s * spec.product_flops_per_s,
        residual_bytes=residuals * weight_bytes,
    )
    workload = Workload(
        name="ratios",
        blocks=(block,) * layers,
        edge=EdgeWork(parameters=edge_parameters, backward_flops=1e10),
        # A dense block keeps about 17 times its input.
        activation_bytes=residuals * weight_bytes / 17,
        tokens=1,
        model_flops=1.0,
    )
    rate = (devices - 1) / devices * weight_bytes / (ratio * forward_s)
    wire = LinkSpec(name="wire", bytes_per_s=rate, latency_s=latency_s)
    return Problem(
        workload_of=lambda size: workload,
        cluster=Cluster(device=spec, devices=devices, link=wire),
        batch=devices * turns,
        memory_bytes=1e15,
        precision=Precision(gradient_bytes=2.0),
    )


def limited(problem: Problem, narrow: Callable[[Space], Space], factor: float = 1.0) -> Problem:
    """The same problem with as much memory as the leanest first plan of a narrower space needs."""
    space = narrow(Space.of(problem, microbatch_sizes=[1]).domain("lookahead", 1))
    peak = Evaluator(problem).plan(next(space.bases())).peak_bytes[0]
    return replace(problem, memory_bytes=factor * float(peak))


def regimes() -> tuple[Regime, ...]:
    """A setting for each strategy in which it is the best plan."""

    def sharded(weights: str, gradient: str) -> Callable[[Space], Space]:
        return lambda s: (
            s.domain("shard", s.problem.cluster.devices)
            .copy(weights)
            .reduce(gradient)
            .domain("residual", "keep")
        )

    def pipeline(backward: str, order: str, *, delay: int = 0) -> Callable[[Space], Space]:
        return lambda s: (
            s.assign("layers", s.problem.cluster.devices, travels="activations")
            .domain("backward", backward)
            .order(order, delay=delay)
            .domain("residual", "keep")
        )

    slow = ratio_problem(ratio=1.3, residuals=0.5, turns=16)
    llama = replace(preset("llama-3-8b"), num_layers=8)
    few = Problem(
        workload_of=lambda size: decoder_workload(
            "llama", llama, sequence_length=1024, microbatch_size=size
        ),
        cluster=Cluster(device=device("h100"), devices=8, link=link("nvlink")),
        batch=1,
        memory_bytes=72 * 2**30,
    )
    many = ratio_problem(ratio=0.5, residuals=34, turns=8, latency_s=1.2e-3)
    return (
        Regime(
            name="dp",
            reason="a tiny model: one sum costs fewer launches than a gather and a reduction",
            problem=ratio_problem(
                ratio=0.01,
                residuals=1,
                turns=1,
                layers=8,
                parameters=1e4,
                forward_s=1e-3,
                latency_s=1e-6,
                edge_parameters=10,
            ),
        ),
        Regime(
            name="zero-1",
            reason="weights and local sums fit: nothing beats sending each once a step",
            problem=ratio_problem(ratio=0.3, residuals=1, turns=4),
        ),
        Regime(
            name="zero-2",
            reason="weights fit, a local sum beside them does not, and reductions hide",
            problem=limited(
                ratio_problem(ratio=0.5, residuals=1, turns=8), sharded("stay", "each")
            ),
        ),
        Regime(
            name="zero-3",
            reason="no room for all weights, and no second microbatch to keep any for",
            problem=limited(
                ratio_problem(ratio=0.5, residuals=2, turns=1), sharded("refetch", "once")
            ),
        ),
        Regime(
            name="zero-3.5",
            reason="as much memory as ZeRO-3 needs, residuals heavier than weights, and gathers "
            "that crowd the forward pass",
            problem=limited(
                ratio_problem(ratio=0.9, residuals=2, turns=16), sharded("refetch", "each")
            ),
        ),
        Regime(
            name="zero-4",
            reason="as before, and gather and reduction together exceed the backward pass",
            problem=limited(
                ratio_problem(ratio=1.3, residuals=2, turns=16), sharded("refetch", "each")
            ),
        ),
        Regime(
            name="tp-sp",
            reason="one short sequence for all devices: only its features can be split",
            problem=few,
        ),
        Regime(
            name="1f1b",
            reason="activations much lighter than weights, a slow link, and no more memory than "
            "one backward task at a time needs",
            problem=limited(slow, pipeline("whole", "earliest-backward")),
        ),
        Regime(
            name="zb-h1",
            reason="likewise, with room for what dL/dx leaves for dL/dw",
            problem=limited(slow, pipeline("split", "earliest-backward", delay=1)),
        ),
        Regime(
            name="zb-overlap",
            reason="likewise, with few microbatches and room to hide the hops as well",
            problem=limited(
                ratio_problem(ratio=2, residuals=0.5, turns=2), pipeline("split", "spaced")
            ),
        ),
        Regime(
            name="weipipe-keep",
            reason="activations heavier than weights, and a latency that a hop pays too, so that "
            "it counts how often anything is sent",
            problem=ratio_problem(ratio=0.3, residuals=34, turns=8, latency_s=30e-3),
        ),
        Regime(
            name="weipipe-interleave",
            reason="activations heavier than weights, and latency that a collective pays P - 1 "
            "times and a hop once",
            problem=limited(
                many,
                lambda s: s.assign("layers", 8, travels="weights").order("side-by-side").redirect(),
                1.01,
            ),
        ),
    )
