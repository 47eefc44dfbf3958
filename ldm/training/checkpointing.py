"""The run folder: training states written whole or not at all, read with a fallback, and a lock.

A state is what CompVis's checkpoint is (`state_dict`, `optimizer_states`, `lr_schedulers`, `global_step`, `epoch`)
plus `run`, the plain data that resuming needs. It holds tensors and plain data only and loads with
weights_only=True. `last.ckpt` is the newest, `previous.ckpt` the one before.
"""

import logging
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoints import read_object, save_object
from ldm.errors import FormatError, MismatchError, NumericError, OutputError, UnsafeFileError
from ldm.training.resumption import find_flaws, is_count

logger = logging.getLogger(__name__)

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
NEXT = ".next.part"  # the newest state between being written and taking its name
FORMAT = 2  # of `run`; a reader refuses newer ones. 1 had neither `moments` nor `options`
NEEDED = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "run")
NEEDED_RUN = ("format", "seed", "data", "guard", "moments", "options")
NEW_IN_2 = ("moments", "options")


def save_state(folder: Path, state: dict[str, Any]) -> Path:
    """Write a training state as the newest generation and keep the one before.

    The older generation goes only after the newer was written, read back and its checksums compared.

    Raises:
        NumericError: a weight is not finite; nothing is written.
        OutputError: the disk refuses, or gives back other bytes than it took.
    """
    for key, tensor in state["state_dict"].items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NumericError(
                f"'{key}' is not finite at step {state['global_step']}; no checkpoint is written"
            )
    last, previous, fresh = folder / LAST, folder / PREVIOUS, folder / NEXT
    save_object(fresh, state)
    damage = find_damage(fresh)
    if damage:
        raise OutputError(f"'{fresh}' did not come back as it was written: {damage}; check the disk")
    try:
        if last.exists() and not find_damage(last):
            os.replace(last, previous)
        os.replace(fresh, last)
    except OSError as error:
        raise OutputError(f"cannot write '{last}': {error.strerror or error}; check the folder") from error
    return last


def find_damage(path: Path) -> str | None:
    """Say what is wrong with a state file's bytes (every checksum is compared), or None."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
        return str(error) or type(error).__name__
    return None if bad is None else f"checksum of '{bad}' is wrong"


def read_state(path: Path) -> dict[str, Any]:
    """Read one training state.

    Raises:
        FormatError: the file is damaged.
        MismatchError: it is sound but no complete training state, or from a newer version.
    """
    damage = find_damage(path)
    if damage:
        raise FormatError(f"'{path}' is damaged: {damage}; resume from another checkpoint")
    try:
        state = read_object(path)
    except UnsafeFileError as error:
        raise FormatError(
            f"'{path}' is no training state: {error}; resume from another checkpoint"
        ) from error
    if not isinstance(state, dict):
        raise MismatchError(
            f"'{path}' holds no training state but a {type(state).__name__}; start a new run from it"
        )
    run = state.get("run", {})
    version = run.get("format") if isinstance(run, dict) else None
    if is_count(version) and version > FORMAT:
        raise MismatchError(f"'{path}' was written by a newer ldm (format {version}, known: {FORMAT})")
    missing = [key for key in NEEDED if key not in state]
    if isinstance(run, dict):
        old = NEW_IN_2 if version == 1 else ()
        missing += [f"run.{key}" for key in NEEDED_RUN if "run" in state and key not in (*run, *old)]
    flaws = [f"lacks {', '.join(missing)}"] if missing else find_flaws(state)
    if flaws:
        raise MismatchError(
            f"'{path}' {flaws[0]:.150}, so the run cannot go on exactly; start a new run with "
            "model.params.ckpt_path set to it"
        )
    return state


def read_newest(folder: Path) -> tuple[dict[str, Any], Path] | None:
    """Read a run's newest sound training state; None where no state was ever written.

    A damaged last.ckpt falls back to previous.ckpt with a warning.

    Raises:
        FormatError: there are states but none is sound.
    """
    damaged = None
    for name in (LAST, PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        try:
            state = read_state(path)
        except FormatError as error:
            damaged = error
            logger.warning("%s; falling back to an older checkpoint", error)
            continue
        return state, path
    if damaged is not None:
        raise FormatError(f"no sound checkpoint is left in '{folder}': {damaged}")
    return None


class RunLock:
    """Keeps a second trainer out of a run folder; the lock dies with its process, however that ends."""

    def __init__(self, folder: Path):
        self.path = folder / ".lock"
        self._file = None

    def __enter__(self) -> "RunLock":
        """Take the lock.

        Raises:
            OutputError: another process has it, or the folder cannot be written.
        """
        try:
            import fcntl
        except ImportError:  # no such locks on this system
            return self
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+")  # noqa: SIM115 - held open until __exit__
        except OSError as error:
            raise OutputError(
                f"run folder '{self.path.parent}' cannot be written: {error.strerror}"
            ) from error
        try:
            # A record lock belongs to this process alone: loader workers do not inherit it and cannot outlive it.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise OutputError(
                f"run folder '{self.path.parent}' is in use by another trainer; wait for it or choose another --logdir"
            ) from error
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
