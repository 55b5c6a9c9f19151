"""Renders chat templates in a process that ends itself: run as a script, by `templates`.

What stands on standard input are frames, each a length of 4 bytes and a JSON object; each is
answered by one. A template is code that came with a model: an alarm that nothing handles ends the
process when a rendering takes too long, whatever it is doing, and a limit on memory makes it fail.

This script is run by its path and reads `chat.py` by its own: the packages around them would bring
JAX.
"""

import importlib.util
import json
import resource
import signal
import struct
import sys
from typing import Any

MEMORY_BYTES = 1 << 30
LENGTH = struct.Struct("!I")


def render(chat: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """The rendered text, or what is wrong."""
    try:
        text = chat.render_chat(
            asked["template"],
            asked["messages"],
            add_generation_prompt=asked["add_generation_prompt"],
            tools=asked["tools"],
            special_tokens=asked["variables"],
        )
    except ValueError as error:  # UsageError: it says what
        return {"error": str(error)}
    except MemoryError:
        return {"error": f"the chat template takes over {MEMORY_BYTES >> 20} MiB of memory"}
    except Exception as error:  # noqa: BLE001 - whatever a program may raise
        what = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        return {"error": f"the chat template fails with these messages: {what}"}
    if len(text) > asked["most"]:
        return {
            "error": f"the chat template makes {len(text)} characters of these messages; at "
            f"most {asked['most']} are taken"
        }
    return {"text": text}


def main() -> None:
    """Answers until the other side is gone."""
    root, chat_path = sys.argv[1:]
    sys.path.insert(0, root)
    spec = importlib.util.spec_from_file_location("chat_templates", chat_path)
    assert spec is not None and spec.loader is not None
    chat = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(chat)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    given, taken = sys.stdin.buffer, sys.stdout.buffer
    while header := given.read(LENGTH.size):
        asked = json.loads(given.read(LENGTH.unpack(header)[0]))
        signal.setitimer(signal.ITIMER_REAL, asked["limit_s"])
        answer = json.dumps(render(chat, asked)).encode()
        signal.setitimer(signal.ITIMER_REAL, 0)
        taken.write(LENGTH.pack(len(answer)) + answer)
        taken.flush()


if __name__ == "__main__":
    main()
