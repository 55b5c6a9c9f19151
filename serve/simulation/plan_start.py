"""What starts a planned deployment as it was replayed: the command, the manifest, and what the
server does not do itself.
"""

from pathlib import Path
from typing import Any

from jaxsys import __version__
from jaxsys.model.shapes import find_preset, lies_here
from jaxsys.serve.energy.slo import Slo
from jaxsys.serve.settings import SERVE
from jaxsys.serve.simulation.plan_search import Judged
from jaxsys.serve.simulation.policies import policy_named, routers_of

DTYPES = ("float32", "bfloat16")
"""Forms of weights that `serve --dtype` takes; the others are those of `--quantise`."""

NODE_GPUS = 8
"""Of one machine; instances beyond it are processes of a cluster."""


def placeholder_of(model: str) -> str | None:
    """What stands for the folder of a preset's weights in a command; None for a folder."""
    return None if lies_here(model) else f"FOLDER_OF_{find_preset(model) or model}"


def limit_of(one: Judged) -> dict[str, Any] | None:
    """The power limit that the operator must set, as the server sets none; None without one."""
    cap_w = policy_named(one.policy).cap_w
    if cap_w is None:
        return None
    return {
        "watts_each": cap_w,
        "gpu": one.deployment.gpu,
        "gpus": one.deployment.gpus,
        "set_by": "the operator, before the server starts",
        "command": ["nvidia-smi", "-pl", f"{cap_w:.0f}"],
    }


def options_of(model: str, one: Judged, slo: Slo, longest: int) -> dict[str, str | int | float]:
    """The options of `jaxsys serve` that start a deployment as it was replayed; a power limit is
    none of them: see `limit_of`.

    Args:
        longest: tokens of a request, prompt and output.
    """
    deployment, policy = one.deployment, policy_named(one.policy)
    options: dict[str, str | int | float] = {
        "model": placeholder_of(model) or str(Path(model).absolute()),
        "prefill": deployment.prefill,
        "decode": deployment.decode,
        "max-batch": deployment.max_batch,
        "max-length": longest,
        # As many again may wait, and be read, as are written at once.
        "max-requests": max(
            256, 2 * deployment.max_batch * (deployment.prefill + deployment.decode)
        ),
    }
    if deployment.tensor_parallel > 1:
        options["tensor-parallel"] = deployment.tensor_parallel
    options["dtype" if deployment.weights in DTYPES else "quantise"] = deployment.weights
    options |= {"ttft-ms": 1e3 * slo.ttft_s, "itl-ms": 1e3 * slo.itl_s}
    options |= {"gpu": deployment.gpu, "policy": policy.clock}
    options |= {"route-prompts": routers_of(policy)[0], "route": routers_of(policy)[1]}
    options["clocks"] = "control"
    if deployment.gpus > NODE_GPUS:
        options["cluster"] = "auto"
    return options


def command_of(model: str, one: Judged, slo: Slo, longest: int) -> list[str]:
    """The words that start a deployment."""
    words = ["jaxsys", "serve"]
    for name, value in options_of(model, one, slo, longest).items():
        words += [f"--{name}", f"{value:g}" if isinstance(value, float) else str(value)]
    return words


def manifest_of(model: str, one: Judged, slo: Slo, longest: int) -> dict[str, Any]:
    """What an orchestrator needs to start it: instances by role, and the server's options, which
    `jaxsys serve --settings` reads off it."""
    deployment = one.deployment
    roles = {"prefill": deployment.prefill, "decode": deployment.decode}
    if not deployment.decode:
        roles = {"both": deployment.prefill}
    limit, placeholder = limit_of(one), placeholder_of(model)
    return {
        "jaxsys": __version__,
        "model": model,
        **({} if placeholder is None else {"weights_needed": placeholder}),
        **({} if limit is None else {"power_limit": limit}),
        "instances": [
            {"role": role, "count": count, "gpu": deployment.gpu,
             "gpus_each": deployment.tensor_parallel}
            for role, count in roles.items()
        ],
        SERVE: options_of(model, one, slo, longest),
        "command": command_of(model, one, slo, longest),
        "predicted": one.row(),
    }  # fmt: skip
