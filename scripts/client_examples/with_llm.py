"""llm: the command line tool, told of the server in its file of models."""

# pyright: reportMissingImports=false
import os
import subprocess
from pathlib import Path

from examples import BASE, MODEL, QUESTION, example, run

home = Path("llm-home").absolute()
home.mkdir()
(home / "extra-openai-models.yaml").write_text(
    f"- model_id: here\n  model_name: {MODEL}\n  api_base: {BASE}\n"
    f"  supports_schema: true\n  supports_tools: true\n"
)
ENVIRONMENT = os.environ | {"LLM_USER_PATH": str(home)}


def said(*arguments):
    done = subprocess.run(
        ["llm", *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-300:]
    return done.stdout


@example
def prompt():
    assert said("-m", "here", QUESTION, "-o", "max_tokens", "20").strip()


@example
def prompt_at_once():
    assert said("-m", "here", "--no-stream", QUESTION, "-o", "max_tokens", "20").strip()


@example
def schema():
    assert '"city"' in said("-m", "here", "--schema", "city, days int", QUESTION)


@example
def conversation():
    said("-m", "here", QUESTION, "-o", "max_tokens", "10")
    assert said("-c", "And of Italy?", "-o", "max_tokens", "10").strip()


run()
