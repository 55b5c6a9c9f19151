"""`jaxsys train`: trains a decoder on text, by default on the standard library's sources."""

import argparse
import contextlib
import logging
import math
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxsys import float8 as eight_bits
from jaxsys.axes import AROUND
from jaxsys.context import ContextSplit, with_split
from jaxsys.errors import RunError, UsageError
from jaxsys.files import check_writable
from jaxsys.lowering import RECOMPUTE_POLICIES, lacks
from jaxsys.model import Tokenizer
from jaxsys.model.float8_products import BACKWARD, EXACT, Float8
from jaxsys.model.save import check_target
from jaxsys.options import Parser, in_options, whole
from jaxsys.strategies import STRATEGIES
from jaxsys.train import corpus, plan_file, samples
from jaxsys.train.checkpoint import check_unused
from jaxsys.train.hosts import Hosts, choose_devices, join
from jaxsys.train.layout import DTYPE, AskedLayout, lay_out
from jaxsys.train.loader import Batches
from jaxsys.train.loop import Report
from jaxsys.train.peers import PeerMonitor
from jaxsys.train.recipe import Recipe, decoder_flops_per_token
from jaxsys.train.start import Lora, Start, start_of
from jaxsys.train.trainer import Trainer

HELD_OUT_BATCHES = 4
logger = logging.getLogger(__name__)


def parser(prog: str) -> argparse.ArgumentParser:
    """The options of `jaxsys train`."""
    result = Parser(prog=prog, description=__doc__)
    add = result.add_argument
    add(
        "--model",
        default="preset/byte-llama",
        help="model folder or .gguf file to train on, or a preset to train (default %(default)s)",
    )
    add("--data", help="text, .jsonl, .npy tokens or a folder (default: the standard library)")
    add(
        "--steps",
        type=whole(1, 2**31 - 1),
        default=100,
        help="batches in all (default %(default)s)",
    )
    add("--out", type=Path, help="folder for checkpoints and metrics.jsonl")
    add("--resume", action="store_true", help="go on from the last good checkpoint in --out")
    add("--export", type=Path, help="write the trained model here, for `jaxsys serve`")
    lora = result.add_argument_group("low-rank adapters of a model's folder")
    lora.add_argument(
        "--lora",
        type=whole(1, 1024),
        metavar="RANK",
        help="train adapters alone; --export writes them as PEFT does",
    )
    lora.add_argument(
        "--lora-alpha", type=float, help="their weight is this over RANK (default: twice RANK)"
    )
    lora.add_argument(
        "--lora-targets",
        nargs="+",
        metavar="NAME",
        help="kernels that have one, such as query or mlp/up (default: all that are served)",
    )
    how = result.add_argument_group("how it is run")
    how.add_argument(
        "--schedule",
        help=f"{', '.join(STRATEGIES)}, a plan's or schedule's .json, or auto: ask the planner "
        "(default weipipe-interleave; dp on one device; zero-3 with --context or --features-by "
        "ring)",
    )
    how.add_argument(
        "--devices",
        type=whole(),
        help="default: as many as a plan's or schedule's file is for, else all GPUs, else 4 "
        "virtual CPU devices",
    )
    for axis in AROUND.values():
        how.add_argument(f"--{axis.asked}", type=whole(), help=axis.help)
        for option in axis.more:
            how.add_argument(
                f"--{option.name.replace('_', '-')}",
                type=str if option.choices else whole(),
                choices=option.choices,
                metavar=option.metavar,
                help=option.help,
            )
    how.add_argument(
        "--microbatches",
        type=whole(),
        help="of one ring and step, with --members of one member of each place (default 2 a "
        "device, or as a file says)",
    )
    how.add_argument(
        "--dtype",
        dest="compute_dtype",
        choices=("float32", "bfloat16"),
        help="of compute (default float32, or as a plan says)",
    )
    how.add_argument(
        "--gradients",
        dest="gradient_dtype",
        choices=("float32", "bfloat16"),
        help="dtype in which gradients are summed and sent (default float32, or as a plan says)",
    )
    how.add_argument(
        "--float8",
        nargs="*",
        metavar="PATH",
        help="multiply in float8: all products of blocks and head but the head's forward one, or "
        "those of matrices at these paths, regular expressions such as 'mlp/.*' (default: none)",
    )
    how.add_argument(
        "--float8-forward",
        nargs="*",
        metavar="PATH",
        help="of those matrices, the ones whose forward product is in float8 too, which costs loss "
        "(default: all but the head; no PATH: none)",
    )
    how.add_argument(
        "--float8-backward",
        choices=tuple(BACKWARD),
        help="form of gradients that flow back: e4m3-rows has a scale a token or output, and three "
        "bits behind the point where e5m2 has two (default: e5m2)",
    )
    how.add_argument(
        "--float8-exact",
        choices=EXACT,
        help="products in float8 that are summed in float32 throughout: GPUs of Hopper's kind sum "
        "the others in some 14 bits, which is quicker (default: backward)",
    )
    how.add_argument(
        "--float8-transfers",
        action="store_true",
        help="matrices of blocks that are multiplied in float8, forward too, also go from device "
        "to device so, half the bytes of bfloat16; scales of matrices are then powers of two",
    )
    how.add_argument(
        "--recompute",
        choices=RECOMPUTE_POLICIES,
        help="what the backward pass computes again (default block, or as a plan says)",
    )
    how.add_argument(
        "--unroll",
        action="store_true",
        help="write a chunk's layers out instead of looping over them: faster steps where "
        "residuals are kept, longer compiling (one body a layer)",
    )
    how.add_argument(
        "--memory-gib",
        type=float,
        help="refuse a step predicted to need more on a device (default: what it has; inf: never)",
    )
    what = result.add_argument_group("what the result depends on")
    what.add_argument(
        "--balance",
        type=float,
        metavar="W",
        help="weight of the loss that keeps experts equally busy; 0 leaves it out (default: as the "
        "model says)",
    )
    what.add_argument(
        "--microbatch-size", type=whole(), help="sequences (default 4, or as a plan says)"
    )
    what.add_argument(
        "--sequence-length", type=whole(), help="tokens (default 128, or as a plan says)"
    )
    what.add_argument("--packing", default="windows", choices=("windows", "documents"))
    what.add_argument(
        "--learning-rate",
        type=float,
        help="peak (default 3e-3; of a model's own weights 2e-5, of adapters 2e-4)",
    )
    what.add_argument("--clip-norm", type=float, default=1.0, help="of gradients (default 1.0)")
    what.add_argument("--seed", type=whole(0, 2**63 - 1), default=0)
    keep = result.add_argument_group("checkpoints and reports")
    keep.add_argument("--save-every", type=whole(), help="steps (default: a fifth of --steps)")
    keep.add_argument("--stop-at", type=whole(), help="stop after this step, with a checkpoint")
    keep.add_argument(
        "--accept-changes", action="store_true", help="resume although settings differ"
    )
    keep.add_argument(
        "--non-finite",
        default="stop",
        choices=("stop", "skip"),
        help="what a loss that is not finite does (default %(default)s)",
    )
    keep.add_argument(
        "--wait",
        type=float,
        default=0.0,
        dest="wait_s",
        metavar="S",
        help="for another run to let go of --out (default: refuse at once)",
    )
    keep.add_argument("--tensorboard", action="store_true", help="event files in --out")
    keep.add_argument(
        "--profile", action="store_true", help="record 3 steps for xprof, in --out/profile"
    )
    keep.add_argument("--quiet", action="store_true", help="print errors only")
    many = result.add_argument_group("many processes")
    many.add_argument(
        "--distributed", action="store_true", help="join as Slurm, MPI or Kubernetes say"
    )
    many.add_argument("--coordinator", help="host:port of process 0")
    many.add_argument("--processes", type=whole())
    many.add_argument("--process", type=whole(0))
    many.add_argument(
        "--hang-timeout",
        type=float,
        dest="hang_timeout_s",
        metavar="S",
        help="leave when a step takes longer",
    )
    many.add_argument(
        "--lost-after",
        type=float,
        default=15.0,
        dest="lost_after_s",
        metavar="S",
        help="of silence (default 15)",
    )
    return result


def main(argv: list[str], prog: str) -> int:
    """Runs the command; returns its exit code, 128 + n where signal n ended the run."""
    arguments = parser(prog).parse_args(argv)
    hosts = Hosts(
        automatic=arguments.distributed,
        coordinator=arguments.coordinator,
        processes=arguments.processes,
        process=arguments.process,
    )
    if arguments.devices is None and arguments.schedule is not None:
        arguments.devices = plan_file.devices_of(arguments.schedule)
    join(hosts, devices=arguments.devices)
    watched = contextlib.nullcontext()
    if hosts.many:  # from here on: making parameters waits for peers, and compiling takes long
        watched = PeerMonitor(lost_after_s=arguments.lost_after_s, from_start=True)
    try:
        with watched:
            report = train(arguments, hosts)
    except (UsageError, RunError) as error:
        if not hosts.many:
            raise
        # The orderly way out waits for all peers, some of which may be gone.
        text = in_options(str(error), parser(prog))
        print(f"{prog}: process {jax.process_index()}: {text}", file=sys.stderr, flush=True)
        os._exit(2 if isinstance(error, UsageError) else 1)
    except Exception:
        if not hosts.many:
            raise
        logger.exception("%s: process %d failed", prog, jax.process_index())
        os._exit(1)
    return 0 if report.signal is None else 128 + report.signal


def train(arguments: argparse.Namespace, hosts: Hosts) -> Report:
    """Trains as the options say, exports if asked, and says how it ended."""
    if arguments.export is not None:  # before anything is computed for it
        target = arguments.export
        if not arguments.resume and target.is_dir() and any(target.iterdir()):
            raise UsageError(
                f"--export {target} is not empty; name another folder, or go on with the run that "
                "wrote it (--resume, with its --out), which replaces the model there"
            )
        check_target(arguments.export, overwrite=arguments.resume)
    for option, given in (
        ("--tensorboard", arguments.tensorboard),
        ("--profile", arguments.profile),
    ):
        if given and arguments.out is None:
            raise UsageError(f"{option} needs --out, the folder to write to")
    for folder in (arguments.out, arguments.export):
        if folder is not None and not hosts.many:  # not every host may have it
            check_writable(folder if folder == arguments.out else folder.parent)
    # Asking JAX which process this is starts it: not before the devices are chosen.
    say = _silent if arguments.quiet or (hosts.many and jax.process_index()) else _print
    if arguments.stop_at is not None and arguments.stop_at > arguments.steps:
        raise UsageError(
            f"--stop-at {arguments.stop_at} is past --steps {arguments.steps}, where the run ends; "
            "leave it out, or give a smaller one"
        )
    if arguments.resume and arguments.out is None:
        raise UsageError("--resume needs --out, the folder of the run to go on with")
    if arguments.out is not None and not arguments.resume:
        check_unused(arguments.out)
    devices = choose_devices(arguments.devices, hosts)
    float8 = _float8(arguments)
    start = start_of(
        arguments.model,
        seed=arguments.seed,
        float8=float8,
        lora=_lora(arguments),
        balance=arguments.balance,
    )
    config, tokenizer = start.config, start.tokenizer
    if arguments.export is not None and arguments.lora is None:
        config.to_hf()  # what no config.json says is refused before it is trained
    around, split = asked_around(arguments)
    asked = AskedLayout(
        schedule=arguments.schedule,
        sequence_length=arguments.sequence_length,
        around=around,
        split=split,
        features_by=arguments.features_by,
        microbatches=arguments.microbatches,
        microbatch_size=arguments.microbatch_size,
        recompute=arguments.recompute,
        memory_gib=arguments.memory_gib,
        dtype=arguments.compute_dtype,
        gradient_dtype=arguments.gradient_dtype,
        model=start.model,
    )
    layout = lay_out(config, devices, asked)
    recipe = Recipe(
        model=start.name,
        steps=arguments.steps,
        batch_sequences=layout.rows * layout.microbatch_size,
        sequence_length=layout.sequence_length,
        learning_rate=start.learning_rate
        if arguments.learning_rate is None
        else arguments.learning_rate,
        warm_up_steps=max(1, arguments.steps // 20),
        compute_dtype=layout.dtype,
        packing=arguments.packing,
        seed=arguments.seed,
    )
    training, held_out = corpus.split(_read(arguments.data, start))
    for part in (training, held_out):
        samples.check_vocabulary(part, config.vocab_size)
    data = Batches(
        _cut(training, recipe, tokenizer),
        rows=layout.rows,
        microbatch_size=layout.microbatch_size,
        seed=recipe.seed,
    )
    trainer = Trainer(
        start.model,
        start.parameters,
        start.optimizer(recipe.optimizer()),
        schedule=layout.schedule,
        mesh=layout.mesh,
        **layout.named,
        compute_dtype=recipe.compute_dtype,
        gradient_dtype=layout.gradient_dtype,
        recompute=layout.recompute,
        unroll=arguments.unroll,
        clip_norm=arguments.clip_norm,
        memory_gib=arguments.memory_gib,
        microbatch={
            name: jax.ShapeDtypeStruct((layout.microbatch_size, recipe.sequence_length), jnp.int32)
            for name in ("inputs", "targets")
        },
        non_finite=arguments.non_finite,
        settings=recipe.settings(data=training.fingerprint(), held_out=held_out.fingerprint())
        | ({} if layout.gradient_dtype == DTYPE else {"gradient_dtype": layout.gradient_dtype})
        | (
            {}
            if float8 is None
            else {"float8": list(float8.paths), "float8_forward": list(float8.forward)}
            | ({} if float8.backward == "e5m2" else {"float8_backward": float8.backward})
            | ({} if float8.exact == "backward" else {"float8_exact": float8.exact})
            | ({"float8_transfers": True} if float8.transfers else {})
        )
        | start.settings,
        flops_per_token=decoder_flops_per_token(config, recipe.sequence_length),
    )
    # Said only now: what is refused is refused in one line.
    if layout.reason is not None:
        say(layout.reason)
    if start.from_what is not None:
        say(start.from_what)
    if start.not_applied is not None:
        say(start.not_applied)
    experts = config.experts
    if arguments.balance is None and experts is not None and experts.balance:
        say(f"the loss has {experts.balance:g} times that of unequally busy experts; see --balance")
    for sentence in lacks(layout.mesh):
        say(sentence)
    if float8 is not None:
        multiplies = eight_bits.answer(layout.mesh.devices.flat[0])
        if not multiplies.computes:
            say(f"products are rounded to float8 and computed wider: {multiplies.reason}")
    say(
        f"{training.source}: {len(training.tokens):,} tokens in {training.documents} documents to "
        f"train on, {len(held_out.tokens):,} held out; {data.samples_per_epoch:,} samples"
    )
    report = trainer.fit(
        data,
        steps=recipe.steps,
        folder=arguments.out,
        resume=arguments.resume,
        accept_changes=arguments.accept_changes,
        save_every=max(1, recipe.steps // 5)
        if arguments.save_every is None
        else arguments.save_every,
        held_out=_held_out(held_out, recipe, data, tokenizer),
        stop_at=arguments.stop_at,
        progress=not arguments.quiet,
        tensorboard=arguments.tensorboard,
        profile=arguments.profile,
        hang_timeout_s=arguments.hang_timeout_s,
        lost_after_s=arguments.lost_after_s,
        wait_s=arguments.wait_s,
    )
    if report.loss is not None:
        say(_ending(report))
    if arguments.export is not None and report.signal is None:
        if report.held_out_loss is not None and not math.isfinite(report.held_out_loss):
            raise RunError(
                f"step {report.step}: the held-out loss is {report.held_out_loss}; nothing was "
                "exported; train anew with a lower --learning-rate, or in --dtype float32"
            )
        # Of one process a layer is fetched when it is written; several fetch together.
        alone = jax.process_count() == 1
        parameters, how = trainer.parameters() if alone else trainer.host_parameters(), ""
        if jax.process_index() == 0:
            try:
                how = start.export(arguments.export, parameters, arguments.resume)
            except OSError as error:
                kept = f"--out {arguments.out} has the run: " if arguments.out else ""
                raise RunError(
                    f"the model could not be exported to {arguments.export}: "
                    f"{error.strerror or error}; {kept}make room, and give --export again with "
                    "--resume"
                ) from None
        say(f"exported to {arguments.export}; try: jaxsys serve {how}")
    return report


def _float8(arguments: argparse.Namespace) -> Float8 | None:
    forward, backward = arguments.float8_forward, arguments.float8_backward
    exact, transfers = arguments.float8_exact, arguments.float8_transfers or None
    flags = {"forward": forward, "backward": backward, "exact": exact, "transfers": transfers}
    if arguments.float8 is None:
        for flag, given in flags.items():
            if given is not None:
                raise UsageError(f"--float8-{flag} is of products in float8; give --float8 too")
        return None
    whole = Float8()
    return Float8(
        paths=tuple(arguments.float8 or whole.paths),
        forward=whole.forward if forward is None else tuple(forward),
        backward=backward or whole.backward,
        exact=exact or whole.exact,
        transfers=bool(transfers),
    )


def _lora(arguments: argparse.Namespace) -> Lora | None:
    rank, alpha, targets = arguments.lora, arguments.lora_alpha, arguments.lora_targets
    if rank is None:
        if alpha is not None or targets is not None:
            raise UsageError(
                "--lora-alpha and --lora-targets are of adapters; say their rank with --lora"
            )
        return None
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise UsageError(f"--lora-alpha {alpha} must be above 0, and finite")
    return Lora(rank=rank, alpha=alpha, targets=tuple(targets or ()))


def asked_around(
    arguments: argparse.Namespace,
) -> tuple[dict[str, int | None], ContextSplit | None]:
    """What the command asks of axes around a ring and within its places, see `with_split`."""
    return with_split(
        {name: getattr(arguments, axis.asked) for name, axis in AROUND.items()},
        {one.name: getattr(arguments, one.name) for axis in AROUND.values() for one in axis.more},
    )


def _read(path: str | None, start: Start) -> corpus.Corpus:
    separator = start.tokenizer.eos_ids[0]
    if path is None:
        return corpus.standard_library(start.encode, separator=separator)
    return corpus.read(path, start.encode, separator=separator)


def _cut(text: corpus.Corpus, recipe: Recipe, tokenizer: Tokenizer) -> samples.Cut:
    if recipe.packing == "documents":
        return samples.whole_documents(text, recipe.sequence_length, padding=tokenizer.eos_ids[0])
    return samples.windows(text, recipe.sequence_length)


def _held_out(text: corpus.Corpus, recipe: Recipe, data: Batches, tokenizer: Tokenizer) -> list:
    """A few batches of held-out samples, spread over the text; fewer if it is short."""
    if len(text.tokens) <= recipe.sequence_length:
        return []
    cut = _cut(text, recipe, tokenizer)
    batches = Batches(cut, rows=data.rows, microbatch_size=data.microbatch_size, seed=1)
    count = min(HELD_OUT_BATCHES, max(1, len(cut) // batches.batch_samples))
    stream = batches.read(0)
    return [next(stream) for _ in range(count)]


def _ending(report: Report) -> str:
    parts = [f"step {report.step}: loss {report.loss:.4f}"]
    if report.held_out_loss is not None:
        parts.append(f"held-out loss {report.held_out_loss:.4f}")
    if report.tokens_per_s is not None:
        parts.append(f"{report.tokens_per_s:,.0f} tokens/s")
    if report.mfu is not None:
        parts.append(f"MFU {report.mfu:.1%}")
    if report.skipped:
        parts.append(f"{report.skipped} batches skipped")
    return ", ".join(parts)


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _silent(text: str) -> None:
    del text
