"""What `jaxsys train` starts from: a preset's random weights, or a model's own, and what of it
trains: all of it, or low-rank adapters alone (`lora`)."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsys.errors import UsageError
from jaxsys.layered import LayeredModel, Parameters
from jaxsys.model import (
    ByteTokenizer,
    DecoderConfig,
    Tokenizer,
    abstract_parameters,
    initial_parameters,
    layered,
    preset,
)
from jaxsys.model.float8_products import Float8
from jaxsys.model.leaves import Path as LeafPath
from jaxsys.model.leaves import block_leaves
from jaxsys.model.load import open_model
from jaxsys.model.peft import write_adapters
from jaxsys.model.published import PUBLISHED
from jaxsys.model.save import save_safetensors
from jaxsys.model.shapes import find_preset, lies_here, preset_beside, telling_preset
from jaxsys.train.at_rest import Stored
from jaxsys.train.lora import add_adapters, train_adapters
from jaxsys.train.rules import shape_of

RATES = {"preset": 3e-3, "model": 2e-5, "adapters": 2e-4}
"""Peak learning rates where none is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """Which adapters are trained."""

    rank: int
    alpha: float | None = None
    """Their weight is alpha / rank; twice the rank if None."""
    targets: tuple[str, ...] = ()
    """Names or paths of kernels; all that are served if none."""

    @property
    def scale(self) -> float:
        """Alpha."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A model as training takes it, and the way back."""

    name: str
    """As a run's settings have it: a preset's own, or what was asked for."""
    config: DecoderConfig
    tokenizer: Tokenizer
    encode: Callable[[str], np.ndarray]
    """Text to ids, none of them special."""
    model: LayeredModel
    parameters: Callable[[], Parameters] | Stored
    optimizer: Callable[[optax.GradientTransformation], optax.GradientTransformation]
    """Makes of an optimizer one of what trains."""
    learning_rate: float
    """Peak, where none is asked for."""
    settings: dict[str, Any]
    """What a resumed run must not change unasked."""
    not_applied: str | None
    """What its files ask of training that is not done."""
    from_what: str | None
    """Of which weights it starts, where a user may have meant others."""
    export: Callable[[Path, Parameters, bool], str]
    """Writes what was trained, over what is there if told so; gives the options that serve it."""


def start_of(
    model: str,
    *,
    seed: int,
    float8: Float8 | None,
    lora: Lora | None,
    balance: float | None = None,
) -> Start:
    """A start by the path of a folder or .gguf file, or where there is none by a preset's name.

    Args:
        model: which.
        seed: of random weights, and of adapters.
        float8: which products run in float8.
        lora: which adapters are trained; None trains all.
        balance: weight of the loss that keeps experts equally busy; None leaves the model's own.

    Raises:
        UsageError: if there is no such model, adapters are asked of random weights, or a balance of
            a model without experts.
    """
    changed = {} if balance is None else {"balance": balance}
    if not lies_here(model):
        return _of_preset(model, seed, float8, lora, balance)
    with telling_preset(model):
        opened = open_model(model)
    config, tokenizer = balanced(opened.config, balance), opened.tokenizer
    if tokenizer is None or not tokenizer.eos_ids:
        raise UsageError(
            f"{model} has no tokenizer that says where texts end; add the one the model came with"
        )

    def encode(text: str) -> np.ndarray:
        return np.asarray(tokenizer.encode(text, add_special=False))

    def read(shardings: Parameters) -> Parameters:
        return opened.checkpoint.parameters(jnp.float32, lambda path: _at(shardings, path))

    whole, shapes = layered(_quiet(config), float8=float8), abstract_parameters(config)
    common: dict[str, Any] = {"name": model, "config": config}
    common |= {"tokenizer": tokenizer, "encode": encode}
    common["not_applied"] = config.not_applied()
    common["from_what"] = preset_beside(model)
    if lora is None:

        def save(folder: Path, parameters: Parameters, may: bool) -> str:
            save_safetensors(
                folder,
                config,
                parameters,
                tokenizer,
                overwrite=may,
                generation=opened.generation,
            )
            return f"--model {folder}"

        return Start(
            **common,
            model=whole,
            parameters=Stored(shapes=shapes, read=read),
            optimizer=lambda optimizer: optimizer,
            learning_rate=RATES["model"],
            settings={"from": Path(model).name} | changed,
            export=save,
        )
    targets = lora.targets or servable(config)
    adapted, start, _ = add_adapters(
        whole, shapes, rank=lora.rank, targets=targets, scale=lora.scale, seed=seed
    )

    def read_frozen(shardings: Parameters) -> Parameters:
        """What is frozen as it is read, beside the adapters, which are small and here."""
        placed, fresh = (adapted.stacks(tree["blocks"]) for tree in (shardings, start))
        frozen = whole.blocks({kind: stack["frozen"] for kind, stack in placed.items()})
        base = read({"edge": shardings["edge"], "blocks": frozen})
        stacks = {
            kind: {
                "frozen": stack,
                "adapters": jax.device_put(fresh[kind]["adapters"], placed[kind]["adapters"]),
            }
            for kind, stack in whole.stacks(base["blocks"]).items()
        }
        return {"edge": base["edge"], "blocks": adapted.blocks(stacks)}

    def write(folder: Path, parameters: Parameters, may: bool) -> str:
        del may  # its two files take the place of those that are there
        stacks = adapted.stacks(parameters["blocks"])
        adapters = {kind: stack["adapters"] for kind, stack in stacks.items()}
        write_adapters(folder, config, adapters, scale=lora.scale, base=model)
        return f"--model {model} --lora {folder.name}={folder}"

    return Start(
        **common,
        model=adapted,
        parameters=Stored(shapes=jax.tree.map(shape_of, start), read=read_frozen),
        optimizer=train_adapters,
        learning_rate=RATES["adapters"],
        settings={
            "from": Path(model).name,
            "lora": [lora.rank, lora.scale, list(targets)],
        }
        | changed,
        export=write,
    )


def _at(tree: Any, path: LeafPath) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _of_preset(
    name: str, seed: int, float8: Float8 | None, lora: Lora | None, balance: float | None
) -> Start:
    config, tokenizer = balanced(preset(name), balance), ByteTokenizer()
    if lora is not None:
        raise UsageError(
            f"model={name!r} is a preset, whose weights are random: adapters are of a model that "
            "was trained; give the path of its folder"
        )

    def save(folder: Path, parameters: Parameters, may: bool) -> str:
        save_safetensors(folder, config, parameters, tokenizer, overwrite=may)
        return f"--model {folder}"

    return Start(
        name=name.removeprefix("preset/"),
        config=config,
        tokenizer=tokenizer,
        encode=tokenizer.encode_array,
        model=layered(_quiet(config), float8=float8),
        not_applied=config.not_applied(),
        # Of these there are trained weights, which somebody may have at hand.
        from_what=f"{name} is a preset: it starts from random weights; from those of a model's "
        "folder with --model FOLDER"
        if find_preset(name) in PUBLISHED
        else None,
        parameters=lambda: initial_parameters(config, seed=seed),
        optimizer=lambda optimizer: optimizer,
        learning_rate=RATES["preset"],
        settings={} if balance is None else {"balance": balance},
        export=save,
    )


def _quiet(config: DecoderConfig) -> DecoderConfig:
    """The model without what is not applied, which the command says in its own place."""
    return replace(config, in_training=())


def balanced(config: DecoderConfig, weight: float | None) -> DecoderConfig:
    """The model with another weight of its experts' balance loss; None leaves its own.

    Raises:
        UsageError: if it has no experts, or the weight is none.
    """
    if weight is None:
        return config
    if config.experts is None:
        raise UsageError(f"balance={weight:g}, but {config.family} has no experts; leave it out")
    if not 0 <= weight < math.inf:
        raise UsageError(f"balance={weight:g} must be a finite number, 0 or more")
    return replace(config, experts=replace(config.experts, balance=weight))


def servable(config: DecoderConfig) -> tuple[str, ...]:
    """The kernels of attention and feed-forward that the server adds adapters to."""
    found: dict[str, None] = {}
    for kind in config.kinds:
        for leaf in block_leaves(config, kind):
            path = "/".join(leaf.path)
            if leaf.path[0] not in ("attention", "mlp", "shared") or not leaf.is_matrix:
                continue
            if path not in ("attention/latent_up", "shared/weight"):
                found[path] = None
    return tuple(found)
