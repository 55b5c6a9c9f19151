"""guidellm: a small load over chats."""

# pyright: reportMissingImports=false
import json
import os
import subprocess
from pathlib import Path

from examples import URL, example, run


@example
def load():
    command = ["guidellm", "run", "--backend", f"kind=openai_http,target={URL}"]
    command += ["--tokenizer", f"kind=hf_auto,model={os.environ['JAXSYS_MODEL_FOLDER']}"]
    command += ["--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=8"]
    command += ["--profile", "kind=concurrent,streams=2", "--constraint"]
    command += ["kind=max_requests,count=6", "--output", "kind=json,path=out.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-400:]
    (report,) = json.loads(Path("out.json").read_text())["benchmarks"]
    counts = report["metrics"]["request_totals"]
    assert counts["successful"] == 6 and not counts["errored"], counts


run()
