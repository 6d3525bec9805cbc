"""A folder of checkpoints: where they are, which one is the newest, and how one becomes complete.

A checkpoint is written under a temporary name, fsynced, renamed, and only then named in `latest`.  So it is
complete or it is not there.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from megatron_tokenformer.checkpoint.manifest import MANIFEST, Manifest, read_manifest, write_manifest
from megatron_tokenformer.errors import UserError

LATEST = "latest"
_STEP = re.compile(r"step-(\d{8,})")


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


def find_checkpoint(path: str | Path) -> Path:
    """What `--load PATH` means: one checkpoint, or the newest of a folder of them, or of a run's.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    for folder in (path, path / "checkpoints"):
        latest = _read_latest(folder)
        if latest is not None:
            return latest
        complete = complete_checkpoints(folder)
        if complete:
            return complete[-1]
    raise UserError(f"no complete checkpoint at {path}: no {MANIFEST} there or in a step-* folder")


def newest_good(folder: Path) -> Path | None:
    """The newest checkpoint whose manifest and shard sizes are in order, passing over bad ones."""
    for path in reversed(complete_checkpoints(folder)):
        try:
            read_manifest(path)
            return path
        except UserError as error:
            print(f"warning: passing over {path}: {error}", flush=True)
    return None


def temporary_name(step: int) -> str:
    """The folder in which the checkpoint of this step is written until it is complete."""
    return f".{step_name(step)}.writing"


def make_empty(folder: Path) -> None:
    """Make a folder, without what a dead run may have left in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def publish(temporary: Path, manifest: Manifest) -> Path:
    """Make a checkpoint whose shards are durable in `temporary` complete, and name it in `latest`."""
    write_manifest(temporary, manifest)
    _sync_folder(temporary)
    final = temporary.parent / step_name(manifest.step)
    if final.exists():  # a run that went back to an earlier step writes this one again
        replaced = temporary.with_suffix(".replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
        temporary.rename(final)
        shutil.rmtree(replaced)
    else:
        temporary.rename(final)
    _sync_folder(final.parent)
    replace_durably(final.parent / LATEST, final.name + "\n")
    return final


def retain(folder: Path, keep_last: int, newest: Path) -> None:
    """Delete what is older than the newest checkpoints, and what dead saves left behind.

    Args:
        newest: the checkpoint that was just written.  Later ones, which a run passed over because they are
            damaged, neither count nor go.
    """
    counted = [path for path in complete_checkpoints(folder) if path.name <= newest.name]
    leftovers = [path for path in folder.glob(".step-*") if path.is_dir()]
    for path in [*counted[:-keep_last], *leftovers]:
        try:
            (path / MANIFEST).unlink(missing_ok=True)  # first: what is half deleted is not complete
            shutil.rmtree(path)
        except OSError as error:
            print(f"warning: cannot delete {path}: {error.strerror}", flush=True)


def replace_durably(path: Path, text: str) -> None:
    """Replace a small file so that it holds the old text or the new, whatever happens."""
    temporary = path.with_name(f".{path.name}.writing")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def _read_latest(folder: Path) -> Path | None:
    try:
        path = folder / (folder / LATEST).read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return path if (path / MANIFEST).is_file() else None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
