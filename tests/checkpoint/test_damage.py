"""Checkpoints that are damaged, or made to deceive: refused with file and reason, and the next one taken."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import xxhash

from megatron_tokenformer.checkpoint.manifest import (
    MANIFEST,
    MANIFEST_BYTES,
    Interval,
    Manifest,
    read_manifest,
    write_manifest,
)
from megatron_tokenformer.checkpoint.shards import IntervalReader, verify_checkpoint
from megatron_tokenformer.checkpoint.store import LATEST, complete_checkpoints, find_checkpoint, first_good
from megatron_tokenformer.checkpoint.token_norms import ShardReader, TokenNorms
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.parallel.layout import Layout
from tests.checkpoint.saves import TENSORS, WIDTH, manifest, open_saver, state, stored_value
from tests.ranks import run_ranks

SHARD = "rank-00001.safetensors"
FIRST = TENSORS[0]
Damage = Callable[[Path], object]


def save_twice(layout: Layout, folder: Path) -> None:
    with open_saver(layout, folder, print) as saver:
        for step in (1, 2):
            saver.start(manifest(layout, step), state(layout, step))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints by two ranks."""
    folder = tmp_path_factory.mktemp("pristine")
    run_ranks(2, save_twice, folder)
    return folder


@pytest.fixture
def newest(pristine: Path, tmp_path: Path) -> Path:
    """The newer of two, to be damaged."""
    shutil.copytree(pristine, tmp_path / "checkpoints")
    return find_checkpoint(tmp_path / "checkpoints")


def edited(edit: Callable[[dict[str, Any]], object]) -> Damage:
    """The manifest with a change."""

    def damage(checkpoint: Path) -> None:
        path = checkpoint / MANIFEST
        stored = json.loads(path.read_text())
        edit(stored)
        path.write_text(json.dumps(stored))

    return damage


def changed(key: str, value: Any) -> Damage:
    return edited(lambda stored: stored.update({key: value}))


def shard(key: str, value: Any) -> Damage:
    return edited(lambda stored: stored["shards"][1].update({key: value}))


def interval(start: Any, stop: Any, name: Any = FIRST) -> Damage:
    """Other bounds for the second rank's part of the first tensor."""
    return edited(lambda stored: stored["shards"][1]["intervals"].__setitem__(0, [name, start, stop]))


def text(content: str | bytes) -> Damage:
    raw = content.encode() if isinstance(content, str) else content
    return lambda checkpoint: (checkpoint / MANIFEST).write_bytes(raw)


def in_place_of_manifest(old: str, new: str) -> Damage:
    def damage(checkpoint: Path) -> None:
        path = checkpoint / MANIFEST
        before = path.read_text()
        assert old in before
        path.write_text(before.replace(old, new, 1))

    return damage


def with_third_shard(make: Callable[[Path], object]) -> Damage:
    """One more shard, which holds nothing."""

    def damage(checkpoint: Path) -> None:
        path = checkpoint / "rank-00002.safetensors"
        make(path)
        entry = {"file": path.name, "size": path.stat().st_size, "hash": "", "intervals": []}
        edited(lambda stored: stored["shards"].append(entry))(checkpoint)

    return damage


def pipe_for_manifest(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink()
    os.mkfifo(checkpoint / MANIFEST)


def sparse_manifest(checkpoint: Path) -> None:
    os.truncate(checkpoint / MANIFEST, MANIFEST_BYTES + 1)


STRUCTURE: dict[str, tuple[Damage, str]] = {
    "cut off": (text('{"version": 1, '), "Expecting property name"),
    "empty": (text(""), "Expecting value"),
    "a list": (text("[]"), "is damaged"),
    "not UTF-8": (text(b'{"version": 1, "config": "\xff\xfe\xff"}'), "codec can't decode"),
    "nested deeply": (text("[" * 200_000), "nested too deeply"),
    "an endless number": (text('{"version": ' + "9" * 5000 + "}"), "digits"),
    "larger than any": (sparse_manifest, f"more than {MANIFEST_BYTES}"),
    "a pipe": (pipe_for_manifest, "is not a file"),
    "another version": (changed("version", 2), "format version 2; this program reads 1"),
    "a version that commands terminals": (changed("version", "\x1b[2J"), r"version \\x1b\[2J; this"),
    "a history of other tokens": (
        changed("history", [{}, {"tokens_before": 3}]),
        r"history\.1\.tokens_before: Input should be",
    ),
    "a history of words": (
        changed("history", [{"tokens_before": {"qkv": "16", "output": 16, "ffn": 64}}]),
        r"history\.0\.tokens_before\.qkv: Input should be a valid integer",
    ),
    "a history below 1": (
        changed("history", [{"tokens_before": {"qkv": -16, "output": 16, "ffn": 64}}]),
        r"history\.0\.tokens_before\.qkv: Input should be greater",
    ),
    "a history without a role": (
        changed("history", [{"tokens_before": {"qkv": 16}}]),
        r"history\.0\.tokens_before\.output: Field required",
    ),
    "a history of another kind": (changed("history", [{"kind": 5}]), r"history\.0\.kind: Input should be"),
    "NaN": (in_place_of_manifest('"flops": 0.0', '"flops": NaN'), "NaN is not a finite number"),
    "infinity": (in_place_of_manifest('"flops": 0.0', '"flops": 1e999'), "1e999 is not a finite number"),
    "a negative total": (changed("totals", {"tokens": -1, "flops": 0}), "totals are"),
    "a negative step": (changed("step", -1), "step: Input should be greater than or equal to 0"),
    "a huge position": (changed("position", 10**30), "position: "),
    "a section that is none": (changed("config", {"model": 5}), "a section of its config is not a mapping"),
    "no taus": (changed("taus", {}), "taus lack ffn"),
    "a tau that commands terminals": (
        edited(lambda stored: stored["taus"].update({"\x1b[2J": 5})),
        r"taus\.\\x1b\[2J: Input",
    ),
    "half a state": (changed("states", ["weight", "exp_avg"]), "states are"),
    "a shape below 1": (changed("shapes", {FIRST: [-2, -WIDTH]}), "greater than or equal to 1"),
    "a shape too large": (
        edited(lambda stored: stored["shapes"][FIRST].__setitem__(0, 3)),
        rf"of shape \[3, {WIDTH}\] has {2 * WIDTH} stored elements",
    ),
    "a tensor that commands terminals": (
        edited(lambda stored: stored["shapes"].update({"\x1b[2J": [1]})),
        "other characters",
    ),
    "shards that are none": (changed("shards", [1]), "is damaged"),
    "a shard above": (shard("file", "../../x.safetensors"), "not a plain file name"),
    "a shard elsewhere": (shard("file", "/etc/x.safetensors"), "not a plain file name"),
    "a shard in a folder": (shard("file", "a/x.safetensors"), "not a plain file name"),
    "a shard of the manifest's name": (shard("file", MANIFEST), "not a plain file name"),
    "a shard with a NUL": (shard("file", "a\0.safetensors"), "not a plain file name"),
    "a shard with a surrogate": (shard("file", "\ud800.safetensors"), "not a plain file name"),
    "a shard of a long name": (shard("file", "a" * 300 + ".safetensors"), "not a plain file name"),
    "two shards of one name": (shard("file", "rank-00000.safetensors"), "two shards are called"),
    "a shard of another size": (shard("size", 5), "cannot hold"),
    "a shard's size in words": (shard("size", "many"), "is damaged"),
    "a gap": (interval(WIDTH + 1, 2 * WIDTH), f"gap in {FIRST} at element {WIDTH} .{SHARD}"),
    "an overlap": (interval(WIDTH - 1, 2 * WIDTH), f"overlap in {FIRST} at element {WIDTH - 1} .{SHARD}"),
    "a part twice": (
        edited(lambda stored: stored["shards"][1]["intervals"].append(stored["shards"][1]["intervals"][0])),
        "overlap in",
    ),
    "a negative interval": (interval(-5, 2 * WIDTH), "overlap in"),
    "an interval backwards": (interval(2 * WIDTH, WIDTH), "gap in"),
    "half an element": (interval(WIDTH + 0.0, 2 * WIDTH), "valid integer"),
    "an interval in words": (interval(str(WIDTH), 2 * WIDTH), "valid integer"),
    "a true interval": (interval(True, 2 * WIDTH), "valid integer"),
    "a huge interval": (interval(WIDTH, 10**40), f"has {10**40} stored elements"),
    "an interval of no name": (interval(WIDTH, 2 * WIDTH, None), "valid string"),
    "an unknown tensor": (interval(WIDTH, 2 * WIDTH, "else"), "unknown tensor 'else'"),
    "a folder for a shard": (with_third_shard(Path.mkdir), "rank-00002.safetensors is not a file"),
    "a device for a shard": (
        with_third_shard(lambda path: path.symlink_to("/dev/zero")),
        "rank-00002.safetensors is not a file",
    ),
    "a missing shard": (lambda checkpoint: (checkpoint / SHARD).unlink(), "No such file"),
    "a link to nothing": (
        lambda checkpoint: ((checkpoint / SHARD).unlink(), (checkpoint / SHARD).symlink_to("nowhere")),
        "No such file",
    ),
    "a truncated shard": (
        lambda checkpoint: os.truncate(checkpoint / SHARD, 5000),
        "has 5000 bytes, its manifest says",
    ),
}


@pytest.mark.parametrize("kind", STRUCTURE)
def test_damage_is_refused_with_file_and_reason_and_the_one_before_is_taken(
    newest: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, words = STRUCTURE[kind]
    assert stored_value(newest) == 2.0
    damage(newest)
    with pytest.raises(UserError, match=words) as refused:
        read_manifest(newest)
    assert str(newest) in str(refused.value) and refused.value.exit_code == 1
    candidates = complete_checkpoints(newest.parent)[::-1]
    taken, _ = first_good(candidates)
    assert stored_value(taken) == 1.0
    if newest in candidates:  # a pipe is not taken for a manifest at all
        assert f"warning: passing over {newest}: {refused.value}\n" in capsys.readouterr().out


def test_when_all_are_bad_it_says_so_of_the_newest(newest: Path) -> None:
    for path in complete_checkpoints(newest.parent):
        (path / SHARD).unlink()
    with pytest.raises(
        UserError, match=rf"{newest}/{SHARD}: No such file .* \(and all 1 others there are bad"
    ):
        first_good(complete_checkpoints(newest.parent)[::-1])


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """The shard with another header of the same length, so that its size is right."""

    def damage(checkpoint: Path) -> None:
        path = checkpoint / SHARD
        size = path.stat().st_size
        header, data = header_of(path)
        change(header)
        told = json.dumps(header, separators=(",", ":")).encode().ljust(size - 8 - len(data))
        path.write_bytes(struct.pack("<Q", len(told)) + told + data)
        assert path.stat().st_size == size

    return damage


def with_length(length: int) -> Damage:
    def damage(checkpoint: Path) -> None:
        with open(checkpoint / SHARD, "r+b") as file:
            file.write(struct.pack("<Q", length))

    return damage


KEY = Interval(FIRST, WIDTH, 2 * WIDTH).key("weight")


def flip_last_bit(checkpoint: Path) -> None:
    raw = bytearray((checkpoint / SHARD).read_bytes())
    raw[-1] ^= 1
    (checkpoint / SHARD).write_bytes(raw)


HEADERS: dict[str, Damage] = {
    "another length of the header": with_length(7),
    "a header longer than the file": with_length(2**63),
    "another shape": with_header(lambda header: header[KEY].update(shape=[WIDTH // 2])),
    "another type": with_header(lambda header: header[KEY].update(dtype="I32")),
    "offsets beyond the file": with_header(lambda header: header[KEY].update(data_offsets=[0, 2**60])),
    "negative offsets": with_header(lambda header: header[KEY].update(data_offsets=[-4, 4 * WIDTH])),
    "another name": with_header(lambda header: header.update({"x": header.pop(KEY)})),
    "zeros": lambda checkpoint: (checkpoint / SHARD).write_bytes(bytes((checkpoint / SHARD).stat().st_size)),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_shard_whose_header_lies_is_refused_when_it_is_read_and_by_its_hash(
    newest: Path, kind: str
) -> None:
    HEADERS[kind](newest)
    reader = IntervalReader(newest, read_manifest(newest))
    with pytest.raises(UserError, match=rf"checkpoint shard {newest}/{SHARD}, {KEY}: "):
        list(reader.read(Interval(FIRST, WIDTH, 2 * WIDTH), "weight"))
    with pytest.raises(UserError, match=rf"{SHARD} is damaged: its hash"):
        verify_checkpoint(newest)


def with_text(content: str) -> Damage:
    """A header of this text; the shard has another size than before."""

    def damage(checkpoint: Path) -> None:
        path = checkpoint / SHARD
        _, data = header_of(path)
        told = content.encode().ljust(-(-len(content) // 8) * 8)
        path.write_bytes(struct.pack("<Q", len(told)) + told + data)
        shard("size", path.stat().st_size)(checkpoint)

    return damage


def with_offsets(*offsets: Any) -> Damage:
    return with_header(lambda header: header[KEY].update(data_offsets=list(offsets)))


LIES: dict[str, tuple[Damage, str]] = {
    **{kind: (damage, "") for kind, damage in HEADERS.items()},
    "a list": (with_text("[1,2,3]"), "not a JSON object"),
    "nested deeply": (with_text("[" * 200_000), "nested too deeply"),
    "entries that are none": (with_header(lambda header: header.update({KEY: 5})), f"size of {KEY}"),
    "one entry more": (with_header(lambda header: header.update(x=dict(header[KEY]))), "manifest has 'x'"),
    "odd offsets": (with_offsets(1, 4 * WIDTH + 1), f"{KEY} does not begin where"),
    "offsets too long": (with_offsets(0, 4 * WIDTH + 4), f"size of {KEY}"),
    "halves for offsets": (with_offsets(0.0, 4.0 * WIDTH), f"size of {KEY}"),
    "one offset": (with_offsets(0), f"size of {KEY}"),
    "offsets of another entry": (with_offsets(4 * WIDTH, 8 * WIDTH), "does not begin where"),
}


@pytest.mark.parametrize("kind", LIES)
def test_a_header_that_lies_is_refused_though_its_hash_is_right(newest: Path, kind: str) -> None:
    damage, words = LIES[kind]
    damage(newest)
    shard("hash", xxhash.xxh3_128((newest / SHARD).read_bytes()).hexdigest())(newest)
    why = rf"checkpoint shard {newest}/{SHARD} is damaged: its header: .*{words}"
    with pytest.raises(UserError, match=why) as refused:
        verify_checkpoint(newest)
    assert refused.value.exit_code == 1
    there = read_manifest(newest)
    with pytest.raises(UserError, match=why):
        ShardReader(newest / SHARD, there.shards[1], there.states, TokenNorms({}))


def test_a_flipped_bit_is_found_by_its_hash_and_the_one_before_is_taken(newest: Path) -> None:
    flip_last_bit(newest)
    assert first_good([newest])[0] == newest, "its structure is sound"
    assert first_good(complete_checkpoints(newest.parent)[::-1], verify_checkpoint)[0].name == "step-00000001"


def test_elements_that_no_shard_has_are_not_passed_over(newest: Path) -> None:
    reader = IntervalReader(newest, read_manifest(newest))
    with pytest.raises(UserError, match=f"has no element {2 * WIDTH} of {FIRST}"):
        list(reader.read(Interval(FIRST, WIDTH, 3 * WIDTH), "weight"))
    with pytest.raises(UserError, match="has no element 0 of else"):
        list(reader.read(Interval("else", 0, 1), "weight"))


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(newest: Path, tmp_path: Path) -> None:
    marker, there = tmp_path / "exploded", read_manifest(newest)
    bomb = pickle.dumps(Bomb(marker))
    (newest / SHARD).write_bytes(bomb.ljust((newest / SHARD).stat().st_size, b"\0"))
    for check in (read_manifest, verify_checkpoint):
        with contextlib.suppress(UserError):
            check(newest)
    with pytest.raises(UserError, match="checkpoint shard"):
        list(IntervalReader(newest, there).read(there.shards[1].intervals[0], "weight"))
    for name in (MANIFEST, LATEST):
        (newest / name if name == MANIFEST else newest.parent / name).write_bytes(bomb)
    with pytest.raises(UserError):
        read_manifest(newest)
    find_checkpoint(newest.parent)
    assert not marker.exists()
    pickle.loads(bomb)
    assert marker.exists()


def test_a_run_that_has_diverged_is_saved_and_its_manifest_is_json(newest: Path, tmp_path: Path) -> None:
    diverged = replace(
        read_manifest(newest), loss=math.nan, val_loss=math.inf, history=[{"norms": {"new": math.nan}}]
    )
    (newest / MANIFEST).unlink()
    write_manifest(newest, diverged)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads((newest / MANIFEST).read_text(), parse_constant=refuse)
    found: Manifest = read_manifest(newest)
    assert (found.loss, found.val_loss, found.history) == (None, None, [{"norms": {"new": None}}])
    assert replace(found, loss=math.nan, val_loss=math.inf, history=diverged.history) == diverged
