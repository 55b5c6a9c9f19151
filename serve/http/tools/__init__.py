"""How models call tools: a file a family, chosen by what the model's chat template says."""

from jaxsys.errors import UsageError, did_you_mean
from jaxsys.serve.http.tools.base import (
    CallPart,
    Marks,
    Reader,
    Said,
    Thinking,
    Tool,
    ToolFormat,
    Writing,
)
from jaxsys.serve.http.tools.deepseek import DeepSeek
from jaxsys.serve.http.tools.harmony import Harmony
from jaxsys.serve.http.tools.hermes import Hermes
from jaxsys.serve.http.tools.llama3 import Llama3
from jaxsys.serve.http.tools.mistral import Mistral
from jaxsys.serve.http.tools.plain import Plain, told

__all__ = [
    "FORMATS",
    "CallPart",
    "Marks",
    "Reader",
    "Said",
    "Thinking",
    "Tool",
    "ToolFormat",
    "Writing",
    "format_of",
    "told",
]

FORMATS: dict[str, ToolFormat] = {
    one.name: one for one in (Harmony(), DeepSeek(), Mistral(), Hermes(), Llama3(), Plain())
}
"""By name; the first that fits a template is its family's."""


def format_of(template: str | None, name: str = "auto") -> ToolFormat:
    """The format that a model speaks.

    Args:
        name: of one, whatever the template says.

    Raises:
        UsageError: if there is none of that name.
    """
    if name != "auto":
        if name not in FORMATS:
            near = did_you_mean(name, ("auto", *FORMATS))
            raise UsageError(
                f"tool-format={name!r} is unknown{near}; use auto, {', '.join(FORMATS)}"
            )
        return FORMATS[name]
    if template is None or "tools" not in template:
        return FORMATS["plain"]
    return next(one for one in FORMATS.values() if one.fits(template))
