"""aiperf: a small load over streamed chats."""

# pyright: reportMissingImports=false
import json
import os
import subprocess
from pathlib import Path

from examples import MODEL, URL, example, run


@example
def load():
    command = ["aiperf", "profile", "--model", MODEL, "--url", URL, "--endpoint-type", "chat"]
    command += ["--streaming", "--tokenizer", os.environ["JAXSYS_MODEL_FOLDER"]]
    command += ["--concurrency", "2", "--request-count", "6", "--isl", "32", "--osl", "8"]
    command += ["--artifact-dir", "out", "--ui", "none"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-400:]
    found = next(Path("out").rglob("*.json"))
    report = json.loads(found.read_text())
    assert report["request_count"]["avg"] == 6, report.get("request_count")


run()
