"""Chat templates: a list of messages to the one text a model was tuned on.

Templates are Jinja, as shipped inside models, so they are rendered as `transformers` renders them:
in an immutable sandbox, blocks trimmed, with `raise_exception`, `strftime_now`, `tojson`, loop
controls, and `{% generation %}` around what the assistant says.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
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
            messages=[_with_reasoning(message) for message in messages],
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **(special_tokens or {}),
        )
    except Exception as error:  # a template is a program of others: it may raise anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UsageError(f"the chat template refuses these messages: {reason}") from error


_REASONING = ("reasoning_content", "thinking", "reasoning")


def _with_reasoning(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message whose reasoning, called one way or another, templates find under their name."""
    found = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    if found is None:
        return message
    return {"thinking": found, **message, "reasoning_content": found}


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` to `{% endgeneration %}` renders as the text between them."""

    # jinja2 reads the class's, though it declares an instance's.
    tags: ClassVar[set[str]] = {"generation"}  # pyright: ignore[reportIncompatibleVariableOverride]

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    environment.filters["tojson"] = to_json
    return environment.from_string(template)
