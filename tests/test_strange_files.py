"""Whatever a file holds, its reader answers in one line, soon, and without taking much memory.

Valid files of every kind are damaged by seeded mutations of their bytes and of their values, and
read. A reader may take what is still valid; otherwise it raises UsageError or RunError.
"""

import copy
import json
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsys import strategies
from jaxsys.errors import RunError, UsageError
from jaxsys.hardware import device, link
from jaxsys.model import ByteTokenizer, initial_parameters, load, save_safetensors
from jaxsys.model.config import DecoderConfig
from jaxsys.model.folder import read_config, read_parameters, read_tokenizer
from jaxsys.model.safetensors_file import SafetensorsFile
from jaxsys.planner.files import load_plan
from jaxsys.planner.plans import Plan, State, data_parallel_plan
from jaxsys.planner.profile import load_profile as load_cluster_profile
from jaxsys.results import read_result
from jaxsys.schedule import Schedule, ScheduleError
from jaxsys.serve.energy.gpu_model import Load
from jaxsys.serve.energy.profile import Fingerprint, Profile, Sample
from jaxsys.serve.energy.profile import load_profile as load_serving_profile
from jaxsys.serve.options import read_keys
from jaxsys.serve.simulation.trace_files import read_trace
from jaxsys.train import corpus
from jaxsys.train.metrics import MetricsLog
from jaxsys.train.plan_file import devices_of, read_plan
from studies.lengths import lengths_from_csv

CONFIG = DecoderConfig(
    vocab_size=264,
    hidden_size=8,
    intermediate_size=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    max_positions=64,
)
SECONDS = 1.0
"""Of processor time that any one file may take."""
MEMORY_BYTES = 200e6
"""That reading any one file may add to the process at its peak."""

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 1.5, -0.0, 40_000_000, 2**31, 2**63, 10**18, 10**30, 10**200,
    1e300, float("nan"), float("inf"), float("-inf"), "", "x", "1", "\0", "../x", "/", "x\ny",
    "\ud800", "é" * 300, "{% for i in range(9) %}{{ i }}", "{{ 1 // 0 }}", "{{ messages.x.y }}",
    [], {}, [[]], [None], [{}], {"": None}, {"content": 1}, [1, "2"], ["x"] * 1000,
)  # fmt: skip
ODD_TEXTS = (
    "", "-1", "1e999", "nan", "9" * 30, "9" * 5000, "\0", "\r", "\n", '"', "\\", "\ufeff", "é",
    "[" * 2000, '{"a":' * 2000, "null", "true", "0x10", "1_000", "{%", "{{", "}}", "%}", "40000000",
    "18446744073709551615",
)  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """A kind of file: how a valid one is made, and what reads it."""

    name: str
    make: Callable[[Path], Path]
    """Writes all that belongs to it into a folder; returns the file that is damaged."""
    read: Callable[[Path], Any]
    refuses: bool = True
    """Whether it refuses anything: what a kill left of a log is left out."""


def model_folder(folder: Path) -> None:
    save_safetensors(
        folder / "model", CONFIG, initial_parameters(CONFIG), ByteTokenizer(), max_shard_bytes=9000
    )
    settings = folder / "model/tokenizer_config.json"
    more = {"chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}]}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | more))


def of_model(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        model_folder(folder)
        return folder / "model" / name

    return make


def read_folder(path: Path) -> None:
    read_parameters(path.parent, read_config(path.parent), jnp.float32)


def read_chat(path: Path) -> None:
    tokenizer = read_tokenizer(path.parent)
    assert tokenizer is not None
    tokenizer.encode("text")
    tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])


def one_template(folder: Path) -> Path:
    path = of_model("chat_template.jinja")(folder)
    path.write_text(str(ByteTokenizer().chat_template), encoding="utf-8")
    return path


def one_tensor_file(folder: Path) -> Path:
    save_safetensors(folder / "model", CONFIG, initial_parameters(CONFIG))
    return folder / "model/model.safetensors"


def read_tensors(path: Path) -> None:
    file = SafetensorsFile(path)
    for name in file.shapes:
        file.read(name).sum(dtype=np.float64)


def gguf_file(folder: Path) -> Path:
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(8)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = ["a", "b", "ab", *(f"<{index}>" for index in range(13))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 14 + [3] * 2)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(15)
    sizes = {"token_embd": (16, 8), "output_norm": (8,)}
    of_block = {"attn_norm": (8,), "attn_q": (8, 8), "attn_k": (4, 8), "attn_v": (4, 8)}
    of_block |= {"attn_output": (8, 8), "ffn_norm": (8,), "ffn_gate": (8, 8), "ffn_up": (8, 8)}
    of_block |= {"ffn_down": (8, 8)}
    for name, shape in (
        sizes | {f"blk.0.{name}": shape for name, shape in of_block.items()}
    ).items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "m.gguf"


def plan(folder: Path) -> Path:
    value = {
        "format": "jaxsys-plan-file",
        "version": 1,
        "for": {"layers": 4, "devices": 4, "batch": 32},
        "request": {"sequence_length": 16, "dtype": "float32"},
        "plan": Plan(
            shard=4, microbatch_size=2, state=State.SPLIT, layers=data_parallel_plan(4, 4).layers
        ).to_json(),
    }
    (folder / "plan.json").write_text(json.dumps(value))
    return folder / "plan.json"


def read_any_plan(path: Path) -> None:
    load_plan(path)
    read_plan(path, layers=4)


def schedule(folder: Path) -> Path:
    text = strategies.build("1f1b", devices=2, microbatches=2).to_json()
    (folder / "s.json").write_text(text)
    return folder / "s.json"


def read_schedule(path: Path) -> None:
    devices_of(path)
    text = path.read_bytes().decode("utf-8", "replace")
    found = Schedule.from_json(text)
    assert found.ticks == len(found.tasks_by_tick) == len(found.moves_by_start)


def cluster_profile(folder: Path) -> Path:
    specs = {"device": asdict(device("h100")), "link": asdict(link("nvlink"))}
    for spec in specs.values():
        for name in ("sources", "clocks"):  # not of a profile
            spec.pop(name, None)
    head = {"format": "jaxsys-profile-cluster", "version": 2, "devices": 2}
    (folder / "p.json").write_text(json.dumps(head | specs))
    return folder / "p.json"


def serving_profile(folder: Path) -> Path:
    samples = [Sample(Load(batch=n, kv_tokens=16 * n), 1980, 0.01 * n, 300.0) for n in (1, 2, 4)]
    origin = Fingerprint(gpu="h100", model="1x8", engine="simulated")
    Profile(fingerprint=origin, samples=samples, buckets=(4,)).save(folder / "p.json")
    return folder / "p.json"


def result(folder: Path) -> Path:
    fields = ("benchmark", "kind", "hardware", "versions", "config", "rows")
    (folder / "r.json").write_text(json.dumps({field: {} for field in fields}))
    return folder / "r.json"


def written(name: str, content: str | bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return make


def token_array(folder: Path) -> Path:
    np.save(folder / "t.npy", np.arange(64, dtype=np.uint16))
    return folder / "t.npy"


def read_corpus(path: Path) -> None:
    tokenizer = ByteTokenizer()
    found = corpus.read(path, tokenizer.encode_array, separator=256)
    found.fingerprint()
    corpus.split(found)


def read_metrics(path: Path) -> None:
    content = path.read_bytes()
    try:
        MetricsLog(path, resume_step=5).close()
    finally:
        path.write_bytes(content)


READERS = (
    Reader("config", of_model("config.json"), read_folder),
    Reader("index", of_model("model.safetensors.index.json"), read_folder),
    Reader("tensors", one_tensor_file, read_tensors),
    Reader("tokenizer", of_model("tokenizer.json"), read_chat),
    Reader("tokenizer config", of_model("tokenizer_config.json"), read_chat),
    Reader("generation config", of_model("generation_config.json"), read_chat),
    Reader("chat template", one_template, read_chat),
    Reader("GGUF", gguf_file, load),
    Reader("plan", plan, read_any_plan),
    Reader("schedule", schedule, read_schedule),
    Reader("cluster profile", cluster_profile, load_cluster_profile),
    Reader("serving profile", serving_profile, load_serving_profile),
    Reader("result", result, read_result),
    Reader("JSONL", written("d.jsonl", '{"text": "a b"}\n{"text": "\\u00e9"}\n'), read_corpus),
    Reader("token array", token_array, read_corpus),
    Reader("text", written("d.txt", "some text\n"), read_corpus),
    Reader(
        "metrics",
        written("m.jsonl", '{"step": 1, "loss": 2.5}\n{"step": 7}\n'),
        read_metrics,
        refuses=False,
    ),
    Reader("keys", written("keys", "sk-one\nsk-two\n"), read_keys),
    Reader(
        "trace",
        written("t.csv", "arrival_s,prompt_tokens,output_tokens\n0.5,10,2\n1.25,3,1\n"),
        read_trace,
    ),
    Reader(
        "Azure trace",
        written(
            "t.csv",
            "TIMESTAMP,ContextTokens,GeneratedTokens\n"
            "2023-11-16 18:17:03.9799600,374,44\n2023-11-16 18:17:04.0319600,396,109\n",
        ),
        read_trace,
    ),
    Reader(
        "lengths",
        written("l.csv", "num_prefill_tokens,num_decode_tokens\n10,2\n3,1\n"),
        lengths_from_csv,
    ),
)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to all values inside a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in pairs:
        yield (*at, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*at, key))


def odd(random: random.Random) -> Any:
    value = copy.deepcopy(random.choice(ODD_VALUES))
    if random.random() < 0.05:  # deep, or long
        for _ in range(random.choice((70, 200))):
            value = [value]
    return value


def other_values(content: bytes, random: random.Random) -> bytes:
    """JSON with some values exchanged, dropped, renamed or added."""
    value = copy.deepcopy(json.loads(content))
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        found = list(places(value))
        if not found:
            return json.dumps(odd(random)).encode()
        path = random.choice(found)
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        what = random.random()
        if what < 0.7:
            holder[path[-1]] = odd(random)
        elif what < 0.85:
            del holder[path[-1]]
        elif isinstance(holder, list):
            holder.extend(odd(random) for _ in range(random.choice((1, 300))))
        else:
            holder[random.choice((path[-1] + "x", "\ud800", "", "x" * 5000))] = odd(random)
    return json.dumps(value).encode()


def other_bytes(content: bytes, random: random.Random) -> bytes:
    """Some bytes flipped, cut off, repeated or put in."""
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 8))):
        at = random.randrange(len(changed) + 1)
        what = random.random()
        if what < 0.4 and at < len(changed):
            changed[at] ^= 1 << random.randrange(8)
        elif what < 0.5 and at < len(changed):
            changed[at] = random.choice((0, 0x7F, 0x80, 0xFF))
        elif what < 0.6:
            del changed[at:]
        elif what < 0.7:
            del changed[at : at + random.choice((1, 4, 8, 50))]
        elif what < 0.8:
            changed[at:at] = changed[at : at + random.choice((1, 8, 300))]
        elif what < 0.9:
            changed[at : at + 8] = random.choice((2**63, 2**40, 10**6, 0)).to_bytes(8, "little")
        else:
            changed[at:at] = random.randbytes(random.choice((1, 4, 100)))
    return bytes(changed)


def other_words(content: bytes, random: random.Random) -> bytes:
    """A number or word of a text exchanged for another."""
    words = list(re.finditer(rb"-?[\d.]+|\w+|[^\w\s]", content))
    if not words:
        return other_bytes(content, random)
    word = random.choice(words)
    put = random.choice(ODD_TEXTS).encode()
    return content[: word.start()] + put + content[word.end() :]


def of_header(content: bytes, random: random.Random) -> bytes:
    """A safetensors file with other values in its header, whose length is right again."""
    length = int.from_bytes(content[:8], "little")
    header = other_values(content[8 : 8 + length], random)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def damaged(reader: Reader, content: bytes, random: random.Random) -> bytes:
    ways = [other_bytes]
    if reader.name == "tensors":
        ways += [of_header] * 2
    elif reader.name not in ("GGUF", "token array"):
        ways += [other_words]
        try:
            json.loads(content)
            ways += [other_values] * 2
        except ValueError:
            pass
    return random.choice(ways)(content, random)


def peak_bytes() -> int:
    """The most memory this process has held since `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def forget_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def attack(reader: Reader, folder: Path, *, count: int, seed: int) -> dict[str, int]:
    """Reads `count` damaged files; returns how many were taken and how many refused."""
    path = reader.make(folder)
    content = path.read_bytes()
    reader.read(path)  # the valid one, which also compiles and imports what is needed
    outcomes = {"taken": 0, "refused": 0}
    before = forget_peak()
    for number in range(count):
        changed = damaged(reader, content, random.Random(f"{reader.name} {seed} {number}"))
        path.write_bytes(changed)
        where = f"{reader.name}, seed {seed}, number {number}"
        began = time.process_time()
        try:
            reader.read(path)
            outcomes["taken"] += 1
        except (UsageError, RunError, ScheduleError) as error:
            outcomes["refused"] += 1
            assert "\n" not in str(error) and len(str(error)) < 1500, f"{where}: {error}"
            str(error).encode("utf-8")
        except Exception as error:
            raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
        took_s = time.process_time() - began
        assert took_s < SECONDS, f"{where}: {took_s:.1f} s"
    assert peak_bytes() - before < MEMORY_BYTES, f"{reader.name}: {peak_bytes() - before} bytes"
    return outcomes


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_a_damaged_file_is_one_line(tmp_path, reader):
    outcomes = attack(reader, tmp_path, count=60, seed=0)
    assert outcomes["refused"] > 0 or not reader.refuses, outcomes


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_two_thousand_damaged_files_of_each_kind(tmp_path, reader):
    outcomes = attack(reader, tmp_path, count=2000, seed=1)
    assert outcomes["refused"] > 100 or not reader.refuses, outcomes


@pytest.mark.parametrize("layers", [40_000_000, 2**40])
def test_layers_that_no_file_holds_take_no_memory(tmp_path, layers):
    """They are counted against the tensors before names are made for them."""
    path = of_model("config.json")(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": layers}))
    before = forget_peak()
    with pytest.raises(UsageError, match="layers"):
        read_folder(path)
    assert peak_bytes() - before < 50e6
