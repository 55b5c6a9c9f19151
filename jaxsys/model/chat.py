"""Chat templates: a list of messages to the one text a model was tuned on.

Templates are Jinja, as shipped inside models, so they are rendered as `transformers` renders them:
in an immutable sandbox, blocks trimmed, with `raise_exception`, `strftime_now` and `tojson`.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from jaxsys.errors import UsageError

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The ChatML form, for models that ship no template of their own but know its two marks."""


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    special_tokens: Mapping[str, str] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """Renders `messages`, each {"role": ..., "content": ...}, with a model's template.

    Args:
        template: the Jinja source.
        messages: the conversation, oldest first.
        add_generation_prompt: end with the head of the assistant's next turn.
        special_tokens: names templates use, such as {"bos_token": "<s>"}.
        tools: JSON schemas of callable functions, for templates that know them.

    Raises:
        UsageError: if the template is broken or refuses these messages.
    """
    try:
        return _compile(template).render(
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **(special_tokens or {}),
        )
    except Exception as error:  # a template is a program of others: it may raise anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UsageError(f"the chat template refuses these messages: {reason}") from error


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    environment.filters["tojson"] = to_json
    return environment.from_string(template)
