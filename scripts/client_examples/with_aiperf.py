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
    # Offline, aiperf 0.13.0 looks for a folder among downloads; "0" is offline to it too.
    offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    own = {name: value for name, value in os.environ.items() if name not in offline}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=800, check=False, env=own
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-400:]
    found = next(Path("out").rglob("profile_export_aiperf.json"))
    report = json.loads(found.read_text())
    assert report["request_count"]["avg"] == 6, report.get("request_count")


run()
