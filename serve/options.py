"""The options of `jaxsys serve`, and what is read from those that name files or pairs."""

import argparse
import re
import ssl
from collections.abc import Sequence
from pathlib import Path

from jaxsys.errors import UsageError
from jaxsys.files import MIB, read_text
from jaxsys.model.peft import largest_rank
from jaxsys.options import Parser, whole
from jaxsys.serve.energy.gpu_model import GPUS
from jaxsys.serve.energy.registry import CLOCK_POLICIES, ROUTERS
from jaxsys.serve.energy.slo import add_targets
from jaxsys.serve.http.lora_adapters import check_name
from jaxsys.serve.http.tools import FORMATS
from jaxsys.serve.paged_model import CACHE_FORMS
from jaxsys.serve.settings import add_to as add_settings
from jaxsys.serve.speculation import METHODS, SpeculationConfig
from jaxsys.serve.weights import QUANTISATIONS

LORAS_LATER = 4
"""Adapters that there is room for beside those of --lora, where more are loaded while serving."""


def adapters_of(given: Sequence[str], model_name: str) -> tuple[tuple[str, str], ...]:
    """Names and folders of --lora."""
    found: dict[str, str] = {}
    for one in given:
        name, mark, folder = one.partition("=")
        if not (name and mark and folder):
            raise UsageError(f"--lora {one!r} must be NAME=FOLDER")
        try:
            check_name(name, model_name)
        except UsageError as error:
            raise UsageError(f"--lora {one!r}: {error}") from None
        if name in found:
            raise UsageError(f"--lora gives {name!r} twice; give each name once")
        found[name] = str(Path(folder).absolute())
    return tuple(found.items())


def lora_sizes(
    arguments: argparse.Namespace, adapters: Sequence[tuple[str, str]]
) -> tuple[int, int]:
    """Adapters that are loaded at once at most, and their largest rank."""
    updates = arguments.allow_lora_updates
    most, rank = arguments.max_loras, arguments.max_lora_rank
    if not adapters and not updates:
        for name, value in (("--max-loras", most), ("--max-lora-rank", rank)):
            if value is not None:
                raise UsageError(
                    f"{name} {value} needs --lora or --allow-lora-updates; give one, or leave it "
                    "out"
                )
        return 0, 16
    if most is None:
        most = len(adapters) + (LORAS_LATER if updates else 0)
    if most < len(adapters):
        raise UsageError(
            f"--max-loras {most} is below the {len(adapters)} of --lora; give {len(adapters)} or "
            "more"
        )
    if rank is None:
        ranks = [largest_rank(folder) for _, folder in adapters]
        rank = max([*ranks, 16 if updates else 1])
    return most, rank


def root_path(path: str) -> str:
    if path and not re.fullmatch(r"(/[\w.~-]+)+", path):
        raise UsageError(
            f"--root-path {path!r} must be the like of /llm, without a slash at its end"
        )
    return path


def tls_files(certificate: Path | None, key: Path | None) -> tuple[str, str] | None:
    """The files of a certificate, if they are good."""
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise UsageError("--tls-certificate and --tls-key belong together; give both or none")
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
    except OSError as error:  # SSLError is one
        raise UsageError(
            f"--tls-certificate {certificate} and --tls-key {key} cannot be used: {error}"
        ) from None
    return str(certificate.absolute()), str(key.absolute())


def parser(prog: str) -> argparse.ArgumentParser:
    """The options of `jaxsys serve`."""
    result = Parser(prog=prog, description="Serve a model over an OpenAI-compatible API.")
    add = result.add_argument
    add_settings(result)
    add("--model", type=Path, help="folder or .gguf file (default: SmolLM2-135M-Instruct)")
    add("--model-name", help="name in the API (default: the file's or folder's)")
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen on, or unix:PATH for a socket of this machine "
        "(default %(default)s)",
    )
    add(
        "--port",
        type=whole(0, 65535),
        default=8000,
        help="0 takes a free one (default %(default)s)",
    )
    add("--tls-certificate", type=Path, help="PEM file; with --tls-key, the server speaks HTTPS")
    add("--tls-key", type=Path, help="PEM file of the certificate's key")
    add("--root-path", default="", metavar="/PATH", help="path that the API stands under")
    add("--api-key-file", type=Path, help="file with one key a line; without it all are let in")
    add(
        "--key-for-all",
        action="store_true",
        help="ask for a key at /metrics, /dashboard, /docs, /openapi.json and /version too; "
        "/health stays open",
    )
    add(
        "--cors",
        action="append",
        metavar="ORIGIN",
        help="origin whose pages may ask from a browser, * for any; may be given several times",
    )
    add(
        "--tool-format",
        choices=("auto", *FORMATS),
        default="auto",
        help="how the model writes calls of tools; auto goes by its chat template",
    )
    add(
        "--max-requests",
        type=whole(),
        default=256,
        help="requests taken before answering 429 (default %(default)s)",
    )
    add(
        "--drain",
        type=float,
        default=30.0,
        help="seconds to finish requests after SIGTERM (default %(default)s)",
    )
    add(
        "--no-generation-config",
        action="store_true",
        help="do not sample by the model's generation_config.json where a request does not say",
    )
    add("--log", choices=("text", "json"), default="text", help="form of the log on stderr")
    many = result.add_argument_group("instances: who computes")
    many.add_argument(
        "--prefill",
        type=whole(most=1024),
        default=1,
        help="instances that read prompts (default %(default)s)",
    )
    many.add_argument(
        "--decode",
        type=whole(0, 1024),
        default=1,
        help="instances that write answers; 0: those of --prefill do both (default %(default)s)",
    )
    many.add_argument(
        "--tensor-parallel",
        type=whole(most=1024),
        default=1,
        help="GPUs that share one instance (default %(default)s)",
    )
    many.add_argument(
        "--cluster",
        metavar="WHERE",
        help="run instances as processes: local (of this machine), auto (the Ray cluster that "
        "runs here, or one started for it), or the address of a Ray cluster (default: all in this "
        "process)",
    )
    many.add_argument(
        "--fronts",
        type=whole(most=64),
        default=1,
        help="processes that speak HTTP behind the one port, tokenize and stream; more than one "
        "needs --cluster local (default %(default)s)",
    )
    loras = result.add_argument_group("low-rank adapters of the model")
    loras.add_argument(
        "--lora",
        action="append",
        metavar="NAME=FOLDER",
        help="serve the adapter of a folder that PEFT writes, as model NAME; may be given several "
        "times",
    )
    loras.add_argument(
        "--allow-lora-updates",
        action="store_true",
        help="load and unload adapters by /v1/load_lora_adapter and /v1/unload_lora_adapter: "
        "whoever may ask may name any folder of this machine",
    )
    loras.add_argument(
        "--max-loras",
        type=whole(most=1024),
        help="adapters loaded at once (default: those of --lora, and "
        f"{LORAS_LATER} more with --allow-lora-updates)",
    )
    loras.add_argument(
        "--max-lora-rank",
        type=whole(most=1024),
        help="largest rank of an adapter (default: that of --lora; with --allow-lora-updates 16 at "
        "least)",
    )
    sizes = result.add_argument_group("sizes of an instance")
    sizes.add_argument(
        "--max-length",
        type=whole(),
        help="tokens of a request, prompt and output (default: the model's or 2048, whichever is "
        "less)",
    )
    sizes.add_argument(
        "--max-batch",
        type=whole(),
        help="requests worked on at once (default: 16 on CPU, else 128)",
    )
    sizes.add_argument(
        "--max-prefill-tokens",
        type=whole(),
        help="prompt tokens computed at once (default: 256 on CPU, else 2048)",
    )
    sizes.add_argument(
        "--page-size",
        type=whole(),
        help="tokens in a page, the unit of cache memory (default: 16 on CPU, else 64)",
    )
    sizes.add_argument(
        "--pages",
        type=whole(),
        dest="page_count",
        metavar="PAGES",
        help="pages of cache memory (default: what the device has)",
    )
    sizes.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the weights (default: float32 on CPU, else bfloat16)",
    )
    sizes.add_argument(
        "--quantise",
        choices=QUANTISATIONS,
        dest="quantisation",
        help="form of the weight matrices (default: that of --dtype)",
    )
    sizes.add_argument(
        "--quantise-cache",
        choices=CACHE_FORMS,
        dest="cache_form",
        help="form of keys and values in pages, one byte each; int8 is closer (default: --dtype's)",
    )
    ahead = result.add_argument_group("tokens guessed ahead (speculation)")
    ahead.add_argument(
        "--speculate",
        choices=("off", *METHODS),
        default="off",
        help="ngram: where a text repeats itself, compute what followed before with the next token "
        "and keep what is right; stops by itself where that does not pay (default %(default)s)",
    )
    for name, text in (
        ("num_speculative_tokens", "most tokens guessed at once"),
        ("prompt_lookup_min", "last tokens that must have stood somewhere before"),
        ("prompt_lookup_max", "last tokens compared to choose among several places"),
    ):
        ahead.add_argument(
            f"--{name.replace('_', '-')}",
            type=whole(),
            default=getattr(SpeculationConfig(), name),
            help=f"{text} (default %(default)s)",
        )
    sizes.add_argument(
        "--host-pages-gib",
        type=float,
        default=0.0,
        metavar="GIB",
        help="host memory of each instance that reads prompts, for pages that the device has no "
        "room to keep (default: none)",
    )
    sizes.add_argument(
        "--compilation-cache",
        type=Path,
        default=Path.home() / ".cache" / "jaxsys" / "compiled",
        help="folder that keeps compiled steps between runs (default %(default)s)",
    )
    energy = result.add_argument_group("latency and energy")
    add_targets(energy.add_argument)
    energy.add_argument(
        "--clocks",
        choices=("observe", "control"),
        default="observe",
        help="whether a real GPU's clock may be set; it is given back at the end, come what may "
        "(default %(default)s)",
    )
    energy.add_argument(
        "--policy",
        choices=list(CLOCK_POLICIES),
        help="what chooses the clock of each iteration (default: ecofreq, or own-rule where the "
        "GPU's costs are not known)",
    )
    energy.add_argument(
        "--route",
        choices=list(ROUTERS),
        default="fewest",
        help="which decode instance gets a request, such as that of the fewest requests or of the "
        "least energy (default %(default)s)",
    )
    energy.add_argument(
        "--route-prompts",
        choices=list(ROUTERS),
        default="fewest",
        help="which instance reads a prompt; prefix: one that holds its beginning, where that "
        "saves energy and is in time; gather: where others wait, while there is time (default "
        "%(default)s)",
    )
    energy.add_argument(
        "--gpu",
        choices=[*GPUS, "none"],
        default="h100",
        help="GPU to model clock and energy of (default %(default)s)",
    )
    energy.add_argument(
        "--profile",
        type=Path,
        metavar="FILE",
        help="of `jaxsys profile serving`, from which predictions begin (default: the model of "
        "--gpu)",
    )
    return result


def read_keys(path: Path | None) -> frozenset[str]:
    if path is None:
        return frozenset()
    text = read_text(path, what="--api-key-file", most_bytes=MIB)
    keys = frozenset(line.strip() for line in text.splitlines() if line.strip())
    if not keys:
        raise UsageError(f"--api-key-file {path} holds no key; write one a line")
    return keys


def model_name_of(path: Path) -> str:
    return path.stem if path.suffix == ".gguf" else path.name
