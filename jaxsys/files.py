"""Files that are written whole or not at all, and whether they can be, asked beforehand."""

import os
import tempfile
from pathlib import Path

from jaxsys.errors import UsageError


def write_whole(path: Path, text: str) -> None:
    """Writes beside `path` first, then renames into place.

    Raises:
        OSError: if it cannot be written there.
    """
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def check_writable(folder: Path) -> None:
    """Raises UsageError if nothing can be written in a folder, which need not be there yet."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UsageError(f"nothing can be written in {folder}: {there}: {error.strerror}") from None
