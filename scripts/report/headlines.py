"""The headline figures, each with its source's claim and the commands that make it."""

import tables
from headline import Headline, Run

WEIPIPE = "WeiPipe (PPoPP 2025, abstract)"
ZERO_BUBBLE = "Zero Bubble (its authors' repository)"
CATFLOW = "CATFlow"
VOLTANA = "VoltanaLLM (arXiv 2509.04827)"

CPU_DEVICES = (
    "Devices of a CPU share its cores and memory, which the model does not know: their rows show "
    "that the comparison runs, not how well GPUs are predicted."
)

STEP = "scripts/bench_train.py step"
ONE = f"{STEP} --devices 1 --microbatches 4"
PAGES = "scripts/bench_pages.py --model smollm2-135m --tokens 64 256 1024 2048 --repeats 15"


def planner(study: str) -> Run:
    return Run(name=study, commands=(f"scripts/bench_planner.py {study}",))


def energy(study: str) -> Run:
    command = f"scripts/bench_energy.py {study} --data {{traces}}"
    return Run(name=study, traces=True, commands=(command,))


MEASURE = (
    Run(name="measure", commands=("scripts/bench_planner.py measure --seconds 36000",)),
    Run(
        name="measure-links",
        gpus=2,
        commands=(
            "scripts/bench_planner.py measure --link host --seconds 36000",
            "scripts/bench_planner.py measure --link sockets --seconds 36000",
        ),
    ),
)
"""On GPUs where there are two or more, else on CPU devices."""

HEADLINES = (
    Headline(
        title="WeiPipe against 1F1B and FSDP on GPUs",
        kind="measured",
        claim=f"{WEIPIPE}: WeiPipe-Interleave 30.9 % over the best pipeline with NVLink and 82 % "
        "with PCIe and InfiniBand, up to 32 GPUs; scales better than FSDP.",
        files=("gpus_*.json",),
        show=tables.several,
        runs=(Run(name="gpus", gpus=2, commands=("scripts/bench_gpus.py --seconds 36000",)),),
    ),
    Headline(
        title="What a transfer under way costs the compute beside it",
        kind="measured",
        claim="none; one step of `weipipe-interleave` on two H100s, from JAX's profiler. "
        "NCCL's kernels take multiprocessors while they send, and while they wait.",
        files=("ring_trace*.json",),
        show=tables.ring_trace,
        runs=(),
    ),
    Headline(
        title="WeiPipe against 1F1B and FSDP over a slow network",
        kind="measured",
        claim=f"{WEIPIPE}: 82 % over the best pipeline where links are slow. Counting bytes, a "
        "ring and a pipeline send as much as each other at G S = 18 H L/P; beyond, the ring sends "
        "less.",
        files=("network*.json",),
        show=tables.network,
        pictures=("results/network.png",),
        runs=(
            Run(
                name="network",
                root=True,
                commands=(
                    "scripts/bench_network.py",
                    (
                        "scripts/bench_network.py --hosts 8 --cpu-share 0.2 --rates 10 --sizes 8 "
                        "--repeats 1 --schedules weipipe-interleave 1f1b-overlap zero-3 "
                        "gspmd-fsdp --out results/network_8.json"
                    ),
                    (
                        "scripts/bench_network.py --local-devices 2 --rates 25 10 --sizes 1 "
                        "--repeats 1 --cpu-share 0.5 --schedules 'weipipe-keep*2' zero-3 "
                        "gspmd-fsdp 4xzero-3 zero-1 1f1b 'weipipe-keep-weights*2' "
                        "--out results/network_nodes.json"
                    ),
                ),
            ),
        ),
    ),
    Headline(
        title="What releases of JAX make of the same programs",
        kind="measured",
        claim="none; counted in compiled programs, nothing is timed.",
        files=("jax_releases_*.json",),
        show=tables.releases,
        runs=(),
    ),
    Headline(
        title="What the lowering costs on one GPU",
        kind="measured",
        claim="none; a plain `jax.jit` step with FSDP shardings (`gspmd-fsdp`) is what it is held "
        "to. Nothing travels on one GPU.",
        files=("train_step_*.json",),
        only=lambda row: row["devices"] == 1,
        show=tables.steps,
        pictures=("docs/train_gpu.png",),
        runs=(
            Run(
                name="train",
                gpus=1,
                commands=(
                    (
                        f"{ONE} --label {{gpu}}_16k_dp --schedules dp --unroll "
                        "--recompute none selective block"
                    ),
                    (
                        f"{ONE} --label {{gpu}}_16k_looped --schedules dp gspmd-fsdp "
                        "--recompute none block"
                    ),
                    f"{ONE} --label {{gpu}}_16k_fsdp --schedules gspmd-fsdp --unroll",
                    f"{ONE} --label {{gpu}}_16k_again --schedules dp gspmd-fsdp --unroll",
                    (
                        f"{ONE} --label {{gpu}}_4k --schedules dp gspmd-fsdp --unroll "
                        "--sequence-lengths 4096 --microbatch-sizes 4"
                    ),
                    (
                        f"{STEP} --devices 1 --microbatches 1 --sequence-lengths 65536 --unroll "
                        "--label {gpu}_64k --schedules dp:none dp:selective dp:block "
                        "gspmd-fsdp:none gspmd-fsdp:block"
                    ),
                    (
                        f"{STEP} --devices 1 --microbatches 1 --sequence-lengths 131072 --unroll "
                        "--label {gpu}_128k --repeats 1 "
                        "--schedules dp:selective dp:block gspmd-fsdp:block"
                    ),
                    "scripts/plot_train.py",
                ),
            ),
        ),
    ),
    Headline(
        title="One block against its products and attention",
        kind="measured",
        claim="none; the floor is the time of the block's products and attention, each run alone.",
        files=("train_block*.json",),
        show=tables.block,
        runs=(
            Run(
                name="block",
                gpus=1,
                commands=(
                    "scripts/bench_train.py block --unroll --recompute none selective block",
                ),
            ),
        ),
    ),
    Headline(
        title="A model trained, and one adapted",
        kind="measured",
        claim="none; what the first writes is in the [guide](train-your-model.md).",
        files=("train_python.json", "train_smollm2_lora.json"),
        show=tables.train_runs,
        pictures=("docs/train_python.png",),
        runs=(
            Run(
                name="trained",
                gpus=1,
                commands=(
                    (
                        "jaxsys train --model byte-llama-75m --steps 2400 --sequence-length 1024 "
                        "--microbatch-size 16 --microbatches 2 --dtype bfloat16 "
                        "--recompute selective --learning-rate 1e-3 "
                        "--out runs/python --export runs/python-model"
                    ),
                    (
                        "scripts/finetune_smollm2.py --steps 300 --sequence-length 1024 "
                        "--microbatches 1"
                    ),
                ),
            ),
        ),
    ),
    Headline(
        title="Memory of steps, compiled for GPUs of which one was there",
        kind="measured",
        claim="none; `gspmd-fsdp` is plain `jax.jit`. By the prediction `jaxsys train` refuses a "
        "step.",
        files=("train_memory*.json",),
        show=tables.train_memory,
        runs=(
            Run(
                name="memory",
                gpus=1,
                commands=(
                    (
                        "scripts/bench_train.py step --compile-only --devices 2 "
                        "--recompute selective --schedules weipipe-interleave:none "
                        "weipipe-interleave 1f1b-overlap zb-h1 weipipe-wzb1 zero-3 "
                        "gspmd-fsdp:block --label 1b"
                    ),
                    (
                        "scripts/bench_train.py step --compile-only --devices 8 --shape 8b "
                        "--recompute block --microbatches 16 "
                        "--sequence-lengths 4096 16384 65536 --schedules "
                        "gspmd-fsdp weipipe-interleave 1f1b-overlap --label 8b"
                    ),
                ),
            ),
        ),
    ),
    Headline(
        title="The longest context that trains",
        kind="measured",
        claim="WeiPipe (PPoPP 2025) names long-context training in its title; its abstract has no "
        "figure.",
        files=("long_context_*.json",),
        show=tables.long_context,
        runs=(
            Run(
                name="long-context",
                gpus=1,
                commands=(
                    (
                        "scripts/bench_long_context.py --devices {gpus} "
                        "--schedules dp weipipe-interleave gspmd-fsdp"
                    ),
                    (
                        "scripts/bench_long_context.py --devices 2 --compile-only --start 262144 "
                        "--most 2097152 --schedules weipipe-interleave gspmd-fsdp"
                    ),
                ),
            ),
        ),
    ),
    Headline(
        title="One sequence on two GPUs",
        kind="measured",
        claim="torchtitan publishes 139 TFLOP/s a GPU for Llama-3-8B with 262,144 tokens on eight "
        "H100s, context parallel over all, in float8. One step a row where there is one sample: a "
        "process' first, in which NCCL is set up.",
        files=("context_*.json",),
        show=tables.context,
        runs=(
            Run(
                name="context",
                gpus=2,
                commands=("scripts/bench_long_context.py --context 2 --memory-gib 128",),
            ),
        ),
    ),
    Headline(
        title="Serving latency",
        kind="measured",
        claim="ML.ENERGY benchmark v3, vLLM with Llama-3.1-8B on one H100, prefill in the same "
        "batches: last column.",
        files=("serve_*.json",),
        only=lambda row: row.get("study") in ("decode", "prefill"),
        show=tables.serving,
        pictures=("docs/serving_h100.png",),
        runs=(
            Run(
                name="serve",
                gpus=1,
                commands=("scripts/bench_serve.py gpu", "scripts/plot_serve.py"),
            ),
        ),
    ),
    Headline(
        title="What deciding costs",
        kind="measured",
        claim=f"{VOLTANA}: a decision takes less than 1 ms.",
        files=("energy_decisions.json",),
        show=tables.decisions,
        runs=(energy("decisions"),),
    ),
    Headline(
        title="Kills at random moments",
        kind="measured",
        claim="none; a killed and resumed run must compute what an uninterrupted one does.",
        files=("crash_test*.json",),
        show=tables.crashes,
        runs=(Run(name="crash", commands=("scripts/crash_test.py",)),),
    ),
    Headline(
        title="Health while large bodies arrive",
        kind="measured",
        claim="none; the aim is an answer within 100 ms at the 99th percentile.",
        files=("health.json",),
        show=tables.health,
        runs=(Run(name="health", commands=("scripts/bench_health.py",)),),
    ),
    Headline(
        title="Clients of OpenAI's API against the server",
        kind="measured",
        claim="none; each client asks in its own way for chats, tools, forms, embeddings. Not run "
        "with the others, since it downloads them: `scripts/clients.py`.",
        files=("clients.json",),
        show=tables.clients,
        runs=(),
    ),
    Headline(
        title="Scripts of others, a few lines changed",
        kind="measured",
        claim="none; the aim is 20 steps within 2e-6 of the script's own loop, at most 14 lines "
        "changed. Not run with the others, since two need Haiku and Equinox: "
        "`tests/train/script_kinds/compared.py`.",
        files=("script_kinds.json",),
        show=tables.script_kinds,
        runs=(),
    ),
    Headline(
        title="Models drawn at random",
        kind="measured",
        claim="none; each trains as its author's loop does, or is refused in one line: "
        "`tests/train/random_outcomes.py`.",
        files=("random_models.json",),
        show=tables.random_models,
        runs=(),
    ),
    Headline(
        title="Predicted against measured steps",
        kind="measured",
        claim=f"none. {CPU_DEVICES}",
        files=("planner_measure_*.json",),
        show=tables.predicted_steps,
        runs=MEASURE,
    ),
    Headline(
        title="ZeRO-3.5 and ZeRO-4 measured",
        kind="measured",
        claim=f"{CATFLOW}: ZeRO-4 39.1 % faster than ZeRO-3, with 36.6 % less memory than ZeRO-2; "
        f"see the simulated curve below. {CPU_DEVICES}",
        files=("planner_measure_*.json",),
        show=tables.zero_measured,
        runs=MEASURE,
    ),
    Headline(
        title="What fronts take",
        kind="measured",
        claim="none; instances are simulated, fronts and connections are real.",
        files=("front_capacity.json", "fronts_capacity.json"),
        show=tables.front,
        runs=(Run(name="front", commands=("scripts/bench_front.py",)),),
    ),
    Headline(
        title="Cache pages between processes",
        kind="measured",
        claim="none.",
        files=("page_transfer*.json",),
        show=tables.pages,
        runs=(Run(name="pages", commands=(PAGES,)),),
    ),
    Headline(
        title="Simulated against live serving",
        kind="measured",
        claim=f"{VOLTANA}: mean error of predicted TTFT 7 to 14 ms, of ITL 2 to 3 ms.",
        files=("energy_live*.json",),
        show=tables.live,
        runs=(
            Run(
                name="live",
                gpus=1,
                traces=True,
                commands=(
                    "scripts/bench_energy_live.py --trace {traces}/AzureLLMInferenceTrace_conv.csv",
                ),
            ),
        ),
    ),
    Headline(
        title="Three loads predicted before they are served",
        kind="simulated",
        claim="none.",
        files=("energy_loads*.json",),
        show=tables.loads,
        runs=(Run(name="loads", commands=("scripts/bench_energy_loads.py predict",)),),
    ),
    Headline(
        title="Bubbles of the schedules",
        kind="simulated",
        claim=f"{WEIPIPE} speaks of minimal bubbles for WZB1 and WZB2, without a figure. "
        f"{ZERO_BUBBLE}: with equal times ZB-H1 has a third of 1F1B's bubble in the same memory, "
        "ZB-H2 none in twice as much.",
        files=("schedules.json",),
        show=tables.bubbles,
        pictures=("docs/schedules/weipipe-interleave.png",),
        runs=(
            Run(
                name="schedules",
                commands=(
                    "scripts/table_schedules.py --out results/schedules.json",
                    "scripts/plot_schedules.py",
                ),
            ),
        ),
    ),
    Headline(
        title="What a first step takes to compile",
        kind="measured",
        claim="none; processor seconds to trace and compile a step of 32 small layers on 8 virtual "
        "CPU devices, beside version 0.1.0's for the same step. ZeRO's loop over layers that are "
        "alike since.",
        files=("compile_cpu.json",),
        show=tables.compiling,
        runs=(Run(name="compile", commands=("scripts/bench_compile.py",)),),
    ),
    Headline(
        title="Could a ring plan be shorter",
        kind="simulated",
        claim="none; *least found* is a lower bound by exhaustive search with equal times.",
        files=("search_wzb.json",),
        show=tables.ring_search,
        runs=(
            Run(
                name="ring-search",
                commands=("scripts/search_wzb.py --out results/search_wzb.json",),
            ),
        ),
    ),
    Headline(
        title="ZeRO-3.5 and ZeRO-4 against ZeRO-3 and ZeRO-2",
        kind="simulated",
        claim=f"{CATFLOW}: ZeRO-4 39.1 % faster than ZeRO-3, with 36.6 % less memory than ZeRO-2. "
        "The ZeRO-3 of its public sweep hardly prefetches; the one here does, and then keeping and "
        "deferring alone cannot gain more than 50 %.",
        files=("planner_zero.json",),
        show=tables.zero,
        pictures=("docs/planner_zero.png",),
        runs=(planner("zero"),),
    ),
    Headline(
        title="Memory of ZeRO-3.5 and ZeRO-4 below ZeRO-2's, in percent",
        kind="simulated",
        claim=f"{CATFLOW}: 36.6 % less memory than ZeRO-2.",
        files=("planner_memory.json",),
        show=tables.zero_memory,
        runs=(planner("memory"),),
    ),
    Headline(
        title="Strategies that the search rediscovers",
        kind="simulated",
        claim=f"{CATFLOW}: a search over trajectories of data, from plain data parallelism, finds "
        "the known strategies again.",
        files=("planner_regimes.json",),
        show=tables.rediscovery,
        runs=(planner("regimes"),),
    ),
    Headline(
        title="The best strategy by link, tokens and memory",
        kind="simulated",
        claim="none.",
        files=("planner_map.json",),
        show=tables.strategy_map,
        pictures=("docs/planner_map.png",),
        runs=(planner("map"),),
    ),
    Headline(
        title="A search over 64 devices",
        kind="simulated",
        claim="Unity (OSDI 2022) states less than 20 minutes for its search, on up to 192 GPUs.",
        files=("planner_sweep.json",),
        show=tables.sweep,
        runs=(planner("sweep"),),
    ),
    Headline(
        title="What planning takes, by model and devices",
        kind="measured",
        claim="none.",
        files=("planner_size.json",),
        show=tables.planning,
        runs=(planner("size"),),
    ),
    Headline(
        title="Training runs that others published, predicted",
        kind="simulated",
        claim="each run's own figure, with where it stands in scripts/published_runs.json.",
        files=("planner_published.json",),
        show=tables.published,
        runs=(Run(name="published", commands=("scripts/published_runs.py",)),),
    ),
    Headline(
        title="Is the published serving experiment met",
        kind="simulated",
        claim=f"{VOLTANA}: energy and attainment of four A100 at two static clocks. Fitted to "
        "both lines this is an error of fit; fitted to the other line, of prediction.",
        files=("energy_calibration.json",),
        show=tables.calibration,
        pictures=("results/energy_calibration.png",),
        runs=(energy("calibration"),),
    ),
    Headline(
        title="Energy against the maximum clock at equal attainment",
        kind="simulated",
        claim=f"{VOLTANA}: up to 36.3 % less energy than the static maximum clock; second column "
        "by rate, read off its plot.",
        files=("energy_published.json",),
        show=tables.savings,
        pictures=("results/energy_published.png",),
        runs=(energy("published"),),
    ),
    Headline(
        title="Where the headroom lies",
        kind="simulated",
        claim="none.",
        files=("energy_headroom.json",),
        show=tables.headroom,
        runs=(energy("headroom"),),
    ),
    Headline(
        title="Energy on other traces, models and GPUs",
        kind="simulated",
        claim="none.",
        files=("energy_matrix.json",),
        show=tables.matrix,
        pictures=("results/energy_matrix.png",),
        runs=(energy("matrix"),),
    ),
    Headline(
        title="Energy over a day, awake and asleep",
        kind="simulated",
        claim="none.",
        files=("energy_day.json",),
        show=tables.day,
        runs=(energy("day"),),
    ),
    Headline(
        title="What changes the saving",
        kind="simulated",
        claim="none.",
        files=("energy_ablation.json",),
        show=tables.ablation,
        pictures=("results/energy_ablation.png",),
        runs=(energy("ablation"),),
    ),
)
