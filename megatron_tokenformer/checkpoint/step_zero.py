"""A checkpoint at step 0 that one process makes, not a run: rights, room, complete or not there at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megatron_tokenformer.checkpoint import store
from megatron_tokenformer.checkpoint.manifest import Manifest
from megatron_tokenformer.durable import unwritable
from megatron_tokenformer.errors import UserError

SPARE_BYTES = 16 * 1024 * 1024
"""room that is asked for beyond the numbers themselves: headers, the manifest, folders"""


def check_writable(folder: Path, doing: str) -> None:
    """Refuse a folder in which no file can be made; it need not be there yet.

    Args:
        doing: what is to be done, as in `cannot DOING`.

    Raises:
        UserError: says where, and why.
    """
    why = unwritable(nearest_folder(folder))
    if why is not None:
        raise UserError(f"cannot {doing}: {why}; give another --save", exit_code=1)


def check_space(folder: Path, doing: str, size: int) -> None:
    """Refuse what the disk has no room for.

    Args:
        doing: as for `check_writable`.
        size: bytes that the new checkpoint takes.

    Raises:
        UserError: with what is needed and what is free.
    """
    needed, free = size + SPARE_BYTES, shutil.disk_usage(nearest_folder(folder)).free
    if needed > free:
        raise UserError(
            f"cannot {doing}: it takes {in_bytes(needed)}, and there {in_bytes(free)} are free; make room or "
            f"give another --save",
            exit_code=1,
        )


def write_whole(
    folder: Path, doing: str, size: int, write: Callable[[Path], Manifest]
) -> tuple[Path, Manifest]:
    """Make the new checkpoint in a folder of checkpoints, complete or not at all.

    Args:
        doing: as for `check_writable`.
        size: bytes that it takes.
        write: writes the shards into the folder that it is given, and returns the manifest.

    Raises:
        UserError: there is no room, `write` finds its source damaged, or the folder cannot be written;
            nothing new is then there.
    """
    temporary = folder / store.temporary_name(0)
    try:
        store.clear_leftovers(folder)
        check_space(folder, doing, size)
        store.make_empty(temporary)
        manifest = write(temporary)
        return store.publish(temporary, manifest), manifest
    except OSError as error:
        raise UserError(f"cannot {doing}: {error.strerror}", exit_code=1) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def history_entry(kind: str, source: str, **told: Any) -> dict[str, Any]:
    """What the new checkpoint's history says of how it was made, now.

    Args:
        kind: `growth`, `net2net`, `shrink` or `import`.
        source: where the weights came from.
        told: what else there is to tell.
    """
    time = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"kind": kind, "time": time, "from": source, **told}


def in_bytes(count: int) -> str:
    """A size for people: `1.48 GB`."""
    unit, size = next(
        ((unit, size) for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)) if count >= size),
        ("bytes", 1),
    )
    return f"{count / size:,.2f} {unit}" if size > 1 else f"{count} {unit}"


def nearest_folder(folder: Path) -> Path:
    """The folder, or the one in which it will be made."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())
