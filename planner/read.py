"""The model that a command of the planner is asked about: a folder's, or a preset's."""

from pathlib import Path

from jaxsys.errors import UsageError
from jaxsys.model.config import DecoderConfig
from jaxsys.model.folder import read_whole_config
from jaxsys.model.shapes import lies_here, preset, telling_preset


def read_model(name: str) -> DecoderConfig:
    """The configuration of a Hugging Face folder, or where there is none that of a preset.

    Raises:
        UsageError: if the name is neither, or the folder's config.json cannot be used.
    """
    if not name.strip():
        raise UsageError("model is empty; name a preset such as Llama-3-8B, or a model's folder")
    path = Path(name)
    if not lies_here(name):
        return preset(name)
    with telling_preset(name):
        if path.is_dir():
            return read_whole_config(path)
        raise UsageError(
            f"model {name} is a file; name the folder that has it beside its config.json"
            if path.suffix != ".gguf"
            else f"model {name} is a GGUF file, which is served but not planned for; name a preset "
            "of its shape, or a folder with a config.json"
        )
