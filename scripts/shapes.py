"""The models that the training benchmarks run."""

from jaxsys.model import DecoderConfig, preset

SHAPES = {
    "1b": DecoderConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_layers=16,
        num_heads=16,
        num_kv_heads=16,
        head_dim=128,
        max_positions=131072,
    ),
    "8b": preset("llama-3-8b"),
    # Light compute, so that a slow network of hosts on one machine is what a step waits for.
    "network": DecoderConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=171,
        num_layers=8,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        max_positions=131072,
    ),
    "tiny": DecoderConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=192,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        max_positions=131072,
    ),
}
"""1b: L=16 H=2048 F=5632 V=32000, the shape of the tables; 8b: Llama-3; tiny: to try the script."""
