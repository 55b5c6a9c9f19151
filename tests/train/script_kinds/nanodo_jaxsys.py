"""A decoder in Linen, as nanodo writes it: a config, remat around blocks, a tied head, a mean."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from jaxsys.train import Trainer, from_linen


@dataclasses.dataclass(frozen=True)
class Config:
    D: int = 16
    H: int = 2
    L: int = 8
    N: int = 4
    V: int = 32
    F: int = 32
    remat: bool = True


class Mlp(nn.Module):
    cfg: Config

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.cfg.F, use_bias=False)(x)
        return nn.Dense(self.cfg.D, use_bias=False)(nn.gelu(x))


class CausalAttention(nn.Module):
    cfg: Config

    @nn.compact
    def __call__(self, x):
        cfg = self.cfg

        def project(name):
            return nn.DenseGeneral((cfg.H, cfg.D // cfg.H), use_bias=False, name=name)(x)

        q, k, v = project("query"), project("key"), project("value")
        scores = jnp.einsum("bthd,bshd->bhts", q / (cfg.D // cfg.H) ** 0.5, k)
        mask = jnp.tril(jnp.ones((1, 1, x.shape[1], x.shape[1]), bool))
        weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(x.dtype).min))
        out = jnp.einsum("bhts,bshd->bthd", weights, v)
        return nn.DenseGeneral(cfg.D, axis=(-2, -1), use_bias=False, name="out")(out)


class Block(nn.Module):
    cfg: Config

    @nn.compact
    def __call__(self, x):
        x = x + CausalAttention(self.cfg)(nn.LayerNorm(use_bias=False)(x))
        return x + Mlp(self.cfg)(nn.LayerNorm(use_bias=False)(x))


class Transformer(nn.Module):
    cfg: Config

    def setup(self):
        cfg = self.cfg
        self.embed = nn.Embed(cfg.V, cfg.D, embedding_init=nn.initializers.normal(0.3))
        self.position = nn.Embed(cfg.L, cfg.D, embedding_init=nn.initializers.normal(0.3))
        block = nn.remat(Block) if cfg.remat else Block
        self.blocks = [block(cfg) for _ in range(cfg.N)]
        self.norm = nn.LayerNorm(use_bias=False)

    def __call__(self, tokens):
        x = self.embed(tokens) + self.position(jnp.arange(tokens.shape[1])[None])
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.norm(x))


def get_batch(step, size=16, cfg=Config()):
    tokens = np.random.default_rng(step).integers(1, cfg.V, (size, cfg.L + 1)).astype(np.int32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


def loss_of(logits, batch):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return losses.mean()


def train(steps=20, schedule="weipipe-interleave"):
    model = Transformer(Config())
    params = model.init(jax.random.key(0), get_batch(0)["inputs"])["params"]
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-3, 5, steps), weight_decay=0.1),
    )
    adapted = from_linen(model, {"params": params}, get_batch(0, 2), blocks="blocks_", loss=loss_of)
    trainer = Trainer(adapted.model, adapted.parameters, optimizer, devices=4, schedule=schedule)

    losses = []
    for number in range(steps):
        losses.append(float(trainer.step(trainer.split(get_batch(number))).loss))
    return losses, adapted.rebuild(trainer.parameters())["params"]


if __name__ == "__main__":
    print(train()[0])
