"""The models that the training benchmarks run."""

from jaxsys.model import preset

SHAPES = {
    "1b": preset("bench-1b"),
    "narrow": preset("bench-narrow"),
    "8b": preset("Llama-3-8B"),
    "network": preset("bench-network"),
    "tiny": preset("bench-tiny"),
    "moe-3b": preset("bench-moe-3b"),
    "moe-3b-dense": preset("bench-moe-3b-dense"),
    "tiny-moe": preset("bench-tiny-moe"),
}
"""1b: L=16 H=2048 F=5632 V=32000, the shape of the tables; narrow: L=4 H=1024 F=2816; 8b: Llama-3;
moe-3b: Qwen3-MoE's layout, and a dense decoder of as many active parameters; tiny, tiny-moe: to
try the script."""
