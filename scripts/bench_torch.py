#!/usr/bin/env python
"""The same training step in PyTorch, to set beside ours: FSDP2, or a 1F1B pipeline.

torchrun --nproc-per-node 2 scripts/bench_torch.py --shape 1b --parallel fsdp2 --out rows.json

Blocks are compiled, attention is `scaled_dot_product_attention`, masters are float32, compute is
bfloat16, the optimizer is fused AdamW: what PyTorch's own examples use. FSDP2 gathers a block's
weights for each microbatch and reduces gradients once a step. FLOP are counted as for every other
row (`jaxsys.train.flops`). `scripts/bench_gpus.py` calls this for its rows `torch-*`.
"""

# pyright: reportMissingImports=false, reportOptionalCall=false
# PyTorch is no dependency: this runs where it is installed.

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from shapes import SHAPES
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.utils.checkpoint import checkpoint

from jaxsys.train.flops import training_flops_per_token


class Norm(nn.Module):
    """RMS normalisation."""

    def __init__(self, config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), 1e-5)


class Block(nn.Module):
    """Attention with rotary positions and SwiGLU, each behind a norm."""

    def __init__(self, config) -> None:
        super().__init__()
        width, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
        self.head = head
        self.attention_norm, self.mlp_norm = Norm(config), Norm(config)
        self.query = nn.Linear(width, config.num_heads * head, bias=False)
        self.key = nn.Linear(width, config.num_kv_heads * head, bias=False)
        self.value = nn.Linear(width, config.num_kv_heads * head, bias=False)
        self.out = nn.Linear(config.num_heads * head, width, bias=False)
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x, cosines, sines):
        normal = self.attention_norm(x)
        split = (*x.shape[:2], -1, self.head)
        q = turned(self.query(normal).view(split), cosines, sines)
        k = turned(self.key(normal).view(split), cosines, sines)
        v = self.value(normal).view(split)
        o = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        x = x + self.out(o.transpose(1, 2).reshape(*x.shape[:2], -1))
        normal = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(normal)) * self.up(normal))


def turned(x, cosines, sines):
    """Rotary positions on heads [B, T, N, K], halves paired."""
    first, second = x.float().chunk(2, dim=-1)
    pair = (first * cosines - second * sines, second * cosines + first * sines)
    return torch.cat(pair, dim=-1).to(x.dtype)


class Part(nn.Module):
    """Some consecutive layers, with the embedding before the first and the head behind the last."""

    def __init__(self, config, layers: range, *, length: int, recompute: bool) -> None:
        super().__init__()
        width = config.hidden_size
        first, last = layers.start == 0, layers.stop == config.num_layers
        self.embed = nn.Embedding(config.vocab_size, width) if first else None
        self.layers = nn.ModuleList(Block(config) for _ in layers)
        self.norm = Norm(config) if last else None
        self.output = nn.Linear(width, config.vocab_size, bias=False) if last else None
        self.recompute = recompute
        rates = config.rope_theta ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
        angles = torch.outer(torch.arange(length).float(), rates)[None, :, None, :]
        self.register_buffer("cosines", angles.cos(), persistent=False)
        self.register_buffer("sines", angles.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if "norm" not in name:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, x):
        if self.embed is not None:
            x = self.embed(x)
        for layer in self.layers:
            if self.recompute:
                x = checkpoint(layer, x, self.cosines, self.sines, use_reentrant=False)
            else:
                x = layer(x, self.cosines, self.sines)
        return x if self.output is None else self.output(self.norm(x))


def mean_loss(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def fsdp2_step(config, options, device):
    """Every device the whole sequence of blocks, weights and state in shards."""
    model = Part(
        config,
        range(config.num_layers),
        length=options.length,
        recompute=options.recompute == "block",
    ).to(device)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.layers:
        layer.compile()
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    loss_of = torch.compile(mean_loss)
    rounds = options.microbatches // options.devices
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(inputs, targets):
        mine = slice(options.rank * rounds, (options.rank + 1) * rounds)
        total = 0.0
        for number, (x, y) in enumerate(zip(inputs[mine], targets[mine], strict=True)):
            model.set_requires_gradient_sync(number == rounds - 1)
            loss = loss_of(model(x), y) / rounds
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total)
        return total / options.devices

    return step


def pipeline_step(config, options, device):
    """Every device a part of the layers; microbatches one forward, one backward."""
    each, left = divmod(config.num_layers, options.devices)
    if left:
        raise SystemExit(f"--devices {options.devices} does not divide {config.num_layers} layers")
    layers = range(options.rank * each, (options.rank + 1) * each)
    model = Part(config, layers, length=options.length, recompute=options.recompute == "block").to(
        device
    )
    for layer in model.layers:
        layer.compile()
    stage = PipelineStage(model, options.rank, options.devices, device)
    schedule = Schedule1F1B(
        stage, n_microbatches=options.microbatches, loss_fn=torch.compile(mean_loss)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(inputs, targets):
        losses: list = []
        # One context a step: weights are cast to bfloat16 once.
        with torch.autocast(device.type, torch.bfloat16):
            first, last = options.rank == 0, options.rank == options.devices - 1
            arguments = (inputs.flatten(0, 1),) if first else ()
            aims = {"target": targets.flatten(0, 1), "losses": losses} if last else {}
            schedule.step(*arguments, **aims)
        optimizer.step()
        optimizer.zero_grad()
        total = torch.stack(losses).mean() if losses else torch.zeros((), device=device)
        dist.broadcast(total, options.devices - 1)
        return total

    return step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--shape", default="1b", choices=tuple(SHAPES))
    add("--parallel", default="fsdp2", choices=("fsdp2", "1f1b"))
    add("--length", type=int, default=16384, help="tokens a sequence")
    add("--microbatch-size", type=int, default=1)
    add("--microbatches", type=int, default=8, help="of a step, over all devices")
    add("--recompute", default="none", choices=("none", "block"))
    add("--repeats", type=int, default=3)
    add("--out", type=Path, help="write the row here")
    options = parser.parse_args()
    options.rank, options.devices = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpu = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if on_gpu else "cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    torch.manual_seed(0)
    config = SHAPES[options.shape]
    build = {"fsdp2": fsdp2_step, "1f1b": pipeline_step}[options.parallel]
    step = build(config, options, device)
    size = (options.microbatches, options.microbatch_size, options.length + 1)
    tokens = torch.randint(0, config.vocab_size, size).to(device)
    inputs, targets = tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous()
    samples, loss = [], 0.0
    begun = time.perf_counter()
    for number in range(options.repeats + 2):  # the first two compile
        start = time.perf_counter()
        loss = float(step(inputs, targets))
        if on_gpu:
            torch.cuda.synchronize()
        if number > 1:
            samples.append(time.perf_counter() - start)
    compile_s = time.perf_counter() - begun - sum(samples)
    step_s = statistics.median(samples)
    flops = training_flops_per_token(
        parameters=config.parameter_count(),
        layers=config.num_layers,
        sequence_length=options.length,
        attention_width=config.num_heads * config.head_dim,
    )
    each = options.microbatches * options.microbatch_size * options.length / options.devices
    row = {
        "schedule": f"torch-{options.parallel}",
        "recompute": options.recompute,
        "sequence_length": options.length,
        "microbatch_size": options.microbatch_size,
        "devices": options.devices,
        "step_s": round(step_s, 4),
        "model_tflops_per_gpu": round(1e-12 * flops * each / step_s, 1),
        "tokens_per_s_per_gpu": round(each / step_s, 1),
        "peak_so_far_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None,
        "compile_s": round(compile_s, 1),
        "loss": round(loss, 4),
        "steps": len(samples) + 2,
        "torch": torch.__version__,
    }
    if options.rank == 0:
        print(json.dumps(row))
        if options.out:
            options.out.write_text(json.dumps(row) + "\n", encoding="utf-8")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
