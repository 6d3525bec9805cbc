"""A folder of checkpoints: where they are, which one is the newest, and how one becomes complete.

A checkpoint is written under a temporary name, fsynced, renamed, and only then named in `latest`.  So it is
complete or it is not there.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_tokenformer.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    read_manifest,
    read_small,
    write_manifest,
)
from megatron_tokenformer.durable import replace_durably, sync_folder
from megatron_tokenformer.errors import UserError

LATEST = "latest"
WRITING, REPLACED, DELETED = ".writing", ".replaced", ".deleted"
"""how the hidden folders end whose checkpoints are not complete yet, about to be replaced, or to go"""
_STEP = re.compile(r"step-([0-9]{8,18})")


def step_name(step: int) -> str:
    """The folder of the checkpoint of this step."""
    return f"step-{step:08d}"


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder that have a manifest, oldest first."""
    found = [
        (int(match[1]), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := _STEP.fullmatch(path.name)) and (path / MANIFEST).is_file()
    ]
    return [path for _, path in sorted(found)]


def _step(path: Path) -> int:
    """Of a folder that `step_name` named."""
    return int(path.name.removeprefix("step-"))


def find_checkpoint(path: str | Path) -> Path:
    """What `--load PATH` means: one checkpoint, or the newest of a folder of them, or of a run's.

    Raises:
        UserError: there is none.
    """
    return find_checkpoints(path)[0]


def find_checkpoints(path: str | Path) -> list[Path]:
    """What `--load PATH` means, and what to take if that one is damaged, and so on.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return [path]
    for folder in (path, path / "checkpoints"):
        latest, complete = read_latest(folder), complete_checkpoints(folder)
        if complete:
            return sorted(reversed(complete), key=lambda found: found != latest)
    raise UserError(f"no complete checkpoint at {path}: no {MANIFEST} there or in a step-* folder")


def first_good(
    checkpoints: Sequence[Path], check: Callable[[Path], Manifest] = read_manifest
) -> tuple[Path, Manifest]:
    """The first of some checkpoints that is in order, passing over bad ones with a warning.

    Args:
        check: raises UserError for a bad one; by default manifest and shard sizes are looked at.

    Raises:
        UserError: none is; says what is wrong with the first.
    """
    reasons = []
    for path in checkpoints:
        try:
            return path, check(path)
        except UserError as error:
            reasons.append(error)
            if len(checkpoints) > 1:
                print(f"warning: passing over {path}: {error}", flush=True)
    others = f" (and all {len(reasons) - 1} others there are bad)" if len(reasons) > 1 else ""
    raise UserError(f"{reasons[0]}{others}", exit_code=1)


def temporary_name(step: int) -> str:
    """The folder in which the checkpoint of this step is written until it is complete."""
    return f".{step_name(step)}{WRITING}"


def make_empty(folder: Path) -> None:
    """Make a folder, without what a dead save may have left in it; those above it are durable."""
    shutil.rmtree(folder, ignore_errors=True)
    missing = [parent for parent in folder.parents if not parent.exists()]
    folder.mkdir(parents=True)
    for parent in missing:
        sync_folder(parent.parent)


def publish(temporary: Path, manifest: Manifest) -> Path:
    """Make a checkpoint whose shards are durable in `temporary` complete, and name it in `latest`."""
    write_manifest(temporary, manifest)
    sync_folder(temporary)
    final = temporary.parent / step_name(manifest.step)
    if final.exists():  # a run that went back to an earlier step writes this one again
        replaced = final.with_name(f".{final.name}{REPLACED}")
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
        temporary.rename(final)
        _remove(replaced)
    else:
        temporary.rename(final)
    sync_folder(final.parent)
    replace_durably(final.parent / LATEST, final.name + "\n")
    return final


def retain(folder: Path, keep_last: int, keep_every: int, newest: Path) -> None:
    """Delete what is older than the newest checkpoints.

    Args:
        keep_every: those at multiples of so many steps stay; 0: none.
        newest: the checkpoint that was just written.  Later ones, which a run passed over because they are
            damaged, neither count nor go.
    """
    counted = [path for path in complete_checkpoints(folder) if _step(path) <= _step(newest)]
    for path in counted[:-keep_last]:
        if keep_every and _step(path) % keep_every == 0:
            continue
        try:
            # First another name: what is half deleted is not to be found.
            deleted = path.rename(path.with_name(f".{path.name}{DELETED}"))
            sync_folder(folder)
            _remove(deleted)
        except OSError as error:
            print(f"warning: cannot delete {path}: {error.strerror}", flush=True)


def clear_leftovers(folder: Path) -> None:
    """Remove what dead saves left in a folder that nobody writes in now.

    No complete checkpoint goes: one that was set aside, and whose successor did not come, gets its name back.
    """
    for path in sorted(folder.glob(".step-*")) if folder.is_dir() else ():
        final = path.with_name(path.stem.removeprefix("."))
        try:
            if path.suffix == REPLACED and (path / MANIFEST).is_file() and not final.exists():
                path.rename(final)
            elif path.suffix in (WRITING, REPLACED, DELETED):
                _remove(path)
        except OSError as error:
            print(f"warning: cannot clear away {path}: {error.strerror}", flush=True)


def _remove(path: Path) -> None:
    """Remove a folder; of one that was put elsewhere, the link to it alone."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def read_latest(folder: Path) -> Path | None:
    """What `latest` names, be it complete or not; nothing outside of the folder."""
    try:
        name = read_small(folder / LATEST, 64).decode("ascii").strip()
    except (OSError, ValueError):
        return None
    return folder / name if _STEP.fullmatch(name) else None
