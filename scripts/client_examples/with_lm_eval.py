"""lm-eval: a task of its own by likelihood, and one by generation, over completions and chats."""

# pyright: reportMissingImports=false
import json
import os
import subprocess
from pathlib import Path

from examples import MODEL, URL, example, run

place = Path("tasks").absolute()
place.mkdir()
rows = [
    {"question": "The capital of France is", "choices": ["Paris", "Rome"], "answer": 0},
    {"question": "One, two, three,", "choices": ["green", "four"], "answer": 1},
]
(place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
DATA = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {place}/rows.jsonl}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
(place / "likely.yaml").write_text(
    "task: likely\noutput_type: multiple_choice\n"
    + DATA
    + 'doc_to_choice: choices\ndoc_to_target: answer\ntarget_delimiter: " "\n'
    + "metric_list: [{metric: acc}]\n"
)
(place / "written.yaml").write_text(
    "task: written\noutput_type: generate_until\n"
    + DATA
    + 'doc_to_target: "{{choices[answer]}}"\n'
    + 'generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}\n'
    + "metric_list: [{metric: exact_match}]\n"
)
MODEL_FOLDER = os.environ.get("JAXSYS_MODEL_FOLDER", MODEL)


def evaluated(task, kind, path, **more):
    arguments = {"model": MODEL, "base_url": f"{URL}{path}", "num_concurrent": 2} | more
    given = ",".join(f"{name}={value}" for name, value in arguments.items())
    command = ["lm_eval", "run", "--model", kind, "--model_args", given, "--tasks", task]
    command += ["--include_path", str(place), "--output_path", "out", "--log_samples"]
    command += ["--apply_chat_template"] if "chat" in kind else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-400:]
    found = max(Path("out").rglob("results_*.json"), key=lambda one: one.stat().st_mtime)
    return json.loads(found.read_text())["results"][task]


@example
def loglikelihood():
    remote = {"tokenizer_backend": "remote", "tokenized_requests": True}
    result = evaluated("likely", "local-completions", "/v1/completions", **remote)
    assert 0.0 <= result["acc,none"] <= 1.0, result


@example
def generate_until():
    remote = {"tokenizer_backend": "remote", "tokenized_requests": False}
    evaluated("written", "local-completions", "/v1/completions", **remote)


@example
def generate_until_by_chat():
    evaluated("written", "local-chat-completions", "/v1/chat/completions")


run()
