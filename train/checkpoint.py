"""Checkpoints that any schedule on any number of devices can go on from, and that cannot be half.

Arrays are stored in layer order, through Orbax, in the background. A step's folder appears by one
rename when all of it is written, so a kill at any moment leaves the steps before it whole. With
each leaf goes a 32-bit sum of its bits weighted by position, computed on the devices before and
after: what is read back is what was saved, or it is not used. Beside the arrays lies a JSON record:
step, data position, settings, model shape, and a hash of all these.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jaxsys.errors import RunError, UsageError
from jaxsys.fields import read_fields
from jaxsys.files import write_whole
from jaxsys.layered import PyTree
from jaxsys.train.state import path_names

FORMAT_VERSION = 2
_UNSEALED = 1
"""The format before, whose records carry no hash."""
FOLDER = "checkpoints"
"""Of a run's folder, what holds its checkpoints."""
ROOM = 1.05
"""What a save is given on disk, of the state's bytes; `ROOM_BYTES` on top is for its records."""
ROOM_BYTES = 1 << 16
_BROKEN = "broken-"
_SIZES = ".sizes.json"
"""In a finished step's folder: the size of every file, so that one cut short is named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a checkpoint says of itself, beside its arrays."""

    step: int
    """Batches taken."""
    position: int
    """The next sample's global index."""
    settings: Mapping[str, Any]
    """What the trajectory depends on: optimizer, batch, data, seed."""
    shapes: Mapping[str, str]
    """Parameter name -> dtype and shape, layer order."""
    checksums: Mapping[str, int]
    """Leaf name -> `checksum`."""
    made_with: Mapping[str, Any]
    """Schedule, devices and versions; for people, nothing depends on it."""
    format: int = FORMAT_VERSION

    def sealed(self) -> dict[str, Any]:
        """The record as JSON values, with a hash of them under "seal"."""
        values = json.loads(json.dumps(asdict(self)))
        return {**values, "seal": _seal(values)}

    @classmethod
    def unsealed(cls, values: Mapping[str, Any], *, step: int) -> "Record":
        """The record that `sealed` made, of a step.

        Raises:
            RunError: if it is not the one that was written, or of another step.
            UsageError: if it is whole and of a version that this one does not read.
        """
        fields = dict(values)
        seal = fields.pop("seal", None)
        version = fields.get("format")
        if seal != _seal(fields) if seal is not None else version != _UNSEALED:
            raise RunError("its record is damaged: it differs from the hash that was saved with it")
        if version not in (_UNSEALED, FORMAT_VERSION):
            raise UsageError(
                f"step {step} has checkpoint format {version}; this version reads {FORMAT_VERSION}"
            )
        record = cls(**fields)
        if record.step != step:
            raise RunError(f"its record is of step {record.step!r}")
        return record


def _seal(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def step_folders(folder: Path) -> list[Path]:
    """The finished steps of a folder of checkpoints; whatever else lies there is left alone."""
    return [path for path in folder.glob("[0-9]*") if path.name.isdecimal() and path.is_dir()]


def check_unused(folder: Path) -> None:
    """Raises UsageError if a run's folder holds checkpoints of a run already."""
    steps = [int(path.name) for path in step_folders(folder / FOLDER)]
    if steps:
        raise UsageError(
            f"{folder} holds a run at step {max(steps)}; resume it (resume=True) or choose "
            "another folder"
        )


def check_names(tree: PyTree) -> None:
    """Raises UsageError if two arrays of a state would lie in one place of a checkpoint.

    Orbax joins the names on the way to a leaf by dots, and writes what meets there over each other;
    the checksums' names are joined by slashes.
    """
    there: dict[str, str] = {}
    for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]:
        names = path_names(path)
        name = " / ".join(names)
        for place in {".".join(names), "/".join(names)}:
            if place in there:
                raise UsageError(
                    f"the arrays {there[place]} and {name} would both be {place!r} in a "
                    "checkpoint, where names are joined by dots or slashes; rename one of them"
                )
            there[place] = name


class CheckpointStore:
    """The checkpoints of one run, in one folder; every process of the run opens it.

    Args:
        folder: made if missing.
        keep: how many of the latest checkpoints stay.
        notice: told, in one line, what the user should know.
    """

    def __init__(
        self, folder: str | Path, *, keep: int = 3, notice: Callable[[str], None] = print
    ) -> None:
        if keep < 1:
            raise UsageError(f"keep={keep} checkpoints must be at least 1")
        # Orbax narrates every save and each part that fails; what matters is said here, once.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        logging.getLogger("asyncio").addFilter(_not_of_orbax)
        self.folder = Path(folder).absolute()
        self._notice = notice
        self._unsettled = False
        try:
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep,
                    cleanup_tmp_directories=True,
                    enable_async_checkpointing=True,
                    lightweight_initialize=True,
                ),
                item_names=("state", "run"),
            )
        except OSError as error:
            raise UsageError(f"{self.folder} cannot hold checkpoints: {error}") from None

    def settle(self) -> None:
        """Writes down the file sizes of a save that has just finished; cheap, call it often."""
        if jax.process_index() or not self._unsettled or self._manager.is_saving_in_progress():
            return
        self._unsettled = False
        for step in step_folders(self.folder):
            if not (step / _SIZES).exists():
                with contextlib.suppress(OSError):  # a full disk: the step is good without them
                    write_whole(step / _SIZES, json.dumps(_sizes(step)))

    def check_sizes(self, step: int) -> None:
        """Raises RunError if a file of a step is missing or not as long as it was.

        A step whose sizes a kill left unwritten passes: its arrays are checked when they are read.
        """
        folder = self.folder / str(step)
        try:
            wanted = read_fields(folder / _SIZES)
        except UsageError:
            return
        found = _sizes(folder)
        for name, size in wanted.value.items():
            if found.get(name) != size:
                have = f"has {found[name]} bytes" if name in found else "is missing"
                raise RunError(f"step {step}: {name} {have}, {size} bytes were written")

    def steps(self) -> list[int]:
        """The steps that are there, ascending."""
        return sorted(self._manager.all_steps(read=True))

    def save(self, tree: PyTree, record: Record) -> None:
        """Starts a save; the arrays may be donated once this returns.

        Raises:
            RunError: if the save before it failed.
            UsageError: if two arrays would lie in one place.
        """
        if self._unsettled:
            self.wait()
        check_names(tree)
        self._check_room(tree, record.step)
        self._unsettled = True
        self._guard(
            record.step,
            lambda: self._manager.save(
                record.step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(tree),
                    run=ocp.args.JsonSave(record.sealed()),
                ),
                force=True,
            ),
        )

    def wait(self) -> None:
        """Returns when the last save is on disk.

        Raises:
            RunError: if it failed; names the last good step.
        """
        self._guard(None, self._manager.wait_until_finished)
        self.settle()

    def close(self) -> None:
        """Waits for the last save and lets go of the folder."""
        self.wait()
        self._manager.close()

    def release(self) -> None:
        """Lets go of the folder, whatever became of the last save; for clean-up after a fault."""
        try:
            self._manager.close()
        except (OSError, ValueError, RuntimeError) as error:
            self._notice(f"closing {self.folder}: {_first_line(error)}")

    def record(self, step: int) -> Record:
        """The record of a step.

        Raises:
            RunError: if it cannot be read.
        """
        try:
            raw = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))
            return Record.unsealed(raw["run"], step=step)
        except UsageError:
            raise
        except RunError as error:
            raise RunError(f"step {step}: {error}") from None
        except Exception as error:  # Orbax raises as many kinds as files can be broken in ways
            raise RunError(f"step {step}: {_first_line(error)}") from error

    def arrays(self, step: int, target: PyTree, checksums: Mapping[str, int]) -> PyTree:
        """The arrays of a step, each where `target`'s ShapeDtypeStruct leaf says.

        Raises:
            RunError: if they cannot be read, or are not what was saved.
        """
        try:
            raw = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))
            )
            tree = raw["state"]
        except Exception as error:
            raise RunError(f"step {step}: {_first_line(error)}") from error
        found = checksums_of(tree)
        wrong = [name for name, value in checksums.items() if found.get(name) != value]
        if wrong or len(found) != len(checksums):
            first = wrong[0] if wrong else "their number"
            raise RunError(f"step {step}: {len(wrong)} arrays differ from what was saved ({first})")
        return tree

    def set_aside(self, step: int) -> Path:
        """Renames an unreadable step, so that the run can write that step anew."""
        path = self.folder / str(step)
        aside = self.folder / f"{_BROKEN}{step}"
        if jax.process_index() == 0 and path.exists():
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        self._manager.reload()
        return aside

    def _check_room(self, tree: PyTree, step: int) -> None:
        """Raises RunError where a save may not fit the disk, before a part of it is written."""
        state = sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / jax.process_count()
        needed, free = ROOM * state + ROOM_BYTES, shutil.disk_usage(self.folder).free
        if free < needed:

            def refuse() -> None:
                raise OSError(
                    f"no space left on device: {free / 1e6:.1f} MB are free of "
                    f"{needed / 1e6:.1f} MB that it may take"
                )

            self._guard(step, refuse)

    def _guard(self, step: int | None, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            good = [s for s in self.steps() if step is None or s != step]
            left = f"the last good one is step {good[-1]}" if good else "there is none before it"
            raise RunError(
                f"a checkpoint could not be written to {self.folder}: {_first_line(error)}; {left}"
            ) from error


def _not_of_orbax(record: logging.LogRecord) -> bool:
    """Leaves out each of the parts of a save whose failure has been raised already."""
    return not (
        "never retrieved" in record.getMessage() and "orbax" in f"{record.msg} {record.exc_info}"
    )


def _sizes(step: Path) -> dict[str, int]:
    files = [path for path in step.rglob("*") if path.is_file() and _SIZES not in path.name]
    return {str(path.relative_to(step)): path.stat().st_size for path in files}


def checksums_of(tree: PyTree) -> dict[str, int]:
    """Leaf name -> sum of its 32-bit words times odd numbers that depend on position, mod 2^32."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    sums = jax.device_get(_checksums([leaf for _, leaf in flat]))
    names = ("/".join(path_names(path)) for path, _ in flat)
    return {name: int(value) for name, value in zip(names, sums, strict=True)}


@jax.jit
def _checksums(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_checksum(leaf) for leaf in leaves]


def _checksum(leaf: jax.Array) -> jax.Array:
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    width = leaf.dtype.itemsize * 8
    if width == 64:
        bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
    else:
        bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{width}")).astype(jnp.uint32)
    # Integer sums do not depend on their order, so neither does this on the sharding.
    for axis in range(bits.ndim):
        place = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        bits = bits * (place * jnp.uint32(2654435761) * 2 + 1)
    return jnp.sum(bits, dtype=jnp.uint32)


def shapes_of(parameters: PyTree) -> dict[str, str]:
    """Parameter name -> dtype and shape, of arrays or shapes."""
    flat, _ = jax.tree_util.tree_flatten_with_path(parameters)
    return {
        "/".join(path_names(path)): f"{leaf.dtype.name}{list(leaf.shape)}" for path, leaf in flat
    }


def check_same_model(record: Record, shapes: Mapping[str, str], where: Path) -> None:
    """Raises UsageError, naming the first difference, unless the checkpoint fits the model."""
    for name in [*shapes, *record.shapes]:
        have, want = record.shapes.get(name, "absent"), shapes.get(name, "absent")
        if have != want:
            raise UsageError(
                f"{where} step {record.step} is of another model: {name} is {have} there and "
                f"{want} here; give the model it was made with, or another folder"
            )


def changed_settings(record: Record, settings: Mapping[str, Any]) -> list[str]:
    """One line for each setting that differs: "name: there -> here"."""
    return [
        f"{name}: {record.settings.get(name)} -> {settings.get(name)}"
        for name in sorted({*record.settings, *settings})
        if record.settings.get(name) != settings.get(name)
    ]


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    full = os.strerror(errno.ENOSPC)
    if isinstance(error, OSError) and text:
        return text[0]
    if full in str(error):  # TensorStore's own report of it is four paths long
        return full
    return f"{type(error).__name__}: {text[0][:300] if text else ''}".rstrip(": ")
